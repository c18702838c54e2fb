"""`blockdraft bench`: every operator beside ordinary PyTorch, at the shapes of a ZAYA1-8B layer.

The rules: weights are cold, both sides run by turns on the same rows, times are medians with their spread, rates stand
beside what this machine's memory can deliver in the same minutes, and a fast wrong result shows as wrong.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from blockdraft.bench import gpu, report
from blockdraft.bench.measure import Budget, Measured, measure, read_bandwidth
from blockdraft.bench.report import BenchError
from blockdraft.bench.subject import TINY, ZAYA1_8B, Case, Setting
from blockdraft.bench.subjects import SUBJECTS

__all__ = ["BenchError", "add_arguments", "main"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHAPES = {"ZAYA1-8B": ZAYA1_8B, "tiny": TINY}
DIFFERENT = 1  # exit status where a result is wrong
MOST_ROWS = 4096


def row_counts(text: str) -> tuple[int, ...]:
    try:
        rows = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas, got {text!r}") from None
    if not all(1 <= count <= MOST_ROWS for count in rows):
        raise argparse.ArgumentTypeError(f"must be from 1 to {MOST_ROWS}, got {text!r}")
    return rows


def op_names(text: str) -> tuple[str, ...]:
    if text == "all":
        return tuple(SUBJECTS)
    names = tuple(text.split(","))
    for name in names:
        if name not in SUBJECTS:
            raise argparse.ArgumentTypeError(f"no operator {name!r}; there are {', '.join(SUBJECTS)}, or all")
    return names


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def thread_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"must be from 1 to 1024, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `blockdraft bench`."""
    add = parser.add_argument
    add("--rows", type=row_counts, default="1,16,32,64", metavar="T,...", help="rows of a call; default: %(default)s")
    add("--ops", type=op_names, default="all", metavar="OP,...", help="some of: " + ", ".join(SUBJECTS))
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s; a ROCm GPU is cuda, too")
    add("--threads", type=thread_count, metavar="N", help="default: torch's choice")
    add("--seconds", type=positive, default=2.0, metavar="S", help="per operator and rows; default: %(default)s")
    add("--quick", action="store_true", help="a few repeats only, to see that everything runs")
    add("--json", type=Path, metavar="PATH", help="write the results, too")
    add("--render", type=Path, metavar="FILE", help="measure nothing: print the table of such a file")
    add("--cold-mb", type=positive, default=400.0, metavar="MB", help="well above the caches; default: %(default)s")
    # For the tests.
    add("--shapes", choices=SHAPES, default="ZAYA1-8B", help=argparse.SUPPRESS)
    add("--read-mb", type=positive, default=1024.0, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Measures and prints. 0: done, 1: a result does not match. Raises BenchError for a file it cannot use."""
    if args.render:
        print(report.load(args.render))
        return 0
    if args.json and not os.access(args.json.parent, os.W_OK):
        raise BenchError(f"{args.json}: no folder that can be written to")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: this torch sees no GPU")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        with torch.inference_mode(), torch.device(gpu.DEVICE if args.device == "cuda" else "cpu"):
            results = collect(args)
    finally:
        torch.set_num_threads(threads)
    print(report.render(results))
    if args.json:
        report.save(results, args.json)
    return 0 if all(row["match"] and row["same_bits"] for row in results["results"]) else DIFFERENT


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """The whole run as one JSON-ready object."""
    shapes = SHAPES[args.shapes]
    setting = Setting(shapes, DTYPES[args.dtype], int(args.cold_mb * 1e6), max(args.rows))
    budget = Budget(min(args.seconds, 0.2), least=3) if args.quick else Budget(args.seconds)
    on_gpu = args.device == "cuda"
    facts = report.machine() | (gpu.machine() if on_gpu else {})
    names = tuple(name for name in args.ops if not on_gpu or gpu.has_kernel(name))
    samples: list[float] = []
    results: list[dict[str, Any]] = []
    for label, row in measure_all(names, args.rows, setting, budget, gpu.measure if on_gpu else measure):
        if not results or results[-1]["op"] != label:  # often, since neighbours on the host change it in minutes
            samples.append(bandwidth(int(args.read_mb * 1e6), on_gpu))
        results.append(row)
    if not results:
        raise BenchError(f"no GPU kernel of {', '.join(args.ops)}")
    limit = max(samples)
    for row in results:
        row["percent_of_read_limit"] = report.percent_of_limit(row, limit)
    settings = {"dtype": args.dtype, "shapes_name": args.shapes, "shapes": asdict(shapes)}
    settings |= {"cold_mb": args.cold_mb, "seconds": budget.seconds, "quick": args.quick, "device": args.device}
    settings["without_gpu_kernel"] = [name for name in args.ops if name not in names]
    keys = {"machine": facts, "settings": settings, "read_limit_gb_s": limit, "read_samples_gb_s": samples}
    return {**keys, "results": results}


def bandwidth(size: int, on_gpu: bool) -> float:
    return gpu.copy_bandwidth(size) if on_gpu else read_bandwidth(size, torch.get_num_threads())


def measure_all(
    names: tuple[str, ...],
    rows: tuple[int, ...],
    setting: Setting,
    budget: Budget,
    measure: Callable[[Case, Budget], Measured],
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        torch.manual_seed(0)
        for subject in SUBJECTS[name](setting):
            for count in rows:
                print(f"bench: {subject.label}, {count} rows", file=sys.stderr, flush=True)
                case = subject.case(count)
                yield subject.label, report.result(subject.label, case, count, measure(case, budget))
