"""`blockdraft bench --layer`, `--model` and `--base` at a small geometry."""

import argparse
import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import blockdraft
from blockdraft import _host, bench, ops
from blockdraft.bench import layer, memory, revision, sides, whole
from blockdraft.bench.gate import Gate
from blockdraft.bench.measure import Budget, time_sides
from blockdraft.bench.random_model import RANDOM, UNIFORM, RandomWeights, config_of
from blockdraft.bench.report import LAYER, OPERATORS
from blockdraft.bench.subject import TINY
from blockdraft.model.decoder import Decoder
from blockdraft.model.expert_formats import EXPERT_FORMATS
from blockdraft.reference.pack_weight import mx_values
from test_bench import cells_of, parse

pytest.importorskip("transformers")

SHORT = ["--context", "20"]


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, list[dict[str, str]], str]:
    """Exit status, rows of the first table and all that was printed."""
    status = bench.main(parse(*SHORT, *arguments))
    printed = capsys.readouterr().out
    headings, *rows = cells_of(printed.split("\n\nms: ")[0])
    return status, [dict(zip(headings, row, strict=True)) for row in rows], printed


def small_decoder(routing: str, layers: int = 3) -> Decoder:
    config = config_of(TINY, layers, 200)
    return Decoder(config, RandomWeights(config, torch.float32, routing), torch.float32, torch.device("cpu"))


@pytest.fixture
def no_transformers(monkeypatch):
    for module in (layer, whole):
        monkeypatch.setattr(module, "has_transformers", lambda: False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layer_matches_and_is_compared(capsys, tmp_path, dtype):
    path = tmp_path / "layer.json"
    status, rows, printed = run(capsys, "--layer", "--rows", "1,17", "--dtype", dtype, "--json", str(path))
    assert status == 0
    labels = [f"layer, context 20, {routing} routing" for routing in (UNIFORM, RANDOM)]
    assert [(row["op"], row["rows"]) for row in rows] == [(label, T) for label in labels for T in ("1", "17")]
    assert {row["match"] for row in rows} == {row["same bits"] for row in rows} == {"yes"}
    assert all(float(row["transformers ms"]) > 0 and float(row["transformers / blockdraft"]) > 0 for row in rows)
    assert [row["note"].split(";")[0] for row in rows[:2]] == ["experts touched: 1 of 4", "experts touched: 4 of 4"]
    report = json.loads(path.read_text())
    for row in report["results"]:
        assert set(row["others"]) == {"eager", "grouped_mm"}
        assert row["torch_median_ms"] == min(times["median_ms"] for times in row["others"].values())
        assert 0 < row["worst_error"] < row["worst_tolerance"]
    assert report["settings"]["layers"] >= 2
    assert bench.main(parse("--render", str(path))) == 0
    assert capsys.readouterr().out == printed


@pytest.fixture
def modules(monkeypatch):
    """Forwards call the operators from Python, where a test can put others in their place."""
    monkeypatch.setenv("BLOCKDRAFT_DECODER", "modules")


@pytest.mark.parametrize("name", ["moe_experts", "block_attention", "cca_mix"])
def test_wrong_layer_does_not_match(capsys, monkeypatch, modules, name):
    operator = getattr(ops, name)

    def wrong(*arguments: object) -> object:
        result = operator(*arguments)
        (result if torch.is_tensor(result) else result[0])[-1] *= 2  # the last row's
        return result

    monkeypatch.setattr(ops, name, wrong)
    status, rows, _ = run(capsys, "--layer", "--rows", "5")
    assert status == 1
    assert rows[0]["match"].startswith("NO (")


def test_layer_whose_bits_depend_on_company_is_reported(capsys, monkeypatch, modules):
    operator = ops.moe_experts

    def depends(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return operator(x, *rest) if len(x) == 1 else operator(x, *rest) * 1.01

    monkeypatch.setattr(ops, "moe_experts", depends)
    status, rows, _ = run(capsys, "--layer", "--rows", "1,5")
    assert status == 1
    assert [row["same bits"] for row in rows[:2]] == ["yes", "NO"]


def test_compiled_layers_are_a_further_side(capsys, tmp_path, monkeypatch):
    """With a compiler that compiles nothing: a real one takes half a minute."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: seen.append(layer) or layer)
    path = tmp_path / "layer.json"
    status, _, _ = run(capsys, "--layer", "--rows", "2", "--compile", "--json", str(path))
    assert status == 0
    (row, _) = json.loads(path.read_text())["results"]
    assert set(row["others"]) == {"eager", "grouped_mm", "compiled"}
    assert len(seen) == json.loads(path.read_text())["settings"]["layers"]


def test_layers_that_do_not_compile_are_named(capsys, monkeypatch):
    def compiled(layer: object, dynamic: bool) -> object:
        def fails(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        return fails

    monkeypatch.setattr(torch, "compile", compiled)
    status, rows, _ = run(capsys, "--layer", "--rows", "2", "--compile")
    assert status == 0
    assert rows[0]["note"].endswith("; torch.compile failed: ZeroDivisionError")


@torch.inference_mode()
def test_uniform_routing_is_as_promised():
    decoder = small_decoder(UNIFORM, layers=40)  # so deep that what layers add would outweigh a token's own channel
    ours = sides.Ours(decoder, range(10), 40, torch.float32)
    tokens = torch.arange(40)
    for i, chosen in enumerate(ours.experts_of(tokens.tolist())):
        assert chosen.tolist() == ((tokens + i) % 4).tolist()
    ours.route(RandomWeights(decoder.config, torch.float32, RANDOM))
    random = torch.cat(ours.experts_of(tokens.tolist())).bincount(minlength=4)
    assert random.max() > 500  # of 1600; even ones are 400
    ours.route(RandomWeights(decoder.config, torch.float32, UNIFORM))
    assert torch.cat(ours.experts_of(tokens.tolist())).bincount().tolist() == [400] * 4


@pytest.mark.parametrize("turn", [0, 1, 5])
def test_uniform_tokens_touch_as_many_experts_as_on_average(turn):
    config = config_of(TINY, 2, 200)
    tokens = layer.uniform_tokens(config, 2, turn)
    assert len({token % 4 for token in tokens}) == 2
    assert all(0 <= token < 200 for token in tokens)
    assert {token % 4 for token in layer.uniform_tokens(config, 1, turn)} == {
        turn % 4
    }  # cold: the next turn has another


@torch.inference_mode()
def test_calls_leave_both_sides_as_they_are():
    config = config_of(TINY, 2, 200)
    weights = RandomWeights(config, torch.float32)
    context = torch.randint(200, (37,)).tolist()
    decoder = Decoder(config, weights, torch.float32, torch.device("cpu"))
    ours = sides.Ours(decoder, context, 16, torch.float32)
    theirs = sides.Theirs(sides.their_random_model(weights, False), context)
    first = theirs.hidden_states([1, 2, 3])
    for prepare in (ours.layers, ours.step, *(lambda t, e=e: theirs.layers(t, e) for e in sides.EXPERTS)):
        call, arguments = prepare([5, 6])
        call(*arguments)
    call, arguments = theirs.step([7, 8], "grouped_mm")
    call(*arguments)
    assert torch.equal(theirs.hidden_states([1, 2, 3]), first)
    torch.testing.assert_close(ours.hidden_states([1, 2, 3]), first, rtol=1e-4, atol=1e-4)
    call, arguments = theirs.layers([1, 2, 3], "eager")
    torch.testing.assert_close(theirs.base.norm(call(*arguments))[0], first)


def test_touched_bytes_count_each_expert_once():
    decoder = small_decoder(UNIFORM, layers=2)
    weights = sum(buffer.nbytes for part in decoder.layers for buffer in part.buffers())
    keys = 2 * 2 * 10 * 2 * 16 * 4  # layers, k and v, tokens, heads, width, float32
    assert layer.touched_bytes(decoder, [4, 4], context=10) == weights + keys
    expert = sum(getattr(decoder.layers[0].mlp, name)[0].nbytes for name in ("gate_up_proj", "expert_down_proj"))
    assert layer.touched_bytes(decoder, [1, 3], context=10) == weights + keys - 4 * expert


def test_without_transformers(capsys, no_transformers):
    status, rows, _ = run(capsys, "--layer", "--rows", "2")
    assert status == 0
    assert rows[0]["transformers ms"] == rows[0]["transformers / blockdraft"] == "-"
    assert rows[0]["match"] == "yes"  # the reference is ours
    assert rows[0]["note"].endswith("transformers is not installed")
    status, rows, _ = run(capsys, "--model", "--rows", "2")
    assert status == 0
    assert rows[0]["match"] == rows[0]["transformers ms"] == "-"


@pytest.mark.parametrize("together", [True, False])
def test_model_of_random_weights(capsys, monkeypatch, together):
    alive: list[tuple[bool, bool]] = []
    observe = whole.StepCase.observe

    def watched(case: whole.StepCase, pair: whole.Pair, seen: whole.Seen) -> None:
        alive.append((pair.ours is not None, pair.theirs is not None))
        observe(case, pair, seen)

    monkeypatch.setattr(whole.StepCase, "observe", watched)
    monkeypatch.setattr(whole, "fits", lambda size: together)
    status, rows, printed = run(capsys, "--model", "--layers", "2")
    assert status == 0
    assert set(alive) == ({(True, True)} if together else {(True, False), (False, True)})
    assert {row["op"].split(",")[1] for row in rows} == {" 2 of 3 layers"}
    assert [row["rows"] for row in rows] == ["1", "16"] * 2
    assert {row["match"] for row in rows} == {row["same bits"] for row in rows} == {"yes"}
    assert ("The sides ran by turns" in " ".join(printed.split())) == together
    tokens, ms = float(rows[0]["note"].split(" ")[0]), float(rows[0]["blockdraft ms"])
    assert tokens == pytest.approx(1e3 / ms, rel=0.01)


def test_model_that_computes_otherwise_does_not_match(capsys, monkeypatch, modules):
    operator = ops.moe_experts
    monkeypatch.setattr(ops, "moe_experts", lambda x, *rest: -operator(x, *rest))
    status, rows, _ = run(capsys, "--model", "--rows", "4")
    assert status == 1
    assert rows[0]["match"].startswith("NO (")


@pytest.fixture
def short_generation(monkeypatch):
    monkeypatch.setattr(whole, "NEW", 4)
    monkeypatch.setattr(whole, "PROMPT", 8)


def test_bundled_model_generates(capsys, short_generation):
    status, rows, _ = run(capsys, "--model", "nano", "--rows", "1")
    assert status == 0
    assert [row["op"] for row in rows] == [
        "nano, context 20, own routing, step",
        "nano, generate, plain, 4 tokens after 8",
    ]
    assert {row["match"] for row in rows} == {"yes"}


@torch.inference_mode()
def test_generated_tokens_that_are_not_the_best_do_not_match(short_generation):
    run = whole.ModelRun(
        TINY,
        Path(blockdraft.bundled_model()),
        torch.bfloat16,
        (1,),
        20,
        (),
        None,
        1,
        False,
        Budget(0.01, 3),
        lambda: None,
    )
    loader = whole.Loader(run)
    case = loader.cases()[-1]
    theirs = loader.theirs().theirs
    for wrong in (False, True):
        tokens = case._ours(loader.ours().model)
        tokens[2] = 200 if wrong else tokens[2]
        match = case.match(whole.Seen(lack=case._lack(theirs, tokens)))
        assert match.ok == (not wrong)


@pytest.mark.parametrize("arguments", [["--layer"], ["--model"], ["--model", "nano"]])
def test_too_little_memory_is_said_before(monkeypatch, arguments):
    monkeypatch.setattr(memory, "available", lambda: memory.SPARE)
    monkeypatch.setattr(layer, "Decoder", None)
    monkeypatch.setattr(whole, "Decoder", None)
    with pytest.raises(bench.BenchError, match=r"needs 1\.\d GiB of memory, 1\.0 are available; lower"):
        bench.main(parse(*SHORT, *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "--ops", "cca_mix"], "--layer: has no operators to choose, got --ops cca_mix"),
        (["--compile"], "--compile: .* wants --layer"),
        (["--layers", "2"], "--layers: .* wants --layer or --model 8b"),
        (["--model", "nano", "--layers", "2"], "--layers: .* wants --layer or --model 8b"),
        (["--model", "nano", "--format", "int8"], "--format: .* wants --layer or --model 8b"),
        (["--model", "nano", "--context", "5000"], "--context: .* at most 2032 .* got 5000"),
        (["--model", "nano", "--rows", "1,2000", "--context", "100"], "--context: .* at most 48 .* got 100"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(bench.BenchError, match=message):
        bench.main(parse(*arguments))


def test_model_that_is_not_there():
    with pytest.raises(blockdraft.errors.CheckpointError, match="no_such_folder"):
        bench.main(parse("--model", "no_such_folder"))


def test_sides_take_turns():
    called: list[str] = []
    prepares = [lambda turn, name=name: (called.append, (f"{name}{turn}",)) for name in "abc"]
    times = time_sides(prepares, Budget(0, least=2, most=2))
    assert called == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2", "a3", "b3", "c3"]
    assert [own.repeats for own in times] == [2, 2, 2]


# --base


def result(ratio: float | None, iqr: float = 0.0, repeats: int = 100, **changes: object) -> dict:
    row = {"op": "x", "rows": 1, "ratio": ratio, "median_ms": 1.0, "torch_median_ms": ratio, "repeats": repeats}
    return row | {"iqr_ms": iqr, "torch_iqr_ms": iqr} | changes


def gate(base: dict, tolerance: float = 0.1) -> Gate:
    return Gate(Path("base.json"), {(base["op"], base["rows"]): base}, tolerance)


@pytest.mark.parametrize(
    ("before", "now", "slower"),
    [
        (result(2.0), result(2.1), False),
        (result(2.0), result(1.85), False),  # 8%
        (result(2.0), result(1.75), True),  # 14%
        (result(2.0), result(1.75, iqr=0.7), False),  # 0.07 more are the spread of our median
        (result(2.0), result(1.75, iqr=0.7, repeats=1000), True),  # which is better known from more calls
        (result(2.0, iqr=0.7), result(1.75), False),
        (result(2.0, op="y"), result(1.0), False),  # not in the file
        (result(2.0), result(None), False),
    ],
)
def test_gate_finds_what_is_slower(before, now, slower):
    assert (gate(before).slower(now) is not None) == slower


def test_gate_measures_again_what_looks_slower():
    rows = iter([result(1.0), result(1.9), result(5.0)])
    assert gate(result(2.0)).settle(lambda: next(rows))["ratio"] == 1.9
    rows = iter([result(1.2), result(1.0), result(1.1), result(9.0)])
    assert gate(result(2.0)).settle(lambda: next(rows))["ratio"] == 1.2  # three times is enough
    rows = iter([result(1.9), result(9.0)])
    assert gate(result(2.0)).settle(lambda: next(rows))["ratio"] == 1.9


def saved(path: Path, capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    bench.main(parse("--rows", "1,4", "--ops", "verify_tokens,packed_linear", "--json", str(path), *arguments))
    capsys.readouterr()
    return json.loads(path.read_text())


def test_base_file(capsys, tmp_path):
    path = tmp_path / "base.json"
    report = saved(path, capsys)
    options = ["--rows", "1", "--ops", "packed_linear", "--base", str(path)]
    for factor, status, found in ((0.01, 0, "0 of 2"), (100, 3, "2 of 2")):  # the earlier run much slower, much faster
        changed = copy.deepcopy(report)
        for row in changed["results"]:
            row["ratio"] *= factor
        path.write_text(json.dumps(changed))
        assert bench.main(parse(*options)) == status
        printed = capsys.readouterr().out
        assert f"{found} rows slower than base.json by more than 10% and the spread of both runs" in printed
        assert ("| packed_linear qkv 64->128 |    1 |" in printed.split("rows slower")[1]) == (status == 3)


def test_base_of_another_kind_is_refused(capsys, tmp_path):
    path = tmp_path / "base.json"
    report = saved(path, capsys)
    for name, value in (("kind", LAYER), ("dtype", "float32"), ("shapes_name", "ZAYA1-8B")):
        path.write_text(json.dumps(report | {"settings": report["settings"] | {name: value}}))
        with pytest.raises(bench.BenchError, match=f"base.json: {name} must be .* got '{value}'"):
            bench.main(parse("--base", str(path)))
    del report["settings"]["kind"]  # an older file, of operators
    path.write_text(json.dumps(report))
    assert Gate.load(path, 0.1, report["settings"] | {"kind": OPERATORS}).base.keys() == {
        (name, T) for name in ("verify_tokens", "packed_linear qkv 64->128", "packed_linear o 64->64") for T in (1, 4)
    }


def test_base_without_these_rows_is_an_error(capsys, tmp_path):
    saved(tmp_path / "base.json", capsys)
    with pytest.raises(bench.BenchError, match="has none of this run's rows"):
        bench.main(parse("--rows", "3", "--ops", "verify_tokens", "--base", str(tmp_path / "base.json")))


@pytest.mark.parametrize(("text", "message"), [("{", "no JSON"), ("[]", "not a result"), (None, "No such file")])
def test_bad_base_file(tmp_path, text, message):
    path = tmp_path / "base.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(bench.BenchError, match=f"base.json: {message}"):
        bench.main(parse("--base", str(path)))


# --base REF


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of the Python files alone; to build it is to take the libraries that are in use."""
    if shutil.which("git") is None:
        pytest.skip("wants git")
    package = Path(blockdraft.__file__).parent
    root = tmp_path / "checkout"
    shutil.copytree(package, root / "python" / "blockdraft", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    git(root, "init", "--quiet")
    libraries = [*blockdraft.loaded_libraries.values(), Path(_host.__file__)]
    monkeypatch.setattr(revision, "repository", lambda: root)
    monkeypatch.setattr(
        revision, "build", lambda source, gpu: [shutil.copy(x, source / "python" / "blockdraft") for x in libraries]
    )
    monkeypatch.setattr(revision, "ROUNDS", 1)
    return root


SLOW_PYTORCH = """
import time
def _slow(*arguments, plain=VerifyTokens.pytorch):
    time.sleep(0.01)
    return plain(*arguments)
VerifyTokens.pytorch = staticmethod(_slow)
"""


def test_base_revision(capsys, checkout):
    """Where PyTorch is slow in the other revision, the operator stood better beside it."""
    subject = checkout / "python" / "blockdraft" / "bench" / "subjects" / "verify_tokens.py"
    subject.write_text(subject.read_text() + SLOW_PYTORCH)
    git(checkout, "add", "-A")
    git(checkout, "commit", "--quiet", "-m", "x")
    assert bench.main(parse("--rows", "2", "--ops", "verify_tokens", "--base", "HEAD")) == 3
    assert "1 of 1 rows slower than HEAD by more than 10%" in capsys.readouterr().out


def test_base_revision_that_is_none(checkout):
    with pytest.raises(bench.BenchError, match="--base nothing: is neither a file nor a git revision of"):
        bench.main(parse("--base", "nothing"))


def test_revision_that_cannot_run(checkout):
    (checkout / "python" / "blockdraft" / "bench" / "__main__.py").write_text("raise SystemExit(7)\n")
    git(checkout, "add", "-A")
    git(checkout, "commit", "--quiet", "-m", "x")
    with pytest.raises(bench.BenchError, match="--base: the bench of HEAD ended with status 7"):
        bench.main(parse("--base", "HEAD"))


def test_revision_that_does_not_build(tmp_path):
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"wants {tool}")
    (tmp_path / "CMakeLists.txt").write_text('message(FATAL_ERROR "no such luck")\n')
    with pytest.raises(bench.BenchError, match="(?s)does not build.*no such luck"):
        revision.build(tmp_path, gpu=False)


def test_options_for_the_other_revision():
    words = bench.options_of(
        parse("--layer", "--rows", "1,4", "--base", "HEAD", "--json", "x.json", "--dtype", "bfloat16")
    )
    again = argparse.ArgumentParser()
    bench.add_arguments(again)
    assert "bfloat16" not in words
    assert not {"--base", "--json"} & set(words)
    args = again.parse_args(words)
    assert (args.layer, args.rows, args.shapes, args.quick, args.threads) == (True, (1, 4), "tiny", True, 1)


def test_rounds_are_merged():
    rounds = []
    for ratio in (2.0, 4.0, 3.0):
        row = result(ratio, match=True, same_bits=ratio != 4.0)
        rounds.append({"results": [row], "read_samples_gb_s": [ratio]})
    report = revision.merged(rounds)
    (row,) = report["results"]
    assert (row["ratio"], row["match"], row["same_bits"]) == (3.0, True, False)
    assert row["ratio_spread"] == pytest.approx(1 / 3)
    assert report["read_limit_gb_s"] == 4.0
    assert gate(result(4.0)).slower(row) is None  # 33% slower, but the rounds differ as much
    assert gate(result(6.0)).slower(row) is not None


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.05", 0.05), ("25%", 0.25)])
def test_tolerance(text, share):
    assert parse("--tolerance", text).tolerance == pytest.approx(share)


def test_tolerance_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        parse("--tolerance", "0%")
    assert "must be positive" in capsys.readouterr().err


def test_one_thing_at_a_time(capsys):
    with pytest.raises(SystemExit):
        parse("--layer", "--model")
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "layers"), [("--layer", 1), ("--model", 2)])
def test_quantized_experts_match_and_read_less(capsys, tmp_path, option, layers):
    touched = []
    for experts in (None, "int8", "mxfp4", "fp8"):
        path = tmp_path / "result.json"
        options = ["--rows", "16", "--layers", "2", "--routing", "uniform", "--json", str(path)]
        status, rows, _ = run(capsys, option, *options, *(["--format", experts] if experts else []))
        assert status == 0
        assert rows[0]["match"] == rows[0]["same bits"] == "yes"
        assert ("experts" in rows[0]["op"]) == bool(experts)
        assert f"{experts} experts" in rows[0]["op"] or not experts
        touched.append(json.loads(path.read_text())["results"][0]["computed_touched_bytes"])
    weights, row_scales = layers * 4 * 3 * 64 * 64, layers * 4 * (2 * 64 + 64) * 4
    assert touched[0] - touched[1] == touched[0] - touched[3] == weights - row_scales
    assert touched[0] - touched[2] == weights * (2 - 17 / 32)


@pytest.mark.parametrize("experts", EXPERT_FORMATS)
def test_quantized_weights_are_the_same_values(experts):
    config = config_of(TINY, 2, 200, experts)
    weights = RandomWeights(config, torch.bfloat16)
    wide = weights.widened()
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        values, scales = weights.read(name), weights.read(name + "_scale")
        assert wide.read(name).dtype == torch.bfloat16
        expected = mx_values(values, scales) if experts == "mxfp4" else values.float() * scales
        assert torch.equal(wide.read(name).float(), expected)
        assert len(values.view(torch.uint8).unique()) > 100
        assert 0.5 < wide.read(name).float().std() * 64**0.5 < 2


def test_folder_with_experts_of_int8_stands_alone(capsys, short_generation, tmp_path):
    from blockdraft.quantize import quantize

    quantize(Path(blockdraft.bundled_model()), tmp_path / "nano8")
    status, rows, _ = run(capsys, "--model", str(tmp_path / "nano8"), "--rows", "1")
    assert status == 0
    assert rows[0]["transformers ms"] == "-"
    assert rows[0]["note"].endswith("transformers does not load quantized experts")


def test_one_routing_alone(capsys):
    for option in ("--layer", "--model"):
        _, rows, _ = run(capsys, option, "--rows", "1", "--routing", "random")
        assert ["random routing" in row["op"] for row in rows] == [True]


def test_default_rows():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.rows_of(parser.parse_args([])) == bench.rows_of(parser.parse_args(["--layer"])) == (1, 16, 32, 64)
    assert bench.rows_of(parser.parse_args(["--model"])) == (1, 16)
