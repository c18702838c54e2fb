"""`blockdraft passk`: how often one of k samples passes a check, for plain decoding beside other samplers.

pass@k of a prompt is estimated without bias from n samples of which c pass, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021,
arXiv 2107.03374, section 2.1). Reported is the mean over prompts with a percentile bootstrap over prompts. All samplers
get the same prompts and seeds; checks run in processes of their own, with limits.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from blockdraft.errors import RequestError
from blockdraft.model.zaya import ZayaForCausalLM
from blockdraft.passk.checker import Checker, Limits, Verdict
from blockdraft.passk.estimate import Interval, pass_at_k
from blockdraft.passk.evaluation import DEFAULT_PARAMS, Completion, SamplerResult, evaluate, make_ks, make_runs
from blockdraft.passk.prompts import read_records
from blockdraft.passk.report import Report
from blockdraft.sampler import SamplingParams

__all__ = [
    "Checker",
    "Completion",
    "Interval",
    "Limits",
    "Report",
    "SamplerResult",
    "Verdict",
    "add_arguments",
    "evaluate",
    "main",
    "pass_at_k",
    "read_records",
]

DIFFERENT = 1  # exit status where lossless and ar differ


def integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas, got {text!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `blockdraft passk` beside the model's."""
    p, limits = DEFAULT_PARAMS, Limits()
    add = parser.add_argument
    add("prompts", type=Path, metavar="PROMPTS.jsonl", help='lines {"prompt": text or token ids, "id": ..., ...}')
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--checker", metavar="COMMAND", help="reads a JSON object; exit status 0 passes")
    kinds.add_argument("--checker-python", metavar="MODULE:FUNCTION", help="function(record) -> bool")
    add("--samples", type=int, default=p.n, metavar="N", help="per prompt; default: %(default)s")
    add("--k", type=integers, metavar="K,...", help="default: those of 1,2,5,10,20,50,100 up to N")
    add("--sampler", default="ar,lossless", metavar="NAME,...", help="compared with the first; default: %(default)s")
    add("--max-tokens", type=int, default=p.max_tokens, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=p.temperature, metavar="T", help="default: %(default)s")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, default=p.top_p, metavar="P", help="default: %(default)s")
    add("--min-p", type=float, default=p.min_p, metavar="P")
    add("--seed", type=int, default=p.seed, metavar="S", help="of the first prompt; default: %(default)s")
    add("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--timeout", type=float, default=limits.timeout, metavar="S", help="seconds of a check; default: %(default)s")
    add("--memory-mb", type=int, default=limits.memory_mb, metavar="M", help="of a check; default: %(default)s")
    add("--jobs", type=int, default=1, metavar="J", help="checks at a time; default: %(default)s")
    add("--json", action="store_true", help="one object on standard output")
    add("--out", type=Path, metavar="FILE.jsonl", help="write every completion with its outcome")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=tuple(args.stop),
        n=args.samples,
    )


def main(args: argparse.Namespace, load: Callable[[argparse.Namespace], ZayaForCausalLM]) -> int:
    """Evaluates and prints. 0: done, 1: lossless differs from plain decoding.

    Args:
        args: Of `add_arguments`.
        load: Gives the model for them; called once all else has been looked at.
    """
    params, limits, samplers = sampling_params(args), Limits(args.timeout, args.memory_mb), args.sampler.split(",")
    make_runs(params, samplers)
    make_ks(args.k, params.n)
    checker = Checker.command(args.checker) if args.checker is not None else Checker.python(args.checker_python)
    checker.try_load(limits)
    records = read_records(args.prompts)
    with Lines(args.out, args.prompts) as lines:
        shared = {"samplers": samplers, "k": args.k, "limits": limits, "jobs": args.jobs}
        report = evaluate(load(args), records, checker, params, **shared, finished=lines.write)
    print(json.dumps(report.as_json(), indent=2) if args.json else report.as_text())
    if report.promise_kept:
        return 0
    print("blockdraft: lossless differs from plain decoding", file=sys.stderr)
    return DIFFERENT


class Lines:
    """The file of completions, one a line, open before anything is generated. Without a path nothing is written."""

    def __init__(self, path: Path | None, prompts: Path) -> None:
        if path is not None and path.exists() and path.samefile(prompts):
            raise RequestError(f"--out must be another file than the prompts, got {path}")
        try:
            self.file = path.open("w", encoding="utf-8") if path is not None else None
        except OSError as error:
            raise RequestError(f"--out {path}: {error.strerror}") from None

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(self, result: SamplerResult) -> None:
        print(f"passk: {result.sampler}: {len(result.completions)} completions", file=sys.stderr, flush=True)
        if self.file:
            self.file.writelines(json.dumps(dataclasses.asdict(c)) + "\n" for c in result.completions)
            self.file.flush()
