"""Results as JSON and as a table in Markdown."""

import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import blockdraft
from blockdraft.bench.measure import Measured
from blockdraft.bench.subject import Case
from blockdraft.errors import BlockdraftError

BUSY_LOAD = 0.5  # one minute's average; an idle machine is below
STEADY = 0.8  # least share of the best read measurement that the worst must reach
COLD_SHARE = 0.75  # of the touched bytes; with less, a rate says nothing about memory
HEADINGS = (
    *("op", "rows", "blockdraft ms", "IQR", "PyTorch ms", "PyTorch / blockdraft"),
    *("MB touched", "GB/s", "% of read limit", "match", "same bits", "note"),
)
TEXTS = {"match", "same bits", "note"}  # headings of what is no number
OPERATORS, LAYER, MODEL = "operators", "layer", "model"
LEGEND = """\
ms: median of {repeats} measured calls; IQR: distance of their quartiles. The operators and PyTorch ran by turns on the
same rows; weights (and cached keys) came from copies rotating over {cold_mb:.0f} MB. PyTorch has the same weights
unpacked, in the same dtype.
MB touched: computed from the shapes, each byte once. GB/s: those bytes by the measured median. % of read limit: of
{read_limit:.1f} GB/s, the best of {samples} measurements during this run (the worst: {worst:.1f}); "-" where less than
three quarters of the bytes come from memory rather than from a cache.
match: measured error against the float64 reference within the tolerance of the dtype. same bits: the first row alone
gives the bits that it gives beside the others."""

GPU_LEGEND = """\
ms: median of {repeats} measurements of a CUDA graph of 40 calls, divided by 40; IQR: distance of their quartiles. The
operators and PyTorch ran by turns on the same rows, all on the GPU; weights (and cached keys) came from copies
rotating over {cold_mb:.0f} MB. PyTorch has the same weights unpacked, in the same dtype; "without a graph", its
launches count. launches: GPU kernels of one call of the operator.
MB touched: computed from the shapes, each byte once. GB/s: those bytes by the measured median. % of read limit: of
{read_limit:.1f} GB/s, the best of {samples} copies on the device during this run, bytes read and written (the worst:
{worst:.1f}); "-" where less than three quarters of the bytes come from memory rather than from a cache.
match: measured error against the float64 reference within the tolerance of the dtype. same bits: the first row alone
gives the bits that it gives beside the others. Without a GPU kernel and not measured: {without}."""

LAYER_LEGEND = """\
ms: of one layer in a stack of {layers}, median of {repeats} measured calls of the stack; IQR: distance of their
quartiles. Both sides ran by turns on the same tokens, with the same weights and the same cached context; a call met
weights again after at least {cold_mb:.0f} MB of others, else the rate is "-". transformers: the fastest of what the
note names; embedding, masks, rotary angles and last norm are not in its time, embedding and last norm are in
blockdraft's.
uniform routing: the router tells tokens apart and the tokens choose their experts evenly; random routing: the router
has random weights, too.
MB touched: the weights that these rows read, those of the experts they chose and no others, and the cached keys and
values, each byte once. GB/s: those bytes by the measured median. % of read limit: of {read_limit:.1f} GB/s, the best
of {samples} measurements during this run (the worst: {worst:.1f}).
match: a row's relative error against float32 within what its roundings may add up to, the worst row's; with random
routing, where a rounding may choose another expert, the median row's. same bits: the first row alone gives the bits
that it gives beside the others."""

MODEL_LEGEND = """\
ms: of a forward with the choice of its tokens, or of a generated token; median of {repeats} measured calls; IQR:
distance of their quartiles. 1 row is a token of plain decoding, more are a block to be verified, whose tokens count as
far as they are accepted. The sides ran {turns} on the same tokens, with the same weights and context. transformers:
the fastest of what the note names, logits of all rows and their maxima.
uniform routing: the router tells tokens apart and the tokens choose their experts evenly; random routing: the router
has random weights, too; own routing: a checkpoint's, for random tokens.
MB touched: the weights that these rows read, those of the experts they chose and no others, the LM head and the cached
keys and values, each byte once. GB/s: those bytes by the measured median. % of read limit, which is the share of the
floor: of {read_limit:.1f} GB/s, the best of {samples} measurements during this run (the worst: {worst:.1f}); "-" where
the weights fit into the caches.
match: a row's relative difference from transformers within what the roundings of both may add up to, the worst row's,
or with other than uniform routing, where a rounding may choose another expert, the median row's; of generated tokens,
what their logits lack to transformers' best. same bits: the first row alone gives the bits that it gives beside the
others."""

LEGENDS = {OPERATORS: LEGEND, LAYER: LAYER_LEGEND, MODEL: MODEL_LEGEND}


@dataclass(frozen=True)
class Work:
    """What stands beside a case's times; see `blockdraft.bench.subject.Case`."""

    note: str
    touched_bytes: int
    cold_bytes: int


class BenchError(BlockdraftError, ValueError):
    """A file that `blockdraft bench` cannot read or write."""


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def huge_pages() -> str:
    """What the kernel grants, and whether torch asks for them."""
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        mode = modes[modes.index("[") + 1 : modes.index("]")]
    except (OSError, ValueError):
        mode = "unknown"
    asks = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    return f"{mode}, torch {'asks' if asks else 'does not ask'} for them"


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": blockdraft.cpu_isa(),
        "huge_pages": huge_pages(),
        "load_average": round(os.getloadavg()[0], 2),
        "blockdraft": blockdraft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": blockdraft.build_info()["compiler"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine_line(facts: dict[str, Any]) -> str:
    gpu = f"{facts['gpu']}, CUDA or ROCm {facts['cuda']}; " if "gpu" in facts else ""
    return gpu + (
        f"{facts['cpu']}, {facts['threads']} threads on {facts['logical_cores']} logical cores, kernels for "
        f"{facts['cpu_isa']}, huge pages {facts['huge_pages']}; blockdraft {facts['blockdraft']} "
        f"(compiler {facts['compiler']}), torch {facts['torch']}, Python {facts['python']}; {facts['date']}, "
        f"load {facts['load_average']:.2f} before the run"
    )


def result(label: str, case: Case | Work, rows: int, measured: Measured) -> dict[str, Any]:
    """JSON-ready. Everything but the bytes is measured or follows from what is; None: there was no other side."""
    ours, theirs, match = measured.ours, measured.torch, measured.match

    def finite(value: float | None) -> float | None:  # JSON has no infinity
        return value if value is not None and math.isfinite(value) else None

    return {
        "op": label,
        "rows": rows,
        "note": case.note,
        "median_ms": ours.median_ms,
        "iqr_ms": ours.iqr_ms,
        "repeats": ours.repeats,
        "torch_median_ms": theirs and theirs.median_ms,
        "torch_iqr_ms": theirs and theirs.iqr_ms,
        "ratio": theirs and theirs.median_ms / ours.median_ms,
        "computed_touched_bytes": case.touched_bytes,
        "computed_cold_bytes": case.cold_bytes,
        "gb_s": case.touched_bytes / ours.median_ms * 1e-6,
        "max_abs_error": finite(match and match.max_error),
        "worst_error": finite(match and match.worst_error),
        "worst_tolerance": finite(match and match.worst_tolerance),
        "match": match and match.ok,
        "same_bits": measured.same_bits,
        **({} if measured.launches is None else {"launches": measured.launches}),
        **({"others": {name: asdict(times) for name, times in measured.others.items()}} if measured.others else {}),
    }


def percent_of_limit(row: dict[str, Any], read_limit: float) -> float | None:
    cold = row["computed_cold_bytes"] >= COLD_SHARE * row["computed_touched_bytes"]
    return 100 * row["gb_s"] / read_limit if cold else None


def cells(row: dict[str, Any], read_limit: float, on_gpu: bool) -> tuple[str, ...]:
    percent = percent_of_limit(row, read_limit)
    return (
        row["op"],
        str(row["rows"]),
        *([number(row.get("launches"), 0)] if on_gpu else []),
        f"{row['median_ms']:.3f}",
        f"{row['iqr_ms']:.3f}",
        number(row["torch_median_ms"], 3),
        number(row["ratio"], 2),
        f"{row['computed_touched_bytes'] * 1e-6:.2f}",
        "-" if percent is None else f"{row['gb_s']:.1f}",
        number(percent, 0),
        match_cell(row),
        "yes" if row["same_bits"] else "NO",
        row["note"],
    )


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def match_cell(row: dict[str, Any]) -> str:
    if row["match"] is None:
        return "-"
    error = "not finite" if row["max_abs_error"] is None else f"{row['max_abs_error']:.1e}"
    return "yes" if row["match"] else f"NO ({error})"


def headings(kind: str, on_gpu: bool) -> tuple[str, ...]:
    other = "PyTorch" if kind == OPERATORS else "transformers"
    names = [*HEADINGS[:2], *(["launches"] if on_gpu else []), *HEADINGS[2:]]
    return tuple(heading.replace("PyTorch", other) for heading in names)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose source is a table, too; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [i > 0 and heading not in TEXTS for i, heading in enumerate(lines[0])]

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    return [line(lines[0]), line(rule), *map(line, lines[1:])]


def disturbance(report: dict[str, Any]) -> str:
    """What speaks against the numbers, or nothing."""
    load, samples = report["machine"]["load_average"], report["read_samples_gb_s"]
    signs = []
    if load > BUSY_LOAD:
        signs.append(f"a load of {load:.2f} before the run")
    if min(samples) < STEADY * max(samples):
        signs.append(f"read measurements from {min(samples):.1f} to {max(samples):.1f} GB/s")
    return f"THE MACHINE WAS NOT IDLE: {' and '.join(signs)}. Do not quote these numbers.\n\n" if signs else ""


def render(report: dict[str, Any]) -> str:
    limit, rows = report["read_limit_gb_s"], report["results"]
    repeats = [row["repeats"] for row in rows] or [0]
    samples = report["read_samples_gb_s"]
    settings = report["settings"]
    kind = settings.get("kind", OPERATORS)
    on_gpu = settings.get("device") == "cuda"
    legend = (GPU_LEGEND if on_gpu else LEGENDS[kind]).format(
        repeats=f"{min(repeats)} to {max(repeats)}",
        cold_mb=settings["cold_mb"],
        read_limit=limit,
        samples=len(samples),
        worst=min(samples),
        without=", ".join(settings.get("without_gpu_kernel", [])) or "none",
        layers=settings.get("layers"),
        turns="by turns" if all(row.get("by_turns") for row in rows) else "one after the other",
    )
    table = aligned([headings(kind, on_gpu), *(cells(row, limit, on_gpu) for row in rows)])
    dtype = f"{settings['shapes_name']} shapes, {settings['dtype']}"
    return "\n".join([f"{machine_line(report['machine'])}; {dtype}", "", *table, "", disturbance(report) + legend])


def save(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def load(path: Path) -> str:
    """The table of a file that `save` wrote."""
    with reading(path):
        return render(json.loads(path.read_text()))


def read(path: Path) -> dict[str, Any]:
    """Such a file, with what a comparison needs."""
    with reading(path):
        report: dict[str, Any] = json.loads(path.read_text())
        for row in report["results"]:
            row["op"], row["rows"], row["ratio"], row["repeats"], row["median_ms"], row["torch_median_ms"]
        report["settings"].keys()
        return report


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Says what is wrong with a file."""
    try:
        yield
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise BenchError(f"{path}: no JSON: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchError(f"{path}: not a result of `blockdraft bench --json`: {error!r}") from error
