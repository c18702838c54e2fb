"""`blockdraft roofline`: its figures against known tables, and what it does with bad arguments.

The tables were computed by hand for ZAYA1-8B on an H200: 4.8 TB/s at 80 %, 989 TFLOP/s at 50 %, 1 ms besides per
forward where that is said, a block of 16 rows. They are compared within half a unit of their last digit and a twentieth
more, because some were rounded twice.
"""

import argparse
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import blockdraft
from blockdraft import cli, roofline
from blockdraft.errors import ConfigError, RequestError
from blockdraft.model.config import ZayaConfig
from blockdraft.roofline import DEVICES, ZAYA1_8B, Case, Device, Gains, Layout, ModelCost, Yield, distinct_experts

ZAYA1_74B = ZayaConfig(
    vocab_size=262272,
    hidden_size=4096,
    num_hidden_layers=60,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    num_experts=24,
    moe_intermediate_size=4096,
    router_hidden_size=256,
    layer_types=("hybrid", "hybrid_sliding") * 30,
    rope_parameters={kind: {"rope_theta": 1e6, "partial_rotary_factor": 0.5} for kind in ("hybrid", "hybrid_sliding")},
    sliding_window=4097,
)
COST = ModelCost.of(ZAYA1_8B)
H200 = DEVICES["h200"]
WITH_OVERHEAD = replace(H200, overhead_seconds=1e-3)
LAYOUT = Layout.of("extra_first_mask", 16)
GROUPS = (0, 1, 3, 16)


def rounds_to(value: float, printed: str) -> bool:
    unit = 10.0 ** -len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.55 * unit


def plan_of(*arguments: str) -> roofline.Plan:
    parser = argparse.ArgumentParser()
    roofline.add_arguments(parser)
    return roofline.make_plan(parser.parse_args(arguments))


def run_json(capsys, *arguments: str) -> dict:
    assert cli.main(["roofline", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def speedup(accept: float, context: int, batch: int, block_length: int, groups: int) -> float:
    case = Case.of(COST, Layout.of("extra_first_mask", block_length), batch, context, groups)
    return case.gains(WITH_OVERHEAD).speedup(accept)


def test_parameters_of_known_models():
    layers, router_first = 40, COST.router - COST.router_states_scale
    assert COST.total == 8_840_488_784
    assert (COST.embedding, layers * COST.attention, COST.expert) == (537_133_056, 223_027_280, 12_582_912)
    assert router_first + (layers - 1) * COST.router == 26_439_424
    assert COST.scales == 659_456 + 165_888
    assert ModelCost.of(ZAYA1_74B).total == 74_793_953_144


def test_parameters_are_those_of_a_checkpoint():
    folder = blockdraft.bundled_model()
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    weights = sum(size for name, size in sizes.items() if not name.endswith("balancing_biases"))
    assert ModelCost.of(ZayaConfig.from_folder(folder)).total == weights


def test_a_sequence_reads_its_keys_and_values_up_to_the_window():
    assert COST.forward(3, 1000, 16, 16).kv_bytes == 3 * 1000 * 40_960
    windowed = ModelCost.of(ZAYA1_74B)
    assert windowed.forward(1, 1000, 1, 1).kv_bytes == 1000 * 60 * 1024
    assert windowed.forward(1, 10_000, 1, 1).kv_bytes == (30 * 10_000 + 30 * 4097) * 1024
    attended = windowed.forward(1, 10_000, 2, 1).flops - windowed.forward(1, 0, 2, 1).flops
    assert attended == 2 * (30 * 10_000 + 30 * 4097) * 4 * 2048  # q k and p v, two operations each


def test_operations_of_a_row():
    body = COST.forward(1, 0, 1, 0).flops
    assert body == pytest.approx(2 * 752.7e6, rel=5e-4)
    assert COST.forward(1, 0, 1, 1).flops - body == 2 * 537_133_056
    assert COST.forward(1, 1000, 1, 0).flops - body == 163_840 * 1000
    assert COST.forward(8, 4096, 17, 3).flops == 8 * COST.forward(1, 4096, 17, 3).flops


@pytest.mark.parametrize(
    ("rows", "experts", "expert_gb", "gb", "ratio"),
    [
        (1, "1", "1.01", "2.58", "1"),
        (4, "3.64", "3.66", "5.24", "2.03"),
        (8, "6.45", "6.50", "8.07", "3.13"),
        (16, "10.30", "10.4", "11.9", "4.63"),
        (17, "10.66", "10.7", "12.3", "4.77"),
        (32, "13.97", "14.1", "15.6", "6.06"),
        (64, "15.74", "15.9", "17.4", "6.75"),
        (128, "16.0", "16.1", "17.7", "6.85"),
        (272, "16.0", "16.1", "17.7", "6.85"),
    ],
)
def test_bytes_of_a_forward_without_context(rows, experts, expert_gb, gb, ratio):
    one, cost = COST.forward(1, 0, 1, 1), COST.forward(1, 0, rows, rows)
    assert rounds_to(cost.experts, experts)
    assert rounds_to(cost.expert_bytes / 1e9, expert_gb)
    assert rounds_to(cost.bytes / 1e9, gb)
    assert cost.bytes / one.bytes == pytest.approx(float(ratio), abs=0.011)  # of rounded gigabytes


@pytest.mark.parametrize(
    ("context", "batch", "ratios"),
    [
        (2048, 1, ("4.5", "5.9", "6.6", "6.7")),
        (2048, 4, ("3.2", "3.2", "3.2", "3.2")),
        (2048, 16, ("1.43", "1.43", "1.43", "5.0")),
        (2048, 64, ("1.02", "2.0", "3.3", "11.7")),
        (32768, 1, ("3.4", "4.3", "4.8", "4.9")),
        (32768, 16, ("1.17", "1.17", "1.8", "7.1")),
        (32768, 64, ("1.00", "1.2", "2.3", "9.2")),
    ],
)
def test_tokens_that_pay_for_a_forward(context, batch, ratios):
    """Here the late head's second read is left out, as in the table."""
    ar = H200.seconds(COST.forward(batch, context, 1, 1))
    for rows, ratio in zip((16, 32, 64, 272), ratios, strict=True):
        value = H200.seconds(COST.forward(batch, context, rows, min(rows, 32))) / ar
        assert rounds_to(value, ratio)


@pytest.mark.parametrize(
    ("accept", "context", "batch", "speedups"),
    [
        (0.9, 2048, 1, ("1.85", "1.73", "1.77", "2.34")),
        (0.9, 2048, 4, ("1.99", "2.10", "2.29", "3.34")),
        (0.9, 2048, 16, ("3.43", "3.64", "3.97", "1.98")),
        (0.9, 2048, 64, ("4.39", "3.27", "2.41", "0.80")),
        (0.9, 32768, 16, ("3.96", "4.26", "3.67", "1.26")),
        (0.9, 32768, 64, ("4.56", "4.45", "3.08", "0.92")),
        (0.8, 2048, 1, ("1.19", "1.09", "1.14", "1.39")),
        (0.8, 2048, 16, ("2.19", "2.30", "2.58", "1.18")),
        (0.8, 32768, 64, ("2.92", "2.81", "1.95", "0.55")),
        (0.97, 32768, 64, ("6.91", "8.35", "5.18", "1.45")),
    ],
)
def test_speedups(accept, context, batch, speedups):
    values = [speedup(accept, context, batch, 16, groups) for groups in GROUPS]
    assert values == pytest.approx([float(printed) for printed in speedups], abs=0.0055)


@pytest.mark.parametrize(
    ("accept", "context", "batch", "groups", "printed"),
    [(0.9, 2048, 16, 8, 4.08), (0.8, 2048, 1, 0, 1.37), (0.8, 2048, 16, 8, 2.98), (0.8, 32768, 64, 2, 2.96)],
)
def test_speedups_of_blocks_of_eight(accept, context, batch, groups, printed):
    assert speedup(accept, context, batch, 8, groups) == pytest.approx(printed, abs=0.0055)


@pytest.mark.parametrize(
    ("context", "batch", "speedups"),
    [
        (2048, 1, (1.11, 1.03, 1.00, 0.99)),
        (2048, 4, (2.04, 2.04, 2.04, 2.04)),
        (2048, 16, (4.63, 4.63, 4.63, 1.40)),
        (2048, 64, (3.44, 2.62, 2.11, 0.60)),
        (32768, 16, (5.82, 5.17, 3.97, 0.99)),
        (32768, 64, (5.72, 3.99, 3.07, 0.76)),
    ],
)
def test_seven_tokens_over_a_forward_that_always_hits(context, batch, speedups):
    cases = [Case.of(COST, LAYOUT, batch, context, groups) for groups in (1, 2, 3, 16)]
    values = [7 * H200.seconds(case.ar) / H200.seconds(case.verify) for case in cases]
    assert values == pytest.approx(speedups, abs=0.0055)


@pytest.mark.parametrize(("groups", "printed"), [(0, "4.57"), (1, "4.98"), (3, "5.46"), (5, "5.93"), (16, "8.15")])
def test_tokens_per_forward(groups, printed):
    assert rounds_to(Yield.of(0.9, LAYOUT, groups).tokens_per_forward, printed)


@pytest.mark.parametrize("block_length", [2, 5, 16, 32])
@pytest.mark.parametrize("accept", [0.0, 0.3, 0.5, 0.97, 1.0])
def test_yield_by_its_formulas(accept, block_length):
    tau = block_length if accept == 1 else (1 - accept**block_length) / (1 - accept)
    chances = [accept**i * (1 - accept) for i in range(block_length - 1)] + [accept ** (block_length - 1)]
    for groups in range(block_length + 1):
        result = Yield.of(accept, Layout.of("masks_after_anchor", block_length), groups)
        assert result.tau == pytest.approx(tau)
        assert result.miss == pytest.approx(1 - sum(sorted(chances)[::-1][:groups]), abs=1e-12)
        assert result.miss == pytest.approx(1 - sum(chances[i] for i in result.groups), abs=1e-12)
        assert len(set(result.groups)) == groups
        assert result.tokens == result.tau + result.miss
        assert result.tokens_per_forward == result.tokens / (1 + result.miss)


def test_the_likeliest_groups():
    assert Yield.of(0.9, LAYOUT, 3).groups == (15, 0, 1)
    assert Yield.of(0.5, LAYOUT, 3).groups == (0, 1, 2)
    assert Yield.of(0.5, Layout.of("extra_first_mask", 2), 1).groups == (1,)  # both lengths are equally likely


def test_distinct_experts_by_counting():
    torch.manual_seed(0)
    choices = torch.randint(6, (20_000, 9))
    counted = torch.nn.functional.one_hot(choices, 6).amax(1).sum(1).float()
    error = counted.std().item() / 20_000**0.5
    assert abs(distinct_experts(6, 9) - counted.mean().item()) < 4 * error
    assert distinct_experts(7, 1) == pytest.approx(1)
    assert distinct_experts(1, 5) == 1


def test_the_slower_of_reading_and_computing_decides():
    cost = COST.forward(64, 2048, 272, 32)
    device = Device("d", 1e12, 1e14, read_efficiency=0.5, compute_efficiency=0.25, overhead_seconds=0.5)
    assert device.seconds(cost) == cost.flops / 0.25e14 + 0.5
    assert replace(device, flops_per_second=1e18).seconds(cost) == cost.bytes / 0.5e12 + 0.5


@pytest.mark.parametrize("device", ["h200", "mi300x", "cpu"])
def test_at_the_break_even_acceptance_the_speedup_is_one(device):
    found = 0
    for context in (0, 2048, 32768):
        for batch in (1, 4, 16, 64, 256):
            for groups in (0, 1, 3, 8, 16):
                gains = Case.of(COST, LAYOUT, batch, context, groups).gains(DEVICES[device])
                found += check_break_even(gains)
    assert found > 20


def check_break_even(gains: Gains) -> bool:
    """Above it drafting pays, just below it does not."""
    even = gains.break_even()
    if even is None:
        assert gains.speedup(1.0) < 1
        return False
    assert gains.speedup(even) == pytest.approx(1, abs=1e-3)
    assert gains.speedup(even) >= 1 > gains.speedup(even - 1e-6)
    assert all(gains.speedup(even + (1 - even) * i / 50) >= 1 for i in range(1, 51))
    return True


def test_a_block_as_cheap_as_a_token_pays_at_any_acceptance():
    assert Gains(1.0, 1.0, 1.0, LAYOUT, 0).break_even() == 0
    assert Gains(1.0, 17.0, 1.0, LAYOUT, 0).break_even() is None


def test_stretches_of_paying_batches():
    batches, speedups = range(1, 8), [0.9, 1.1, 1.2, 1.0, 1.3, 0.5, 2.0]
    assert roofline.paying_batches(batches, speedups) == [(2, 3), (5, 5), (7, None)]
    assert roofline.paying_batches(batches, [1.5] * 7) == [(1, None)]
    assert roofline.paying_batches(batches, [0.5] * 7) == []


def test_where_drafting_stops_paying(capsys):
    results = run_json(capsys, "--batch", "267", "268", "--groups", "3", "--overhead", "1")
    (entry,) = results["paying"]
    assert entry == {"context": 2048, "groups": 3, "batches": [[1, 267]]}
    assert [step["speedup"] > 1 for step in results["steps"]] == [True, False]


def test_json(capsys):
    results = run_json(capsys, "--batch", "1", "64", "--context", "0", "2048", "--groups", "0", "2", "--accept", "0.8")
    assert results["note"] == "computed, not measured"
    assert results["layout"] == {"block_length": 16, "mask_rows": 16, "draft_rows": 17, "draft_tokens": 1}
    assert results["accept"] == 0.8
    assert results["model"]["name"] == "ZAYA1-8B"
    assert results["model"]["total"] == 8_840_488_784
    assert results["device"] == {
        "name": "h200",
        "bytes_per_second": 4.8e12,
        "flops_per_second": 989e12,
        "bytes_source": "data sheet",
        "flops_source": "data sheet",
        "read_efficiency": 0.8,
        "compute_efficiency": 0.5,
        "overhead_seconds": 0.0,
    }
    cases = [(context, batch) for context in (0, 2048) for batch in (1, 64)]
    kinds = [("ar", None), ("draft", None), ("verify", 0), ("verify", 2)]
    forwards = [(e["context"], e["batch"], e["forward"], e["groups"]) for e in results["forwards"]]
    assert forwards == [(*case, *kind) for case in cases for kind in kinds]
    rows = [(e["rows"], e["head_rows"]) for e in results["forwards"][:4]]
    assert rows == [(1, 1), (17, 17), (16, 16), (48, 32)]
    assert [(e["context"], e["batch"], e["groups"]) for e in results["steps"]] == [
        (*c, r) for c in cases for r in (0, 2)
    ]
    assert [(e["context"], e["groups"]) for e in results["paying"]] == [(0, 0), (0, 2), (2048, 0), (2048, 2)]


def test_entries_agree_with_each_other(capsys):
    results = run_json(capsys, "--batch", "64", "--overhead", "0.5")
    forwards = {(e["forward"], e["groups"]): e for e in results["forwards"]}
    ar, draft = forwards["ar", None], forwards["draft", None]
    for entry in results["forwards"]:
        parts = [entry[name] for name in ("expert_bytes", "dense_bytes", "head_bytes", "kv_bytes")]
        assert sum(parts) == pytest.approx(entry["bytes"])
        assert entry["seconds"] == max(entry["read_seconds"], entry["compute_seconds"]) + 0.5e-3
        assert entry["bound"] == ("read" if entry["read_seconds"] > entry["compute_seconds"] else "compute")
        assert entry["ar_forwards"] == entry["seconds"] / ar["seconds"]
    assert {entry["bound"] for entry in results["forwards"]} == {"read", "compute"}
    for step in results["steps"]:
        seconds = forwards["verify", step["groups"]]["seconds"] + step["miss"] * draft["seconds"]
        assert step["seconds"] == pytest.approx(seconds)
        assert step["tokens_per_second"] == pytest.approx(64 * (step["tokens_per_verify"] + step["miss"]) / seconds)
        assert step["ar_tokens_per_second"] == pytest.approx(64 / ar["seconds"])
        assert step["speedup"] == pytest.approx(step["tokens_per_second"] / step["ar_tokens_per_second"])


def test_text_says_that_it_is_computed(capsys):
    assert cli.main(["roofline", "--batch", "1", "--overhead", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("All figures are computed, not measured.\n")
    lines = [line.split() for line in text.splitlines()]
    assert ["2048", "1", "ar", "1", "1.00", "1.007", "0.08389", "2.665", "0.002915", "1.694", "read", "1.00"] in lines
    assert ["2048", "1", "1", "8.15", "0.79", "4.98", "8.73", "1024", "590", "1.74", "0.773"] in lines
    assert ["2048", "3", "1-267"] in lines


def test_text_of_what_never_pays_and_of_one_batch(capsys):
    slow = ["--bandwidth", "39.67", "--tflops", "0.4719", "--efficiency", "0.9", "0.5", "--batch", "8", "--groups"]
    assert cli.main(["roofline", *slow, "0", "3"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2048", "0", "2"] in lines
    assert ["2048", "3", "none"] in lines
    assert next(line for line in lines if line[:3] == ["2048", "8", "3"])[-1] == "never"


def test_options_replace_the_device_figures():
    options = ["--bandwidth", "100", "--tflops", "2", "--efficiency", "0.7", "0.6", "--overhead", "3"]
    assert plan_of("--device", "mi300x", *options).device == Device(
        "mi300x", 1e11, 2e12, "given", "given", 0.7, 0.6, 3e-3
    )
    assert plan_of("--device", "cpu", "--tflops", "2").device == replace(
        DEVICES["cpu"], flops_per_second=2e12, flops_source="given"
    )


def test_block_and_model():
    folder = blockdraft.bundled_model()
    plan = plan_of("--model", str(folder), "--block", "2")
    assert plan.cost == ModelCost.of(ZayaConfig.from_folder(folder))
    assert (plan.name, plan.layout, plan.groups) == (str(folder), Layout(2, 2, 3, 1), [0, 1])


def folder_with(tmp_path, **values) -> str:
    config = json.loads((blockdraft.bundled_model() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    return str(tmp_path)


def test_masks_after_the_anchor(tmp_path):
    plan = plan_of("--model", folder_with(tmp_path, draft_layout="masks_after_anchor", block_length=8))
    case = plan.case(1, 0, 2)
    assert (case.verify.rows, case.verify.head_rows, case.draft.rows) == (8 + 2 * 7, 8 + 7, 8)


def test_the_anchor_in_the_block(tmp_path):
    """A DRAFT commits nothing, and there are no groups."""
    folder = folder_with(tmp_path, draft_layout="anchor_in_block", mask_parent="previous", block_length=8)
    plan = plan_of("--model", folder)
    case = plan.case(1, 0, 0)
    assert (plan.groups, case.verify.rows, case.draft.rows, case.draft.head_rows) == ([0], 8, 8, 8)
    result = Yield.of(0.9, plan.layout, 0)
    assert (result.tokens, result.tokens_per_forward) == (result.tau, result.tau / 2)
    with pytest.raises(RequestError, match="--groups must be 0 with draft_layout 'anchor_in_block', got 1"):
        plan_of("--model", folder, "--groups", "1")


def test_measured_rates():
    device = roofline.measured_device(read_bytes=1 << 20, width=64)
    assert 1e8 < device.bytes_per_second < 1e13
    assert 1e6 < device.flops_per_second < 1e15
    assert (device.read_efficiency, device.compute_efficiency, device.overhead_seconds) == (1, 1, 0)


def test_matmul_rate_is_operations_over_the_best_time(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])  # the first product does not count
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(clock))
    assert roofline.matmul_flops(8, repeats=2) == 2 * 8**3 / 2


def test_measured_says_which_figures_are(capsys, monkeypatch):
    measure = roofline.measured_device
    monkeypatch.setattr(roofline, "measured_device", lambda: measure(1 << 20, 64))
    both = "computed, not measured, except the read bandwidth and the bfloat16 operations per second of this machine"
    results = run_json(capsys, "--device", "measured", "--batch", "1")
    assert results["note"] == both
    assert results["device"]["name"] == "this machine"
    results = run_json(capsys, "--device", "measured", "--batch", "1", "--tflops", "1")
    assert results["note"] == "computed, not measured, except the read bandwidth of this machine"
    given = ["--tflops", "1", "--bandwidth", "10"]
    assert run_json(capsys, "--device", "measured", "--batch", "1", *given)["note"] == "computed, not measured"


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml")])
def test_plot(capsys, tmp_path, suffix, magic):
    path = tmp_path / f"speedup{suffix}"
    assert cli.main(["roofline", "--batch", "1", "--context", "0", "2048", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(magic)
    assert "computed, not measured" in capsys.readouterr().out


def test_plot_draws_the_speedups(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    plan = plan_of("--context", "2048", "32768", "--groups", "0", "3", "--overhead", "1")
    roofline.plot(plan, tmp_path / "x.png")
    (figure,) = figures
    assert "computed, not measured" in figure.get_suptitle()
    for axes, context in zip(figure.axes, (2048, 32768), strict=True):
        for line, groups in zip(axes.lines, (0, 3), strict=False):
            points = dict(zip(*line.get_data(), strict=True))
            assert points[64] == pytest.approx(speedup(0.9, context, 64, 16, groups))


def test_plot_without_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["roofline", "--batch", "1"]) == 0  # nothing else needs it
    capsys.readouterr()
    assert cli.main(["roofline", "--batch", "1", "--plot", str(tmp_path / "x.png")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--plot: needs the package matplotlib" in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "0"],
        ["--batch", "4", "-1"],
        ["--context", "-1"],
        ["--block", "1"],
        ["--block", "33"],
        ["--groups", "-1"],
        ["--groups", "17"],
        ["--accept", "1.01"],
        ["--accept", "-0.1"],
        ["--accept", "nan"],
        ["--bandwidth", "0"],
        ["--tflops", "inf"],
        ["--efficiency", "0.8", "1.1"],
        ["--efficiency", "0", "0.5"],
        ["--overhead", "-1"],
        ["--plot", "speedup.pdf"],
        ["--plot", "no/such/folder/speedup.png"],
    ],
    ids=" ".join,
)
def test_bad_arguments_are_a_message_and_status_2(capsys, arguments):
    assert cli.main(["roofline", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"blockdraft: {arguments[0]}")
    assert "must be" in captured.err or "cannot be written" in captured.err or "must end in" in captured.err


def test_bad_arguments_are_request_errors():
    with pytest.raises(RequestError, match="--groups must be from 0 to 4, the rows of a block, got 5"):
        plan_of("--block", "4", "--groups", "5")
    with pytest.raises(ConfigError, match="no/such/folder"):
        plan_of("--model", "no/such/folder")


@pytest.mark.parametrize("arguments", [["--device", "h100"], ["--batch", "x"], ["--efficiency", "0.8"]], ids=" ".join)
def test_wrong_usage_is_status_2(capsys, arguments):
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(["roofline", *arguments])
    assert arguments[0] in capsys.readouterr().err
