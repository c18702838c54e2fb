"""`blockdraft bench` at a small geometry: what it reports, and that what is wrong shows as wrong."""

import argparse
import itertools
import json
import subprocess
import sys

import pytest
import torch

from blockdraft import _host, bench, ops
from blockdraft.bench import gpu
from blockdraft.bench.report import HEADINGS
from blockdraft.bench.subject import TINY, Case, Copies, Setting, as_tuple, compare
from blockdraft.bench.subjects import SUBJECTS
from blockdraft.bench.subjects.moe_experts import MoeExperts, uniform_ids

SMALL = ["--shapes", "tiny", "--cold-mb", "0.001", "--read-mb", "1", "--quick", "--threads", "1", "--seconds", "0.01"]
LABELS = [
    "residual_norm",
    "packed_linear qkv 64->128",
    "packed_linear o 64->64",
    "cca_mix",
    "block_attention context 40",
    "block_attention context 70",
    "moe_router",
    "moe_experts",
    "moe_experts, int8",
    "moe_experts, mxfp4",
    "moe_experts, fp8",
    "lm_head_choose greedy",
    "lm_head_choose temperature 0.8",
    "choose_tokens greedy",
    "choose_tokens temperature 0.8",
    "reject_drafts",
    "verify_tokens",
    "commit_states",
]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="blockdraft bench")
    bench.add_arguments(parser)
    return parser.parse_args([*SMALL, *arguments])


def cells_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table, heading first, without the rule."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, list[dict[str, str]], str]:
    """Exit status, rows of the table and all that was printed."""
    status = bench.main(parse(*arguments))
    printed = capsys.readouterr().out
    headings, *rows = cells_of(printed)
    return status, [dict(zip(headings, row, strict=True)) for row in rows], printed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_operators_match(capsys, tmp_path, dtype):
    path = tmp_path / "result.json"
    status, rows, printed = run(capsys, "--rows", "1,17", "--dtype", dtype, "--json", str(path))
    assert status == 0
    assert [(row["op"], row["rows"]) for row in rows] == [(label, count) for label in LABELS for count in ("1", "17")]
    assert {row["match"] for row in rows} == {row["same bits"] for row in rows} == {"yes"}
    assert all(float(row["blockdraft ms"]) > 0 and float(row["PyTorch ms"]) > 0 for row in rows)
    assert "computed from the shapes" in printed

    report = json.loads(path.read_text())
    assert {"cpu", "threads", "cpu_isa", "torch", "blockdraft", "date"} <= report["machine"].keys()
    assert report["machine"]["threads"] == 1
    assert report["read_limit_gb_s"] == max(report["read_samples_gb_s"]) > 0
    assert [(row["op"], row["rows"]) for row in report["results"]] == [(label, T) for label in LABELS for T in (1, 17)]
    for row in report["results"]:
        assert row["repeats"] >= 3
        assert row["max_abs_error"] >= row["worst_error"] >= 0
        assert row["gb_s"] == pytest.approx(row["computed_touched_bytes"] / row["median_ms"] * 1e-6)
        assert row["computed_cold_bytes"] <= row["computed_touched_bytes"]


def test_renders_what_it_saved(capsys, tmp_path):
    path = tmp_path / "result.json"
    _, rows, printed = run(capsys, "--rows", "2", "--ops", "moe_experts,verify_tokens", "--json", str(path))
    assert [row["op"] for row in rows] == [
        "moe_experts",
        "moe_experts, int8",
        "moe_experts, mxfp4",
        "moe_experts, fp8",
        "verify_tokens",
    ]
    assert list(rows[0]) == list(HEADINGS)
    assert rows[0]["note"] == "experts touched: 2 of 4"
    assert bench.main(parse("--render", str(path))) == 0
    assert capsys.readouterr().out == printed
    command = [sys.executable, "-m", "blockdraft.bench", "--render", str(path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == printed


@pytest.mark.parametrize(
    ("load", "samples", "idle"), [(0.1, [40, 41], True), (3.0, [40, 41], False), (0.1, [20, 41], False)]
)
def test_says_when_the_machine_was_busy(capsys, tmp_path, load, samples, idle):
    path = tmp_path / "result.json"
    run(capsys, "--rows", "1", "--ops", "verify_tokens", "--json", str(path))
    report = json.loads(path.read_text())
    report["machine"]["load_average"] = load
    report["read_samples_gb_s"] = samples
    path.write_text(json.dumps(report))
    bench.main(parse("--render", str(path)))
    assert ("THE MACHINE WAS NOT IDLE" not in capsys.readouterr().out) == idle


def changed(result: object, arguments: tuple) -> object:
    """The result with one value wrong: of the last row, by an eighth of the largest value, or another integer."""
    if result is None:
        arguments[-1][..., -1, -1] += 1  # a state, written in place
        return None
    first, *rest = as_tuple(result)
    flat = first.view(-1).clone()
    flat[-1] += flat.abs().max() / 8 if flat.is_floating_point() else 1
    return (flat.view_as(first), *rest) if rest else flat.view_as(first)


@pytest.mark.parametrize("name", SUBJECTS)
def test_wrong_result_does_not_match(capsys, monkeypatch, name):
    operator = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *arguments: changed(operator(*arguments), arguments))
    status, rows, _ = run(capsys, "--rows", "5", "--ops", name)
    assert status == 1
    assert all(row["match"].startswith("NO (") for row in rows)


def test_nan_does_not_match(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "packed_linear", lambda x, _, outputs: torch.full((len(x), outputs), torch.nan))
    status, rows, _ = run(capsys, "--rows", "5", "--ops", "packed_linear", "--json", str(tmp_path / "result.json"))
    assert status == 1
    assert rows[0]["match"] == "NO (not finite)"
    assert "Infinity" not in (tmp_path / "result.json").read_text()


def test_token_out_of_range_does_not_match(capsys, monkeypatch):
    operator = ops.lm_head_choose
    monkeypatch.setattr(ops, "lm_head_choose", lambda *a: (operator(*a)[0] + 10**6, operator(*a)[1]))
    status, _, _ = run(capsys, "--rows", "2", "--ops", "lm_head_choose")
    assert status == 1


def test_bits_that_depend_on_company_are_reported(capsys, monkeypatch):
    operator = ops.packed_linear

    def depends(x: torch.Tensor, *rest: object) -> torch.Tensor:
        y = operator(x, *rest)
        return y if len(x) == 1 else y.nextafter(torch.full_like(y, torch.inf))

    monkeypatch.setattr(ops, "packed_linear", depends)
    status, rows, _ = run(capsys, "--rows", "1,5", "--ops", "packed_linear", "--dtype", "float32")
    assert status == 1
    assert [row["match"] for row in rows] == ["yes"] * 4
    assert [row["same bits"] for row in rows] == ["yes", "NO"] * 2


def test_tolerance_counts_each_element():
    exact = torch.tensor([100.0, 1.0], dtype=torch.float64)
    near, far = torch.tensor([100.0, 1.007]), torch.tensor([100.0, 1.05])
    assert compare([(near.bfloat16(), exact)], depth=0, roundings=1).ok
    assert not compare([(far.bfloat16(), exact)], depth=0, roundings=1).ok  # though 0.05 is little beside 100


def cases(name: str, rows: int, dtype: torch.dtype = torch.float32) -> list[Case]:
    setting = Setting(TINY, dtype, cold_bytes=0, most_rows=40)
    return [subject.case(rows) for subject in SUBJECTS[name](setting)]


@pytest.mark.parametrize("rows", [1, 17, 40])
@pytest.mark.parametrize("name", SUBJECTS)
def test_pytorch_computes_the_same(name, rows):
    """Else the comparison of times would be of different work."""
    for case in cases(name, rows):
        if name in ("choose_tokens", "lm_head_choose") and case.temperature > 0:
            continue  # other random numbers
        operator_arguments, torch_arguments = case.arguments(1), case.torch_arguments(1)
        ours, theirs = getattr(ops, name)(*operator_arguments), case.pytorch(*torch_arguments)
        if name == "commit_states":
            ours, theirs = operator_arguments[-2:], torch_arguments[-2:]
        for a, b in zip(as_tuple(ours), as_tuple(theirs), strict=False):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


def test_copies_take_turns():
    copies = Copies([torch.arange(100.0), torch.ones(50)], cold_bytes=1500)
    assert (copies.bytes, copies.count) == (600, 3)
    places = [copies[turn][0].data_ptr() for turn in range(4)]
    assert len(set(places)) == 3
    assert places[3] == places[0]
    assert torch.equal(copies[2][0], torch.arange(100.0))


def test_every_expert_is_met_before_one_returns():
    for case in cases("moe_experts", 2):
        assert isinstance(case, MoeExperts)
        touched = [set(case.arguments(turn)[1].tolist()) for turn in range(3)]
        assert touched[0] | touched[1] == {0, 1, 2, 3}
        assert touched[2] == touched[0]


def test_stored_experts_have_fewer_bytes():
    plain, int8, mxfp4, fp8 = cases("moe_experts", 2, torch.bfloat16)
    assert int8.cold_bytes * 2 == fp8.cold_bytes * 2 == plain.cold_bytes
    assert mxfp4.cold_bytes * 64 == plain.cold_bytes * 17
    assert mxfp4.touched_bytes < int8.touched_bytes < plain.touched_bytes


@pytest.mark.parametrize(("rows", "touched"), [(1, 1), (16, 10), (64, 16)])
def test_routing_is_uniform(rows, touched):
    assert uniform_ids(rows, 16).unique().tolist() == list(range(touched))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "1,x"], "must be integers separated by commas, got '1,x'"),
        (["--rows", "0"], "must be from 1 to 4096, got '0'"),
        (["--ops", "softmax"], "no operator 'softmax'; there are residual_norm, "),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--seconds", "-1"], "must be positive, got -1"),
        (["--threads", "0"], "must be from 1 to 1024, got '0'"),
    ],
    ids=["rows-word", "rows-zero", "ops", "dtype", "seconds", "threads"],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("{", "no JSON: "), ("[]", "not a result"), ('{"results": []}', "not a result")],
    ids=["missing", "broken", "list", "other"],
)
def test_bad_file_to_render(tmp_path, text, message):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(bench.BenchError, match=f"other.json: {message}"):
        bench.main(parse("--render", str(path)))


def test_folder_for_json_is_looked_at_first(tmp_path):
    with pytest.raises(bench.BenchError, match="no folder that can be written to"):
        bench.main(parse("--json", str(tmp_path / "none" / "result.json")))


def test_threads_are_put_back(capsys):
    before = torch.get_num_threads()
    run(capsys, "--rows", "1", "--ops", "verify_tokens")
    assert torch.get_num_threads() == before


def test_read_bandwidth():
    assert _host.read_bandwidth(1 << 20, threads=2, repeats=2) > 0.01
    with pytest.raises(ValueError, match="at least 512 bytes a thread"):
        _host.read_bandwidth(1000, threads=2, repeats=1)
    with pytest.raises(ValueError, match="wants 1 to 1024 threads"):
        _host.read_bandwidth(1 << 20, threads=0, repeats=1)


def test_cuda_without_a_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(bench.BenchError, match="--device cuda: this torch sees no GPU"):
        run(capsys, "--device", "cuda")


def test_gpu_run_without_its_clock(capsys, monkeypatch):
    """All but graphs and events, with the CPU in the GPU's place: operators without a kernel are left out and named."""
    turns = []

    def unit(call, arguments):
        own = [arguments(turn) for turn in range(gpu.CALLS)]
        turns.append(own)
        return lambda: call(*own[0]), False

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "no GPU", "cuda": "0.0"})
    monkeypatch.setattr(gpu, "has_kernel", lambda op: op != "cca_mix")
    monkeypatch.setattr(gpu, "unit", unit)
    counter = itertools.count(7, 3)
    monkeypatch.setattr(gpu, "gpu_launches", lambda: next(counter))
    monkeypatch.setattr(gpu, "seconds_of", lambda run: (run(), 1e-3)[1])
    options = ["--device", "cuda", "--rows", "1,17", "--cold-mb", "1"]
    status, rows, printed = run(capsys, *options, "--ops", "packed_linear,cca_mix")
    assert status == 0
    assert printed.startswith("no GPU, CUDA or ROCm 0.0; ")
    assert "Without a GPU kernel and not measured: cca_mix." in printed
    assert [row["op"] for row in rows] == ["packed_linear qkv 64->128"] * 2 + ["packed_linear o 64->64"] * 2
    assert {row["blockdraft ms"] for row in rows} == {"0.025"}  # 1 ms a graph
    assert {row["note"] for row in rows} == {"PyTorch without a graph"}
    assert {row["launches"] for row in rows} == {"3"}
    assert len({arguments[1].data_ptr() for arguments in turns[0]}) > 1  # the calls take weights by turns
    with pytest.raises(bench.BenchError, match="no GPU kernel of cca_mix"):
        run(capsys, *options, "--ops", "cca_mix")
