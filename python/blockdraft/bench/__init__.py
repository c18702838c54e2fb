"""`blockdraft bench`: operators beside ordinary PyTorch, a layer and whole models beside transformers.

The rules: weights are cold, both sides run by turns on the same rows, times are medians with their spread, rates stand
beside what this machine's memory can deliver in the same minutes, and a fast wrong result shows as wrong.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockdraft.bench import gpu, layer, report, revision, whole
from blockdraft.bench.gate import Gate
from blockdraft.bench.measure import Budget, Measured, measure, read_bandwidth
from blockdraft.bench.random_model import RANDOM, UNIFORM
from blockdraft.bench.report import BenchError
from blockdraft.bench.subject import TINY, ZAYA1_8B, Case, Setting, Subject
from blockdraft.bench.subjects import SUBJECTS
from blockdraft.model.expert_formats import EXPERT_FORMATS

__all__ = ["BenchError", "add_arguments", "main"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROUTINGS = {UNIFORM: (UNIFORM,), RANDOM: (RANDOM,), "both": (UNIFORM, RANDOM)}
SHAPES = {"ZAYA1-8B": ZAYA1_8B, "tiny": TINY}
DIFFERENT, SLOWER = 1, 3  # exit status where a result is wrong, where --base was faster
MOST_ROWS = 4096

Measurement = tuple[str, int, Callable[[], dict[str, Any]]]
"""Label, rows, and what measures them; once more where the result is in doubt."""


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


def count(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be from 1 to {most}, got {text!r}")
        return int(text)

    return parse


def share(text: str) -> float:
    value = positive(text.removesuffix("%"))
    return value / 100 if text.endswith("%") else value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `blockdraft bench`."""
    add = parser.add_argument
    add("--rows", type=row_counts, metavar="T,...", help="rows of a call; default: 1,16,32,64, of --model 1,16")
    add("--ops", type=op_names, default="all", metavar="OP,...", help="some of: " + ", ".join(SUBJECTS))
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s; a ROCm GPU is cuda, too")
    add("--threads", type=count(1024), metavar="N", help="default: torch's choice")
    add("--seconds", type=positive, default=2.0, metavar="S", help="per operator and rows; default: %(default)s")
    add("--quick", action="store_true", help="a few repeats only, to see that everything runs")
    add("--json", type=Path, metavar="PATH", help="write the results, too")
    add("--render", type=Path, metavar="FILE", help="measure nothing: print the table of such a file")
    add("--cold-mb", type=positive, default=400.0, metavar="MB", help="well above the caches; default: %(default)s")
    add_larger(parser.add_argument_group("instead of operators").add_mutually_exclusive_group(), parser)
    group = parser.add_argument_group("regressions")
    text = "results of an earlier run, or a git revision, which is built: fails where it was faster"
    group.add_argument("--base", metavar="FILE|REF", help=text)
    text = "that may be lost, beside the spread; default: %(default)s"
    group.add_argument("--tolerance", type=share, default="10%", metavar="SHARE", help=text)
    # For the tests.
    add("--shapes", choices=SHAPES, default="ZAYA1-8B", help=argparse.SUPPRESS)
    add("--read-mb", type=positive, default=1024.0, help=argparse.SUPPRESS)


def add_larger(either: argparse._MutuallyExclusiveGroup, parser: argparse.ArgumentParser) -> None:
    either.add_argument("--layer", action="store_true", help="a decoder layer beside transformers'")
    text = "a whole model beside transformers': the 8B shape with random weights (default), the bundled one, a folder's"
    either.add_argument("--model", nargs="?", const="8b", metavar="8b|nano|DIR", help=text)
    add = parser.add_argument
    add("--context", type=count(1 << 20), default=512, metavar="L", help="cached tokens; default: %(default)s")
    add("--layers", type=count(1024), metavar="N", help="of random weights; default: what cold weights take, or all")
    add("--routing", choices=ROUTINGS, default="both", help="of random weights; default: %(default)s")
    add("--format", choices=EXPERT_FORMATS, help="with random weights, of our experts; default: floats")
    add("--compile", action="store_true", help="with --layer, torch.compile of transformers' layers, too (minutes)")


def main(args: argparse.Namespace) -> int:
    """Measures and prints. 0: done, 1: a result does not match, 3: slower than --base. Raises BenchError for what it
    cannot use or has no memory for."""
    if args.render:
        print(report.load(args.render))
        return 0
    check(args)
    if args.base and not is_file(args.base):
        return beside_revision(args)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        with torch.inference_mode(), torch.device(gpu.DEVICE if args.device == "cuda" else "cpu"):
            gate = Gate.load(Path(args.base), args.tolerance, settings_of(args)) if args.base else None
            results = collect(args, gate)
    finally:
        torch.set_num_threads(threads)
    return conclude(args, results, gate)


def conclude(args: argparse.Namespace, results: dict[str, Any], gate: Gate | None) -> int:
    """Prints and saves; the exit status."""
    print(report.render(results))
    if args.json:
        report.save(results, args.json)
    slower = gate is not None and gate.report(results["results"])
    wrong = any(row["match"] is False or not row["same_bits"] for row in results["results"])
    return DIFFERENT if wrong else SLOWER if slower else 0


def is_file(base: str) -> bool:
    """Whether --base means a file, be it there or not."""
    return base.endswith(".json") or Path(base).is_file()


def beside_revision(args: argparse.Namespace) -> int:
    earlier, results = revision.compare(args.base, options_of(args))
    return conclude(args, results, Gate.of(Path(args.base), earlier, args.tolerance, results["settings"]))


def options_of(args: argparse.Namespace) -> list[str]:
    """The options that are not the default, as words: an older revision need not know the others."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults, words = parser.parse_args([]), []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in ("help", "base", "tolerance", "json", "render") or value == getattr(defaults, action.dest):
            continue
        words.append(action.option_strings[0])
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return words


def kind_of(args: argparse.Namespace) -> str:
    return report.LAYER if args.layer else report.MODEL if args.model else report.OPERATORS


def check(args: argparse.Namespace) -> None:
    kind = kind_of(args)
    if args.json and not os.access(args.json.parent, os.W_OK):
        raise BenchError(f"{args.json}: no folder that can be written to")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: this torch sees no GPU")
    if kind != report.OPERATORS and args.device != "cpu":
        raise BenchError(f"--{kind}: measures the CPU only, got --device {args.device}")
    if kind != report.OPERATORS and args.ops != tuple(SUBJECTS):
        raise BenchError(f"--{kind}: has no operators to choose, got --ops {','.join(args.ops)}")
    if kind != report.LAYER and args.compile:
        raise BenchError("--compile: compiles transformers' layers, so it wants --layer")
    for name in ("layers", "format"):
        if getattr(args, name) and (kind == report.OPERATORS or (args.model or "8b") != "8b"):
            raise BenchError(f"--{name}: is for random weights, so it wants --layer or --model 8b")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What two runs must have in common to be compared comes first."""
    kind = kind_of(args)
    settings = {"kind": kind, "dtype": args.dtype, "shapes_name": args.shapes, "device": args.device}
    settings |= {"shapes": asdict(SHAPES[args.shapes]), "cold_mb": args.cold_mb, "quick": args.quick}
    if kind == report.LAYER:
        settings["layers"] = layer_run(args).depth
    if kind == report.MODEL and (folder := whole.folder_of(args.model)):
        settings |= {"shapes_name": folder.name, "shapes": None}
    return settings | {"seconds": budget_of(args).seconds}


def budget_of(args: argparse.Namespace) -> Budget:
    return Budget(min(args.seconds, 0.2), least=3) if args.quick else Budget(args.seconds)


def rows_of(args: argparse.Namespace) -> tuple[int, ...]:
    return args.rows or ((1, 16) if args.model else (1, 16, 32, 64))


def layer_run(args: argparse.Namespace) -> layer.LayerRun:
    return layer.LayerRun(**random_run(args), compiled=args.compile)


def model_run(args: argparse.Namespace, sample: Callable[[], None]) -> whole.ModelRun:
    return whole.ModelRun(**random_run(args), folder=whole.folder_of(args.model), sample=sample)


def random_run(args: argparse.Namespace) -> dict[str, Any]:
    """What layers and models have in common."""
    run = {"shapes": SHAPES[args.shapes], "dtype": DTYPES[args.dtype], "rows": rows_of(args), "context": args.context}
    run |= {"routings": ROUTINGS[args.routing], "layers": args.layers, "experts": args.format}
    return run | {"cold_bytes": int(args.cold_mb * 1e6), "budget": budget_of(args)}


def collect(args: argparse.Namespace, gate: Gate | None) -> dict[str, Any]:
    """The whole run as one JSON-ready object."""
    on_gpu = args.device == "cuda"
    facts = report.machine() | (gpu.machine() if on_gpu else {})
    samples: list[float] = []
    results: list[dict[str, Any]] = []

    def sample() -> None:
        samples.append(bandwidth(int(args.read_mb * 1e6), on_gpu))

    for label, rows, measure_row in measurements(args, sample):
        print(f"bench: {label}, {rows} rows", file=sys.stderr, flush=True)
        row = gate.settle(measure_row) if gate else measure_row()
        # Often, since neighbours on the host change it in minutes; a layer takes seconds for each number of rows.
        if kind_of(args) == report.LAYER or not results or results[-1]["op"] != label:
            sample()
        results.append(row)
    if not results:
        raise BenchError(f"no GPU kernel of {', '.join(args.ops)}")
    limit = max(samples)
    for row in results:
        row["percent_of_read_limit"] = report.percent_of_limit(row, limit)
    settings = settings_of(args) | {"without_gpu_kernel": sorted(set(args.ops) - set(measured_ops(args)))}
    keys = {"machine": facts, "settings": settings, "read_limit_gb_s": limit, "read_samples_gb_s": samples}
    return {**keys, "results": results}


def bandwidth(size: int, on_gpu: bool) -> float:
    return gpu.copy_bandwidth(size) if on_gpu else read_bandwidth(size, torch.get_num_threads())


def measured_ops(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name for name in args.ops if args.device != "cuda" or gpu.has_kernel(name))


def measurements(args: argparse.Namespace, sample: Callable[[], None]) -> Iterator[Measurement]:
    if args.layer:
        return layer.measure_all(layer_run(args))
    if args.model:
        return whole.measure_all(model_run(args, sample))
    return operators(args)


def operators(args: argparse.Namespace) -> Iterator[Measurement]:
    budget, rows = budget_of(args), rows_of(args)
    setting = Setting(SHAPES[args.shapes], DTYPES[args.dtype], int(args.cold_mb * 1e6), max(rows))
    measure_case = gpu.measure if args.device == "cuda" else measure
    for name in measured_ops(args):
        torch.manual_seed(0)
        for subject in SUBJECTS[name](setting):
            for count in rows:
                yield subject.label, count, partial(operator_row, subject, count, budget, measure_case)


def operator_row(
    subject: Subject, rows: int, budget: Budget, measure: Callable[[Case, Budget], Measured]
) -> dict[str, Any]:
    case = subject.case(rows)
    return report.result(subject.label, case, rows, measure(case, budget))
