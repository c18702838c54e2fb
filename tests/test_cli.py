import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import blockdraft
from blockdraft import cli, demo, info

PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def model():
    return blockdraft.ZayaForCausalLM.from_pretrained(blockdraft.bundled_model(), progress=False)


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_json(capsys, *arguments):
    assert cli.main(["generate", "--prompt", PROMPT, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_json_is_what_the_library_gives(capsys, model):
    result = run_json(capsys, "--max-tokens", "20", "--temperature", "0.7", "--top-p", "0.9", "--seed", "5")
    params = blockdraft.SamplingParams(max_tokens=20, temperature=0.7, top_p=0.9, seed=5)
    (output,) = model.generate(PROMPT, params)
    assert (result["token_ids"], result["text"]) == (output.token_ids, output.text)
    assert (result["seed"], result["finish_reason"]) == (5, output.finish_reason)
    stats = result["stats"]
    assert stats["verify_forwards"] == output.stats.verify_forwards
    assert stats["tokens_per_forward"] == output.stats.tokens_per_forward
    assert stats["acceptance_histogram"] == output.stats.acceptance_histogram


def test_every_sampler_option_reaches_the_library(capsys):
    args = cli.build_parser().parse_args(
        ["generate", "--prompt", "x", "--max-tokens", "7", "--sampler", "ar", "--temperature", "0.5", "--top-k", "4",
         "--top-p", "0.8", "--min-p", "0.1", "--seed", "9", "--stop", "a", "--stop", "b", "--ignore-eos",
         "--drafter", "none"]
    )  # fmt: skip
    assert cli.sampling_params(args) == blockdraft.SamplingParams(
        max_tokens=7, sampler="ar", temperature=0.5, top_k=4, top_p=0.8, min_p=0.1, seed=9, stop=("a", "b"),
        ignore_eos=True, drafter="none",
    )  # fmt: skip


def test_generate_plain(capsys, model):
    assert cli.main(["generate", "--prompt", PROMPT, "--max-tokens", "12", "--sampler", "ar"]) == 0
    captured = capsys.readouterr()
    (output,) = model.generate(PROMPT, blockdraft.SamplingParams(max_tokens=12))
    assert captured.out == output.text + "\n"  # the prompt is not repeated, and nothing else is printed
    assert "12 tokens" in captured.err


def test_prompt_from_standard_input(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert cli.main(["generate", "--prompt", "-", "--json", "--max-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == run_json(capsys, "--max-tokens", "4")["token_ids"]


def test_stop_string(capsys):
    whole = run_json(capsys, "--max-tokens", "40")["text"]
    stop = whole[10:14]
    result = run_json(capsys, "--max-tokens", "40", "--stop", "never in the text", "--stop", stop)
    assert (result["text"], result["finish_reason"]) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "max_tokens must be"),
        (["--temperature", "-1"], "temperature must be"),
        (["--top-p", "1.5"], "top_p must be"),
        (["--seed", "-1"], "seed must be"),
        (["--stop", ""], "stop must be"),
        (["--mask-token-id", "100000000"], "mask_token_id"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_a_message_and_status_2(capsys, arguments, message):
    assert cli.main(["generate", "--prompt", PROMPT, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("blockdraft: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["generate"],
        ["demo", "--threads", "0"],
        ["demo", "--max-tokens", "x"],
        ["info", "--mix", "1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(capsys, argv):
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(argv)
    assert "usage: blockdraft" in capsys.readouterr().err


def test_mask_token_id_and_model_and_dtype_and_threads(capsys):
    folder = str(blockdraft.bundled_model())
    options = ["--model", folder, "--mask-token-id", "3", "--dtype", "float32", "--threads", "1", "--max-tokens", "8"]
    wrong_mask = run_json(capsys, *options)
    assert torch.get_num_threads() == 1
    plain = run_json(capsys, *options, "--sampler", "ar")
    assert wrong_mask["token_ids"] == plain["token_ids"], "a wrong mask token costs speed only"


def test_demo_compares_and_shows_a_table(capsys):
    assert cli.main(["demo", "--max-tokens", "24"]) == 0
    out = capsys.readouterr().out
    assert out.count(demo.PROMPT) == len(demo.RUNS)
    assert "\x1b" not in out
    table = out[out.index("tokens/s") :]
    assert table.count("  yes") == 2
    assert "  NO" not in table
    assert "accepted drafts per verification" in table


def test_demo_fails_where_a_lossless_run_differs(capsys, monkeypatch):
    """Negative control: the comparison is computed."""
    stream = blockdraft.ZayaForCausalLM.stream

    def altered(model, prompts, params):
        for event in stream(model, prompts, params):
            if params.sampler == "lossless" and event.output:
                tokens = [*event.output.token_ids[:-1], 0]
                event = replace(event, output=replace(event.output, token_ids=tokens))
            yield event

    monkeypatch.setattr(blockdraft.ZayaForCausalLM, "stream", altered)
    assert cli.main(["demo", "--max-tokens", "8"]) == 1
    captured = capsys.readouterr()
    assert "  NO" in captured.out
    assert "differs" in captured.err


def test_info_text_and_json(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["blockdraft"] == blockdraft.__version__
    assert facts["cpu"]["kernels"] == blockdraft.cpu_isa()
    assert facts["threads"]["in use"] == torch.get_num_threads()
    assert facts["libraries"].keys() == {"_cpu", "_cuda", "_hip"}
    for name, library in facts["libraries"].items():
        assert library["loaded"] == (name in blockdraft.loaded_libraries)
        assert library["path" if library["loaded"] else "reason"] in text
    assert facts["decoder"] == "one operator a forward"


def test_variable_chooses_how_a_forward_runs(monkeypatch):
    folder = blockdraft.bundled_model()
    for value, fused in (("modules", False), ("fused", True), ("", True)):
        monkeypatch.setenv("BLOCKDRAFT_DECODER", value)
        assert blockdraft.ZayaForCausalLM.from_pretrained(folder, progress=False).decoder.fused is fused
        assert info.decoder().startswith("one operator") is fused
    monkeypatch.setenv("BLOCKDRAFT_DECODER", "slow")
    with pytest.raises(blockdraft.errors.ConfigError, match="BLOCKDRAFT_DECODER must be fused or modules, got 'slow'"):
        blockdraft.ZayaForCausalLM.from_pretrained(folder, progress=False)


def test_info_says_why_a_library_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(info._host, "__file__", str(tmp_path / "_host.so"))
    assert info.why_not_loaded("_hip").startswith("not built")
    (tmp_path / "_hip.so").touch()
    assert info.why_not_loaded("_hip") == "built, but this torch is not a ROCm build"


def test_module_runs_as_a_process():
    command = [sys.executable, "-m", "blockdraft", "generate", "--prompt", PROMPT, "--max-tokens", "8", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(result.stdout)["token_ids"]) <= 8
    missing = subprocess.run([*command, "--model", "no/such/folder"], capture_output=True, text=True)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("blockdraft: ")


def test_closed_pipe_is_no_error():
    command = f"{sys.executable!r} -m blockdraft info | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
