"""The recipe's chain in small: text to evaluated weights, in one process."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "nano"))
pytest.importorskip("matplotlib")
ci = pytest.importorskip("ci")
import ablation  # noqa: E402
import data  # noqa: E402
import own_text  # noqa: E402
import train  # noqa: E402
from blockdraft import convert  # noqa: E402

TRAINING = ["--size", "tiny", "--batch", "4", "--length", "48", "--block-length", "8", "--max-bytes", "100000"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("nano")
    return out, ci.main([str(out), "--size", "tiny"])


def test_chain(done):
    out, status = done
    assert status == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert 1 < result["bits_per_byte"] < 6
    assert result["own_text"]["greedy"]["mix 0.5"]["all"]["kl"] > 0
    assert all(1 <= n <= 4 for n in result["experts"]["mask"]["distinct"])
    assert {"acceptance.svg", "experts.svg", "mixing.svg"} <= {path.name for path in out.iterdir()}
    manifest = json.loads((out / "stage1" / "manifest.json").read_text())
    assert manifest["licence"] == "PSF-2.0"
    assert manifest["train"]
    assert not manifest["train"].keys() & manifest["held_out"].keys()


def test_a_second_run_does_nothing(done, capsys):
    out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert ci.main([str(out), "--size", "tiny"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_the_checks_can_fail(done, monkeypatch):
    out, _ = done
    size = ci.SIZES["tiny"]
    assert list(ci.checks(out, out / "stage2", size).values()).count(False) == 0
    monkeypatch.setattr(ci, "fallen", lambda *_: 1.1)
    monkeypatch.setattr(ci, "difference_from_transformers", lambda *_: 1.0)
    sampled = ci.SamplingParams
    monkeypatch.setattr(ci, "SamplingParams", lambda **values: sampled(**values | {"seed": None, "temperature": 2.0}))
    assert not any(ci.checks(out, out / "stage2", size).values())


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, monkeypatch):
    steps = ["--steps", "6", "--convert-steps", "6"]
    train.main([str(tmp_path / "whole"), *TRAINING, *steps])
    monkeypatch.setattr(train, "SAVE_EVERY", 4)
    step, count = train.Trainer.train_step, iter(range(100))

    def interrupted(self):
        if next(count) == 9:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([str(tmp_path / "parts"), *TRAINING, *steps])
    monkeypatch.setattr(train.Trainer, "train_step", step)
    train.main([str(tmp_path / "parts"), *TRAINING, *steps])
    whole, parts = (torch.load(tmp_path / name / "state.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    with pytest.raises(SystemExit, match="of a run with other arguments"):
        train.main([str(tmp_path / "parts"), *TRAINING, *steps, "--seed", "1"])


def test_balancing_biases_do_not_drift():
    model = train.ZayaReference(train.nano_config("tiny", 272, 8, "prefix"))
    for layer in model.model.layers:
        layer.mlp.chosen = torch.zeros(2, 8, dtype=torch.int64)  # all rows to one expert
    before = [layer.mlp.gate.balancing_biases.clone() for layer in model.model.layers]
    for _ in range(50):
        assert train.balance(model, 0.01, 4) == 1.0
    for layer, old in zip(model.model.layers, before, strict=True):
        biases = layer.mlp.gate.balancing_biases
        assert abs(biases[:4].mean()) < 1e-6
        assert biases[0] < biases[1:4].min() - 0.1
        assert biases[4] == old[4]


def test_some_of_the_text_is_split_like_all_of_it():
    train_files, held_out = data.split(300_000)
    assert 300_000 <= sum(len(text) for _, text in train_files) < 400_000
    assert not any(data.is_held_out(path) for path, _ in train_files)
    assert all(data.is_held_out(path) for path, _ in held_out)


def test_ablation(tmp_path):
    size = ["--size", "tiny", "--max-bytes", "200000"]
    ablation.main([str(tmp_path), *size, "--seeds", "1", "--base-steps", "10", "--steps", "4"])
    rows = json.loads((tmp_path / "ablation.json").read_text())
    arms = {arm: rows[arm][0] for arm in ablation.ARMS}
    assert len({arm["held_out_diffusion"] for arm in arms.values()}) == len(arms)
    assert arms["control"]["held_out_diffusion"] > max(arms[name]["held_out_diffusion"] for name in ("prefix", "mask"))
    assert all(arm["tokens_per_verify_sampled"] >= 1 for name, arm in arms.items() if name != "control")
    heads = [convert.load(tmp_path / f"{arm}-0").config.draft_head for arm in ("prefix", "separate", "markov")]
    assert heads == ["shared", "separate", "markov"]
    parents = [convert.load(tmp_path / f"{arm}-0").config.mask_parent for arm in ("prefix", "mask", "zero")]
    assert parents == ["anchor", "previous", "none"]


def test_a_draft_head_alone(tmp_path):
    """What the checkpoint had stays, balancing biases included; only matrices of the drafts come and learn."""
    common = ["--size", "tiny", "--max-bytes", "200000", "--batch", "2", "--length", "64"]
    train.main([str(tmp_path / "base"), *common, "--steps", "3", "--convert-steps", "2"])
    head = ["--init", str(tmp_path / "base"), "--steps", "0", "--draft-head", "markov", "--only-draft-head"]
    train.main([str(tmp_path / "head"), *common, *head, "--convert-steps", "3"])
    base, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "head"))
    assert all(torch.equal(value, trained[name]) for name, value in base.items())
    assert {name.split(".")[0] for name in trained.keys() - base.keys()} == {
        "diffusion_output_layer",
        "diffusion_markov_head",
    }
    embeddings = next(value for name, value in base.items() if "embed_tokens" in name)
    assert not torch.equal(trained["diffusion_output_layer.weight"], embeddings)


@pytest.mark.parametrize(("tokens", "expected"), [([1, 2] * 10, True), (list(range(20)), False), ([5] * 20, True)])
def test_periodic(tokens, expected):
    assert own_text.periodic(tokens) == expected
