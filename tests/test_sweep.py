"""`blockdraft sweep`: what its figures are made of, its JSON, its plot, and what it does with bad arguments."""

import json
import math
import sys
from dataclasses import replace
from functools import partial

import pytest

import blockdraft
from blockdraft import SamplingParams, ZayaForCausalLM, cli, sweep
from blockdraft.sweep import Estimate, Measured, Row, Setting, Sweep, make_settings

SMALL = ["--count", "2", "--repeats", "2", "--max-tokens", "12", "--temperature", "0,0.7"]
ESTIMATES = ("tokens_per_second", "tokens_per_forward", "speedup", "logprob", "kl", "total_variation")


@pytest.fixture(scope="module")
def model():
    return ZayaForCausalLM.from_pretrained(blockdraft.bundled_model(), progress=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one run through the command, with its plot."""
    path = tmp_path_factory.mktemp("sweep") / "plot.png"
    arguments = ["sweep", "--json", *SMALL, "--mix", "0,1", "--samplers", "lossless,mixed,denoise", "--plot", str(path)]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *values, **kw: None if kw.get("file") else printed.append(values[0]))
        assert cli.main(arguments) == 0
    return json.loads("".join(printed)), path


def measured(**changes):
    values = Measured([1, 2], 100.0, 2.0, -0.5, None, None)
    return replace(values, **changes)


def rows_of(report, sampler, mix=None):
    return [row for row in report["settings"] if (row["sampler"], row["mix"]) == (sampler, mix)]


def tokens_of(row):
    return [[one["token_ids"] for one in prompt] for prompt in row["results"]]


# Figures


def test_json_has_every_setting_beside_plain_decoding(report):
    report, _ = report
    names = [(row["temperature"], row["sampler"], row["mix"]) for row in report["settings"]]
    others = [("lossless", None), ("mixed", 0), ("mixed", 1), ("denoise", None)]
    assert names == [(0, "ar", None), (0.7, "ar", None), *((T, *other) for T in (0, 0.7) for other in others)]
    for row in report["settings"]:
        assert (row["outputs"], row["tokens"]) == (4, 48)
        assert all(set(row[name]) == {"mean", "error"} for name in ESTIMATES if row[name] is not None)
        assert [len(prompt) for prompt in row["results"]] == [2, 2]
        for name in ("tokens_per_second", "tokens_per_forward", "speedup", "logprob"):
            assert math.isfinite(row[name]["mean"])
            assert row[name]["error"] >= 0
    assert report["prompts"] == 2
    assert report["arguments"]["mix"] == [0, 1]
    assert report["machine"]["threads"]["in use"] >= 1


def test_mix_0_is_the_lossless_path(report):
    report, _ = report
    pairs = zip(rows_of(report, "mixed", 0), rows_of(report, "lossless"), rows_of(report, "ar"), strict=True)
    for mixed, lossless, plain in pairs:
        assert tokens_of(mixed) == tokens_of(lossless) == tokens_of(plain)
        assert mixed["lossless"]
        assert mixed["identical_to_ar"] == 4
        assert mixed["kl"] is mixed["total_variation"] is lossless["kl"] is None
        assert mixed["logprob"] == plain["logprob"]


def test_a_mixed_law_is_measured_and_costs_quality(report):
    report, _ = report
    for mixed, plain in zip(rows_of(report, "mixed", 1), rows_of(report, "ar"), strict=True):
        assert not mixed["lossless"]
        assert mixed["kl"]["mean"] > 0
        assert 0 < mixed["total_variation"]["mean"] <= 1
        assert mixed["logprob"]["mean"] < plain["logprob"]["mean"]
        assert mixed["tokens_per_forward"]["mean"] > plain["tokens_per_forward"]["mean"] == 1
    assert all(row["kl"] is None and not row["lossless"] for row in rows_of(report, "denoise"))


def test_repeats_have_other_noise(report):
    greedy, sampled = (tokens_of(row)[0] for row in rows_of(report[0], "ar"))
    assert sampled[0] != sampled[1]
    assert greedy[0] == greedy[1]


def test_the_quality_is_that_of_logprobs(model):
    """The engine's own log-probabilities are another path to the same figure."""
    prompt, setting = model.encode("class Cache:\n"), Setting("lossless", 0.7)
    one = Sweep(model, [prompt], [Setting("ar", 0.7), setting], 1, 16).run()[1].outputs[0][0]
    params = SamplingParams(max_tokens=16, temperature=0.7, seed=0, ignore_eos=True, logprobs=0)
    (output,) = model.generate(prompt, params)
    assert one.token_ids == output.token_ids
    assert one.logprob == pytest.approx(sum(output.logprobs) / 16, abs=1e-5)


def test_distances_are_means_over_emitted_positions(model):
    prompt, setting = model.encode("import os\n"), Setting("mixed", 0.7, 0.5)
    sweeping = Sweep(model, [prompt], [Setting("ar", 0.7), setting], 1, 16, groups=0)
    (output,) = model.generate(prompt, sweeping.params(setting, 0))
    one = sweeping._measured(setting, output)
    assert 0 < output.stats.mixed < 16  # the first token is never mixed
    assert one.kl == pytest.approx(output.stats.kl * output.stats.mixed / 16)
    assert one.total_variation == pytest.approx(output.stats.total_variation * output.stats.mixed / 16)


def test_estimates_are_over_prompts():
    assert Estimate.of([1.0, 2.0, 6.0]) == Estimate(3.0, pytest.approx(7**0.5 / 3**0.5))
    assert Estimate.of([4.0]) == Estimate(4.0, None)
    own = [[measured(logprob=-1.0), measured(logprob=-3.0)], [measured(logprob=-4.0), measured(logprob=-4.0)]]
    row = Row(Setting("lossless", 0.0), own, own)
    assert row.estimate("logprob") == Estimate(-3.0, pytest.approx(1.0))  # of -2 and -4, not of four values
    assert Row(row.setting, own[:1], own[:1]).estimate("logprob") == Estimate(-2.0, pytest.approx(1.0))
    assert row.estimate("kl") is None


def test_speedup_is_output_by_output():
    own = [[measured(tokens_per_second=300.0)], [measured(tokens_per_second=50.0)]]
    plain = [[measured()], [measured(token_ids=[1, 3])]]
    row = Row(Setting("lossless", 0.0), own, plain)
    assert row.estimate("speedup") == Estimate(1.75, pytest.approx(1.25))
    assert (row.identical, row.count) == (1, 2)


# Turns


def test_settings_take_turns_and_have_planners_of_their_own(model, monkeypatch):
    settings = make_settings(["lossless", "mixed"], [0.5], [0.0], [None])
    sweeping, visited = Sweep(model, [[5, 6], [7, 8]], settings, 2, 4), []
    shared, decode = model.planner, sweeping._decode

    def recorded(setting, prompt, params):
        visited.append((setting.sampler, prompt[0], params.seed, params.max_tokens))
        return decode(setting, prompt, params)

    monkeypatch.setattr(sweeping, "_decode", recorded)
    sweeping.run()
    assert model.planner is shared
    assert not any(shared is planner for planner in sweeping.planners.values())
    timed = visited[3:]  # after one of each to warm up
    names = ["ar", "lossless", "mixed"]
    order = [names, names[1:] + names[:1], names[2:] + names[:2], names]
    rounds = [(5, 0), (7, 0), (5, 1), (7, 1)]
    assert timed == [(n, first, seed, 4) for own, (first, seed) in zip(order, rounds, strict=True) for n in own]
    seen = [sum(a.tested[1] for a in planner.seen.values()) for planner in sweeping.planners.values()]
    assert seen[0] == 0 < seen[1]


def test_block_lengths_and_mixes_are_combined():
    settings = make_settings(["lossless", "mixed"], [0.0, 1.0], [0.7], [4, 8])
    assert settings[0] == Setting("ar", 0.7)
    assert len(set(settings)) == len(settings) == 1 + 2 * (1 + 2)
    assert Setting("mixed", 0.7, 1.0, 8) in settings


# The command


def test_text_and_svg(capsys, tmp_path):
    path = tmp_path / "plot.svg"
    arguments = ["--mix", "0.5", "--block-length", "4,16", "--count", "1", "--repeats", "1", "--max-tokens", "8"]
    assert cli.main(["sweep", *arguments, "--temperature", "0", "--plot", str(path)]) == 0
    captured = capsys.readouterr()
    assert "1 prompts x 1 repeats x 8 tokens" in captured.out
    lines = [line.split() for line in captured.out.splitlines() if line.lstrip().startswith(("ar ", "loss", "mixed "))]
    assert [line[:4] for line in lines] == [
        ["ar", "-", "0", "-"], ["lossless", "-", "0", "4"], ["mixed", "0.5", "0", "4"],
        ["lossless", "-", "0", "16"], ["mixed", "0.5", "0", "16"],
    ]  # fmt: skip
    assert captured.err.count("rounds") == 1
    assert "<svg" in path.read_text()


def test_plot_is_written(report):
    assert report[1].read_bytes().startswith(b"\x89PNG")


def test_error_bars_are_the_errors(tmp_path):
    from matplotlib.figure import Figure

    own = [[measured(logprob=-1.0, tokens_per_second=80.0)], [measured(logprob=-3.0)]]
    axes = Figure().subplots()
    sweep.draw(axes, "x", [Row(Setting("ar", 0.0), own, own)], "logprob")
    (horizontal, vertical) = axes.containers[0].lines[2]
    assert horizontal.get_segments()[0][:, 0].tolist() == pytest.approx([80.0, 100.0])
    assert vertical.get_segments()[0][:, 1].tolist() == pytest.approx([-3.0, -1.0])


def test_without_matplotlib_a_plot_is_refused_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sweep, "Sweep", partial(pytest.fail, "ran"))
    assert cli.main(["sweep", "--plot", "x.png"]) == 2
    assert "matplotlib" in capsys.readouterr().err


def test_a_lossless_setting_that_differs_is_status_1(capsys, monkeypatch):
    measured = Sweep._measured

    def altered(self, setting, output):
        one = measured(self, setting, output)
        return one if output.stats.verify_forwards == 0 else replace(one, token_ids=[*one.token_ids[:-1], -1])

    monkeypatch.setattr(Sweep, "_measured", altered)
    assert cli.main(["sweep", *SMALL, "--mix", "1", "--groups", "0"]) == 1
    captured = capsys.readouterr()
    assert captured.err.rstrip().endswith("other tokens than plain decoding: lossless, lossless")
    assert " 0/4" in captured.out


def test_rejection_promises_a_law_and_not_tokens():
    different = Row(Setting("lossless", 0.7), [[measured()]], [[measured(token_ids=[3])]])
    assert sweep.is_different(different, "gumbel")
    assert not sweep.is_different(different, "rejection")
    assert sweep.is_different(Row(Setting("mixed", 0.0, 0.0), different.outputs, different.plain), "rejection")
    assert not sweep.is_different(Row(Setting("mixed", 0.7, 0.5), different.outputs, different.plain), "gumbel")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats must be from 1"),
        (["--count", "0"], "--count must be from 1"),
        (["--max-tokens", "0"], "--max-tokens must be from 1"),
        (["--mix", "1.5"], "mix must be"),
        (["--mix", "nan"], "mix must be"),
        (["--mix", "0.5,0.5"], "--mix must name each value once"),
        (["--temperature", "-1"], "temperature must be"),
        (["--block-length", "1"], "block_length must be"),
        (["--groups", "-1"], "groups must be"),
        (["--drafter", "ngram"], "--drafter must be auto or mask"),
        (["--plot", "x.pdf"], "--plot must end in .png or .svg"),
        (["--prompts", "no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_a_message_and_status_2(capsys, arguments, message):
    assert cli.main(["sweep", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("blockdraft: ")
    assert message in captured.err


@pytest.mark.parametrize("arguments", [["--mix", "a"], ["--block-length", "4.5"], ["--samplers", "ar"]], ids=" ".join)
def test_wrong_usage_is_status_2(capsys, arguments):
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(["sweep", *arguments])
    assert "must be" in capsys.readouterr().err
