"""`blockdraft roofline`: what a step must at least cost, and whether drafting can pay, from shapes and two rates.

Everything here is computed. Weights are read once per forward, of the experts those that the rows choose, keys and
values once per sequence; a weight is one multiply-add per row. Formulas and their limits: docs/roofline.md.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from blockdraft.bench.measure import read_bandwidth
from blockdraft.errors import RequestError
from blockdraft.model.config import RANGES, ZayaConfig
from blockdraft.model.expert_formats import expert_bytes
from blockdraft.steps import AR, DRAFT, VERIFY

ELEMENT_BYTES = 2  # bfloat16
ZAYA1_8B = ZayaConfig(
    vocab_size=262272,
    hidden_size=2048,
    num_hidden_layers=40,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    num_experts=16,
    moe_intermediate_size=2048,
    router_hidden_size=256,
    layer_types=("hybrid",) * 40,
    rope_parameters={"hybrid": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}},
)
DEFAULT_GROUPS = (0, 1, 3)
SCANNED_BATCHES = range(1, 1025)  # 1024 sequences of 2,048 tokens of ZAYA1-8B are 86 GB of keys and values
PLOTTED_BATCHES = [2**i for i in range(11)]
MOST_SEQUENCES, MOST_TOKENS = 1 << 20, 1 << 30
LEAST_RATE, MOST_RATE = 1e-3, 1e9  # GB/s, TFLOP/s, ms: wide enough for anything, and nothing overflows
ACCEPT_GRID = 256  # acceptances tried before bisection
MEASURED = "measured"
MEASURED_BYTES = 1 << 30  # far above any cache
MEASURED_WIDTH = 2048  # the 8B model's hidden size; a product of 17 GFLOP
REPEATS = 5
PLOT_SUFFIXES = (".png", ".svg")
FORWARD_HEADINGS = (
    *("context", "batch", "forward", "groups", "rows", "experts", "expert GB", "KV GB", "GB"),
    *("TFLOP", "ms", "bound", "AR forwards"),
)
STEP_HEADINGS = (
    *("context", "batch", "groups", "tokens/verify", "miss", "tokens/forward"),
    *("ms", "tokens/s", "AR tokens/s", "speedup", "break-even acceptance"),
)
PAYING_HEADINGS = ("context", "groups", "batches")
ASSUMPTIONS = """\
experts: distinct ones per layer, were routing uniform and independent; rows of one text choose fewer. Late head: with
groups, VERIFY reads the head once for its causal rows and once for the group that was hit. Not counted: activations,
writes, whether it fits into the memory. Groups follow the accept lengths that are likeliest at the acceptance."""


@dataclass(frozen=True)
class Device:
    """Rates of a machine. The defaults of the efficiencies are what good kernels reach of a data sheet.

    Attributes:
        bytes_per_second: Read from memory.
        flops_per_second: In bfloat16, dense, a multiply-add being two.
        overhead_seconds: What a forward takes besides.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    bytes_source: str = "data sheet"
    flops_source: str = "data sheet"
    read_efficiency: float = 0.8
    compute_efficiency: float = 0.5
    overhead_seconds: float = 0.0

    def read_seconds(self, cost: "Forward") -> float:
        return cost.bytes / (self.bytes_per_second * self.read_efficiency)

    def compute_seconds(self, cost: "Forward") -> float:
        return cost.flops / (self.flops_per_second * self.compute_efficiency)

    def seconds(self, cost: "Forward") -> float:
        """The floor: reading and computing overlap, the overhead does not."""
        return max(self.read_seconds(cost), self.compute_seconds(cost)) + self.overhead_seconds


# cpu: a server with one socket of 32 cores. Eight channels of DDR5-4800 at 8 bytes are 307.2 GB/s; 32 cores at 2.5 GHz
# with two 16-lane float32 multiply-adds per cycle, in which the package's AVX-512 kernels work, are 5.12 TFLOP/s.
DEVICES = {
    "h200": Device("h200", 4.8e12, 989e12),
    "mi300x": Device("mi300x", 5.3e12, 1307e12),
    "cpu": Device("cpu", 307.2e9, 5.12e12, "8 channels of DDR5-4800", "32 cores, float32 AVX-512 at 2.5 GHz"),
}


@dataclass(frozen=True)
class Forward:
    """What one forward reads and computes.

    Attributes:
        rows: Of all sequences together.
        experts: Expected distinct experts per layer.
        dense_bytes: Attention, router, norms and residual scales.
    """

    rows: int
    head_rows: int
    experts: float
    expert_bytes: float
    dense_bytes: int
    head_bytes: int
    kv_bytes: int
    flops: int

    @property
    def bytes(self) -> float:
        return self.expert_bytes + self.dense_bytes + self.head_bytes + self.kv_bytes


@dataclass(frozen=True)
class ModelCost:
    """Parameters of a model by part, and its forwards.

    Attributes:
        attention: Per layer, projections and convolutions.
        router: Per layer; the first one has no ``router_states_scale`` and R less.
        expert: One expert of one layer.
        scales: Norms, residual scales and biases of the whole model.
        embedding: The tied LM head, too.
        kv_width: Elements of keys and values per token and layer.
        query_width: Elements of a row's queries per layer.
        windows: Layers by the tokens that they see; 0 for all.
        expert_element_bytes: Of an expert's weight with its part of a scale.
    """

    layers: int
    num_experts: int
    attention: int
    router: int
    router_states_scale: int
    expert: int
    scales: int
    embedding: int
    kv_width: int
    query_width: int
    windows: dict[int, int]
    expert_element_bytes: float = ELEMENT_BYTES

    @staticmethod
    def of(config: ZayaConfig) -> "ModelCost":
        hidden, width, layers = config.hidden_size, config.head_dim, config.num_hidden_layers
        router, channels, kv_heads = config.router_hidden_size, config.conv_channels, config.num_key_value_heads
        queries = config.num_attention_heads * width
        projections = hidden * (2 * queries + 2 * kv_heads * width)  # q and o; k and both halves of v
        convolutions = channels * (2 + 1) + channels * (2 * width + 1)  # two taps and a bias; depthwise, grouped
        mlp = 2 * router * (router + 1) + router * (config.num_experts + 1)  # one more class, which skips
        return ModelCost(
            layers=layers,
            num_experts=config.num_experts,
            attention=projections + convolutions + kv_heads,  # and a temperature per head
            router=(hidden + 1) * router + router + mlp + router,  # down projection, norm, MLP, router_states_scale
            router_states_scale=router,
            expert=3 * hidden * config.moe_intermediate_size,
            scales=layers * (2 + 8) * hidden + 3 * hidden,  # 2 norms and 2 merges of 4 per layer; embedding 2, norm 1
            embedding=config.vocab_size * hidden,
            kv_width=2 * kv_heads * width,
            query_width=queries,
            windows=dict(Counter(map(config.window, range(layers)))),
            expert_element_bytes=expert_bytes(config.quantized_experts, ELEMENT_BYTES),
        )

    @property
    def dense(self) -> int:
        """Parameters that every forward reads, without the head."""
        return self.layers * (self.attention + self.router) - self.router_states_scale + self.scales

    @property
    def total(self) -> int:
        return self.dense + self.layers * self.num_experts * self.expert + self.embedding

    def keys_seen(self, context: int) -> int:
        """Tokens that a row sees, summed over the layers."""
        return sum(layers * (min(context, window) if window else context) for window, layers in self.windows.items())

    def forward(self, batch: int, context: int, rows: int, head_rows: int, head_reads: int = 1) -> Forward:
        """A forward of `rows` rows for each of `batch` sequences, `head_rows` of which go through the LM head."""
        experts, seen = distinct_experts(self.num_experts, batch * rows), self.keys_seen(context)
        row_flops = 2 * self.layers * (self.attention + self.router + self.expert) + 4 * self.query_width * seen
        return Forward(
            rows=batch * rows,
            head_rows=batch * head_rows,
            experts=experts,
            expert_bytes=self.expert_element_bytes * self.layers * experts * self.expert,
            dense_bytes=ELEMENT_BYTES * self.dense,
            head_bytes=ELEMENT_BYTES * self.embedding * head_reads,
            kv_bytes=ELEMENT_BYTES * batch * self.kv_width * seen,
            flops=batch * (rows * row_flops + head_rows * 2 * self.embedding),
        )


def distinct_experts(experts: int, rows: int) -> float:
    """Expected number of experts that at least one of the rows chooses, each uniformly and on its own."""
    return experts * (1 - (1 - 1 / experts) ** rows)


def accept_lengths(accept: float, block_length: int) -> list[float]:
    """Probabilities that 0, 1, ... block_length - 1 drafts hold, each with `accept` once those before it do."""
    return [accept**i * (1 - accept) for i in range(block_length - 1)] + [accept ** (block_length - 1)]


@dataclass(frozen=True)
class Layout:
    """Rows of the forwards that draft.

    Attributes:
        mask_rows: Of a group.
        draft_rows: Of a DRAFT.
        draft_tokens: That a DRAFT commits.
    """

    block_length: int
    mask_rows: int
    draft_rows: int
    draft_tokens: int = 1

    @staticmethod
    def of(name: str, block_length: int) -> "Layout":
        """Of a `draft_layout`. With the anchor in the block a DRAFT is the block alone, whose rows are never kept."""
        if name == "anchor_in_block":
            return Layout(block_length, 0, block_length, 0)
        masks = block_length if name == "extra_first_mask" else block_length - 1
        return Layout(block_length, masks, 1 + masks)


@dataclass(frozen=True)
class Yield:
    """What a VERIFY brings, and the DRAFT after a miss.

    Attributes:
        tau: Expected tokens it commits, the anchor included.
        groups: Accept lengths that its mask groups follow, likeliest first.
        miss: Probability that none of the groups fits, so that a DRAFT must follow.
        tokens: Expected tokens of both together.
    """

    tau: float
    groups: tuple[int, ...]
    miss: float
    tokens: float

    @staticmethod
    def of(accept: float, layout: Layout, groups: int) -> "Yield":
        chances = accept_lengths(accept, layout.block_length)
        # Of equal chances the longer length: at acceptance 1/2 the last two are equal.
        followed = tuple(sorted(range(len(chances)), key=lambda i: (-chances[i], -i))[:groups])
        tau = math.fsum((i + 1) * chance for i, chance in enumerate(chances))
        miss = math.fsum(chance for i, chance in enumerate(chances) if i not in followed)
        return Yield(tau, followed, miss, tau + miss * layout.draft_tokens)

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / (1 + self.miss)


@dataclass(frozen=True)
class Case:
    """A batch of equal sequences, decoded in one way or the other."""

    ar: Forward
    verify: Forward
    draft: Forward
    layout: Layout
    groups: int

    @staticmethod
    def of(cost: ModelCost, layout: Layout, batch: int, context: int, groups: int) -> "Case":
        block, masks = layout.block_length, layout.mask_rows
        hit_rows, reads = (masks, 2) if groups else (0, 1)
        return Case(
            cost.forward(batch, context, 1, 1),
            cost.forward(batch, context, block + groups * masks, block + hit_rows, reads),
            cost.forward(batch, context, layout.draft_rows, layout.draft_rows),
            layout,
            groups,
        )

    def gains(self, device: Device) -> "Gains":
        ar, verify, draft = (device.seconds(cost) for cost in (self.ar, self.verify, self.draft))
        return Gains(ar, verify, draft, self.layout, self.groups)


@dataclass(frozen=True)
class Gains:
    """A case in seconds per forward, and what drafting gains at a given acceptance."""

    ar: float
    verify: float
    draft: float
    layout: Layout
    groups: int

    def step_seconds(self, result: Yield) -> float:
        """A VERIFY, and a DRAFT as often as it misses."""
        return self.verify + result.miss * self.draft

    def speedup(self, accept: float) -> float:
        """Tokens per second over those of one token per forward."""
        result = Yield.of(accept, self.layout, self.groups)
        return result.tokens * self.ar / self.step_seconds(result)

    def break_even(self) -> float | None:
        """The acceptance from which on drafting is no slower; None where even acceptance 1 does not suffice."""
        if self.speedup(1.0) < 1:
            return None
        # From above, because with groups the speedup first falls: at acceptance 0 the group of length 0 always fits.
        losing = (i for i in reversed(range(ACCEPT_GRID)) if self.speedup(i / ACCEPT_GRID) < 1)
        last = next(losing, None)
        return 0.0 if last is None else self._bisect(last / ACCEPT_GRID, (last + 1) / ACCEPT_GRID)

    def _bisect(self, low: float, high: float) -> float:
        for _ in range(40):  # what a float resolves of 1 / ACCEPT_GRID, nearly
            middle = (low + high) / 2
            low, high = (middle, high) if self.speedup(middle) < 1 else (low, middle)
        return high


def paying_batches(batches: Sequence[int], speedups: Sequence[float]) -> list[tuple[int, int | None]]:
    """First and last batch of each stretch with a speedup over 1; no last where the scan ended within it."""
    stretches: list[tuple[int, int | None]] = []
    first = None
    for batch, speedup in zip(batches, speedups, strict=True):
        if speedup > 1:
            first = first or batch
        elif first:
            stretches.append((first, batch - 1))
            first = None
    return [*stretches, (first, None)] if first else stretches


def matmul_flops(width: int, repeats: int = REPEATS) -> float:
    """Operations per second of the fastest of `repeats` products of bfloat16 matrices ``[width, width]`` by torch."""
    left, right = (torch.randn(width, width).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(1 + repeats):  # the first one is slower: threads start, code is generated
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds[1:])


def measured_device(read_bytes: int = MEASURED_BYTES, width: int = MEASURED_WIDTH) -> Device:
    """This machine's CPU and memory, measured now; both rates are reached ones, so nothing is taken off."""
    threads = torch.get_num_threads()
    bandwidth = read_bandwidth(read_bytes, threads) * 1e9
    return Device(
        "this machine",
        bandwidth,
        matmul_flops(width),
        f"{MEASURED} now, threads: {threads}",
        f"{MEASURED} now, torch's bfloat16 product, threads: {threads}",
        read_efficiency=1.0,
        compute_efficiency=1.0,
    )


@dataclass(frozen=True)
class Plan:
    """What is asked: a model on a device, and the cases to look at."""

    name: str
    cost: ModelCost
    device: Device
    layout: Layout
    accept: float
    batches: Sequence[int]
    contexts: Sequence[int]
    groups: Sequence[int]

    def case(self, batch: int, context: int, groups: int) -> Case:
        return Case.of(self.cost, self.layout, batch, context, groups)

    def speedup(self, batch: int, context: int, groups: int) -> float:
        return self.case(batch, context, groups).gains(self.device).speedup(self.accept)


def forward_entry(plan: Plan, cost: Forward, ar_seconds: float) -> dict[str, Any]:
    read, compute = plan.device.read_seconds(cost), plan.device.compute_seconds(cost)
    seconds = plan.device.seconds(cost)
    return {
        "rows": cost.rows,
        "head_rows": cost.head_rows,
        "experts": cost.experts,
        "expert_bytes": cost.expert_bytes,
        "dense_bytes": cost.dense_bytes,
        "head_bytes": cost.head_bytes,
        "kv_bytes": cost.kv_bytes,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "read_seconds": read,
        "compute_seconds": compute,
        "seconds": seconds,
        "bound": "read" if read >= compute else "compute",
        "ar_forwards": seconds / ar_seconds,
    }


def forward_entries(plan: Plan, context: int, batch: int) -> list[dict[str, Any]]:
    """AR, DRAFT, and VERIFY with each number of groups."""
    cases = [plan.case(batch, context, groups) for groups in plan.groups]
    kinds: list[tuple[str, int | None, Forward]] = [(AR, None, cases[0].ar), (DRAFT, None, cases[0].draft)]
    kinds += [(VERIFY, case.groups, case.verify) for case in cases]
    ar_seconds = plan.device.seconds(cases[0].ar)
    return [
        {"context": context, "batch": batch, "forward": kind, "groups": groups, **forward_entry(plan, cost, ar_seconds)}
        for kind, groups, cost in kinds
    ]


def step_entry(plan: Plan, context: int, batch: int, groups: int) -> dict[str, Any]:
    """A VERIFY with this many groups, and a DRAFT where it misses."""
    gains = plan.case(batch, context, groups).gains(plan.device)
    result = Yield.of(plan.accept, plan.layout, groups)
    seconds = gains.step_seconds(result)
    return {
        "context": context,
        "batch": batch,
        "groups": groups,
        "group_lengths": list(result.groups),
        "tokens_per_verify": result.tau,
        "miss": result.miss,
        "tokens_per_forward": result.tokens_per_forward,
        "seconds": seconds,
        "tokens_per_second": batch * result.tokens / seconds,
        "ar_tokens_per_second": batch / gains.ar,
        "speedup": gains.speedup(plan.accept),
        "break_even_accept": gains.break_even(),
    }


def paying_entry(plan: Plan, context: int, groups: int) -> dict[str, Any]:
    speedups = [plan.speedup(batch, context, groups) for batch in SCANNED_BATCHES]
    return {"context": context, "groups": groups, "batches": paying_batches(SCANNED_BATCHES, speedups)}


def collect(plan: Plan) -> dict[str, Any]:
    """Everything as one JSON-ready object; units are in the names, otherwise counts."""
    cost, cases = plan.cost, list(product(plan.contexts, plan.batches))
    return {
        "note": note(plan),
        "model": {"name": plan.name, **asdict(cost), "dense": cost.dense, "total": cost.total},
        "device": asdict(plan.device),
        "layout": asdict(plan.layout),
        "accept": plan.accept,
        "scanned_batches": [SCANNED_BATCHES[0], SCANNED_BATCHES[-1]],
        "forwards": [entry for context, batch in cases for entry in forward_entries(plan, context, batch)],
        "steps": [step_entry(plan, *case, groups) for case in cases for groups in plan.groups],
        "paying": [paying_entry(plan, *pair) for pair in product(plan.contexts, plan.groups)],
    }


def note(plan: Plan) -> str:
    """Which figures are computed: all but rates that were measured."""
    device = plan.device
    rates = {"read bandwidth": device.bytes_source, "bfloat16 operations per second": device.flops_source}
    measured = [rate for rate, source in rates.items() if source.startswith(MEASURED)]
    return "computed, not measured" + (f", except the {' and the '.join(measured)} of this machine" if measured else "")


def aligned(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with numbers to the right."""
    table = [headings, *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in table)


def digits(value: float) -> str:
    """Four of them, as sizes differ by many powers of ten."""
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def forward_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{entry['context']}",
        f"{entry['batch']}",
        entry["forward"],
        "" if entry["groups"] is None else f"{entry['groups']}",
        f"{entry['rows']}",
        f"{entry['experts']:.2f}",
        digits(entry["expert_bytes"] / 1e9),
        digits(entry["kv_bytes"] / 1e9),
        digits(entry["bytes"] / 1e9),
        digits(entry["flops"] / 1e12),
        digits(entry["seconds"] * 1e3),
        entry["bound"],
        f"{entry['ar_forwards']:.2f}",
    )


def step_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    even = entry["break_even_accept"]
    return (
        f"{entry['context']}",
        f"{entry['batch']}",
        f"{entry['groups']}",
        f"{entry['tokens_per_verify']:.2f}",
        f"{entry['miss']:.2f}",
        f"{entry['tokens_per_forward']:.2f}",
        digits(entry["seconds"] * 1e3),
        f"{entry['tokens_per_second']:.0f}",
        f"{entry['ar_tokens_per_second']:.0f}",
        f"{entry['speedup']:.2f}",
        "never" if even is None else f"{even:.3f}",
    )


def paying_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    return f"{entry['context']}", f"{entry['groups']}", ", ".join(map(stretch_text, entry["batches"])) or "none"


def stretch_text(stretch: tuple[int, int | None]) -> str:
    first, last = stretch
    return f"{first}+" if last is None else f"{first}" if first == last else f"{first}-{last}"


def device_line(device: dict[str, Any]) -> str:
    read, compute = digits(device["bytes_per_second"] / 1e9), digits(device["flops_per_second"] / 1e12)
    return (
        f"{device['name']}: {read} GB/s ({device['bytes_source']}) at {device['read_efficiency']:.0%}, "
        f"{compute} TFLOP/s ({device['flops_source']}) at {device['compute_efficiency']:.0%}, "
        f"{device['overhead_seconds'] * 1e3:g} ms besides per forward"
    )


def as_text(results: dict[str, Any]) -> str:
    model, layout, last = results["model"], results["layout"], results["scanned_batches"][1]
    return "\n".join(
        [
            f"All figures are {results['note']}.",
            f"{model['name']}: {model['total']:,} parameters in bfloat16",
            device_line(results["device"]),
            "",
            "One forward, at least",
            aligned(FORWARD_HEADINGS, map(forward_cells, results["forwards"])),
            "",
            f"One step: VERIFY of {layout['block_length']} rows and its groups of {layout['mask_rows']}, after a miss "
            f"DRAFT of {layout['draft_rows']}; a draft holds with probability {results['accept']:g}",
            aligned(STEP_HEADINGS, map(step_cells, results["steps"])),
            "",
            f"Batches at which it is faster than AR (1 to {last} looked at)",
            aligned(PAYING_HEADINGS, map(paying_cells, results["paying"])),
            "",
            ASSUMPTIONS,
        ]
    )


def figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # here, because nothing else needs it
    except ImportError as error:
        raise RequestError("--plot: needs the package matplotlib, which is not installed") from error
    return Figure


def plot(plan: Plan, path: Path) -> None:
    """Speedup over batch, a panel per context and a line per number of groups.

    Raises:
        RequestError: matplotlib is missing, or the file cannot be written.
    """
    figure = figure_class()(figsize=(1 + 4 * len(plan.contexts), 4), layout="constrained")
    panels = figure.subplots(1, len(plan.contexts), squeeze=False, sharey=True)[0]
    for axes, context in zip(panels, plan.contexts, strict=True):
        for groups in plan.groups:
            speedups = [plan.speedup(batch, context, groups) for batch in PLOTTED_BATCHES]
            axes.plot(PLOTTED_BATCHES, speedups, label=f"groups: {groups}")
        axes.axhline(1, color="black", linestyle="--", linewidth=0.8, label="AR")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="sequences", ylabel="speedup over AR", title=f"{context} cached tokens each")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"{plan.name} on {plan.device.name}, acceptance {plan.accept:g}\n{note(plan)}", fontsize="medium")
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise RequestError(f"--plot: {path}: cannot be written: {error.strerror}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `blockdraft roofline`."""
    add = parser.add_argument
    add("--device", choices=(*DEVICES, MEASURED), default="h200", help="measured: this CPU; default: %(default)s")
    add("--model", type=Path, metavar="DIR", help="folder with a config.json (default: the shape of ZAYA1-8B)")
    add("--batch", type=int, nargs="+", default=[1, 4, 16, 64], metavar="B", help="sequences; default: 1 4 16 64")
    add("--context", type=int, nargs="+", default=[2048], metavar="L", help="cached tokens of each; default: 2048")
    add("--block", type=int, metavar="N", help="rows of a verified block; default: the model's block_length")
    add("--groups", type=int, nargs="+", metavar="R", help="mask groups in a verifying forward; default: 0 1 3")
    add("--accept", type=float, default=0.9, metavar="A", help="probability that a draft holds; default: %(default)s")
    add("--bandwidth", type=float, metavar="GB/S", help="instead of the device's")
    add("--tflops", type=float, metavar="TFLOP/S", help="instead of the device's")
    shares = "shares of both rates that are reached; default: 0.8 0.5, of measured rates 1 1"
    add("--efficiency", type=float, nargs=2, metavar=("READ", "COMPUTE"), help=shares)
    add("--overhead", type=float, default=0.0, metavar="MS", help="per forward, besides; default: %(default)s")
    add("--json", action="store_true", help="one object on standard output")
    add("--plot", type=Path, metavar="FILE", help="draw speedup over batch as .png or .svg; needs matplotlib")


def check(name: str, values: Iterable[float | None], low: float, high: float, wanted: str) -> None:
    for value in values:
        if value is not None and not low <= value <= high:  # also refuses NaN
            raise RequestError(f"{name} must be {wanted}, got {value}")


def check_arguments(args: argparse.Namespace) -> None:
    shortest, longest = RANGES["block_length"]
    check("--block", [args.block], shortest, longest, f"from {shortest} to {longest}")
    check("--batch", args.batch, 1, MOST_SEQUENCES, f"from 1 to {MOST_SEQUENCES}")
    check("--context", args.context, 0, MOST_TOKENS, f"from 0 to {MOST_TOKENS}")
    check("--accept", [args.accept], 0, 1, "a probability")
    check("--bandwidth", [args.bandwidth], LEAST_RATE, MOST_RATE, f"from {LEAST_RATE:g} to {MOST_RATE:g}")
    check("--tflops", [args.tflops], LEAST_RATE, MOST_RATE, f"from {LEAST_RATE:g} to {MOST_RATE:g}")
    check("--efficiency", args.efficiency or [], 0.001, 1, "two shares from 0.001 to 1")
    check("--overhead", [args.overhead], 0, MOST_RATE, f"from 0 to {MOST_RATE:g}")
    if args.plot and args.plot.suffix not in PLOT_SUFFIXES:
        raise RequestError(f"--plot must end in {' or '.join(PLOT_SUFFIXES)}, got {str(args.plot)!r}")
    if args.plot:
        figure_class()  # rather before a measurement than after it


def chosen_device(args: argparse.Namespace) -> Device:
    device = measured_device() if args.device == MEASURED else DEVICES[args.device]
    if args.bandwidth:
        device = replace(device, bytes_per_second=args.bandwidth * 1e9, bytes_source="given")
    if args.tflops:
        device = replace(device, flops_per_second=args.tflops * 1e12, flops_source="given")
    if args.efficiency:
        device = replace(device, read_efficiency=args.efficiency[0], compute_efficiency=args.efficiency[1])
    return replace(device, overhead_seconds=args.overhead / 1e3)


def make_plan(args: argparse.Namespace) -> Plan:
    check_arguments(args)
    config = ZayaConfig.from_folder(args.model) if args.model else ZAYA1_8B
    block_length = args.block or config.block_length
    layout = Layout.of(config.draft_layout, block_length)
    most = block_length if layout.mask_rows else 0
    wanted = f"from 0 to {most}, the rows of a block" if most else "0 with draft_layout 'anchor_in_block'"
    check("--groups", args.groups or [], 0, most, wanted)
    return Plan(
        name=str(args.model) if args.model else "ZAYA1-8B",
        cost=ModelCost.of(config),
        device=chosen_device(args),
        layout=layout,
        accept=args.accept,
        batches=args.batch,
        contexts=args.context,
        groups=args.groups or [groups for groups in DEFAULT_GROUPS if groups <= most],
    )


def main(args: argparse.Namespace) -> int:
    """Computes and prints. Raises RequestError for an argument, ConfigError for a model, that it cannot use."""
    plan = make_plan(args)
    if args.plot:
        plot(plan, args.plot)
    results = collect(plan)
    print(json.dumps(results, indent=2) if args.json else as_text(results))
    return 0
