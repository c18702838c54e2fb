"""`blockdraft demo`: one prompt, decoded plainly and by blocks, greedily and sampled, side by side."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, TextIO

from blockdraft.live import View, make_view

if TYPE_CHECKING:
    from blockdraft import GenerationOutput, SamplingParams, ZayaForCausalLM

PROMPT = '''"""Helpers for reading configuration files."""

import os


class ConfigReader:
    """Read key/value pairs from a text file."""

    def __init__(self, filename, encoding=None):
        self.filename = filename
'''
TEMPERATURE = 0.8
SEED = 2026
FRAME_SECONDS = 0.08  # in a terminal; the time shown to the reader is not counted
BAR = 40


@dataclass(frozen=True)
class Run:
    """One row of the table. A run with a baseline must give the baseline's tokens."""

    name: str
    sampler: str
    temperature: float
    baseline: str | None = None

    def params(self, max_tokens: int) -> "SamplingParams":
        from blockdraft import SamplingParams

        return SamplingParams(
            max_tokens=max_tokens, temperature=self.temperature, seed=SEED, sampler=self.sampler, ignore_eos=True
        )


RUNS = (
    Run("ar", "ar", 0.0),
    Run("lossless", "lossless", 0.0, baseline="ar"),
    Run(f"ar, T={TEMPERATURE}", "ar", TEMPERATURE),
    Run(f"lossless, T={TEMPERATURE}", "lossless", TEMPERATURE, baseline=f"ar, T={TEMPERATURE}"),
)


@dataclass(frozen=True)
class Result:
    run: Run
    output: "GenerationOutput"
    seconds: float  # inside the model, without the view
    identical: bool | None  # None where there is nothing to compare with

    @property
    def tokens_per_second(self) -> float:
        return len(self.output.token_ids) / self.seconds


def perform(model: "ZayaForCausalLM", run: Run, max_tokens: int, view: View) -> "tuple[GenerationOutput, float]":
    """Streams one run into the view; the output, and the seconds spent in the model."""
    seconds, output = 0.0, None
    view.start(PROMPT)
    events = iter(model.stream(PROMPT, run.params(max_tokens)))
    while True:
        begin = perf_counter()
        event = next(events, None)
        seconds += perf_counter() - begin
        if event is None:
            break
        view.event(event)
        output = event.output or output
    view.finish()
    assert output is not None, "a stream ends with an output"
    return output, seconds


def results(model: "ZayaForCausalLM", max_tokens: int, stream: TextIO) -> Iterator[Result]:
    # Before anything is timed: threads start, weights are touched. A max_tokens that cannot be served fails here, too.
    model.generate(PROMPT, RUNS[1].params(min(4, max_tokens)))
    outputs: dict[str, GenerationOutput] = {}
    for run in RUNS:
        print(f"\n--- {run.name}\n", file=stream, flush=True)
        output, seconds = perform(model, run, max_tokens, make_view(stream, model.tokenizer, FRAME_SECONDS))
        outputs[run.name] = output
        identical = output.token_ids == outputs[run.baseline].token_ids if run.baseline else None
        yield Result(run, output, seconds, identical)


def _number(value: float, shown: bool = True) -> str:
    return f"{value:.2f}" if shown else "-"


def table(rows: Sequence[Result]) -> str:
    lines = [f"{'':<16}{'tokens':>7}{'tokens/s':>10}{'per forward':>13}{'per verify':>12}  identical to AR"]
    for row in rows:
        stats, verdict = row.output.stats, {None: "-", True: "yes", False: "NO"}[row.identical]
        verified = stats.verify_forwards > 0
        lines.append(
            f"{row.run.name:<16}{len(row.output.token_ids):>7}{row.tokens_per_second:>10.1f}"
            f"{_number(stats.tokens_per_forward):>13}{_number(stats.tokens_per_verify, verified):>12}  {verdict}"
        )
    return "\n".join(lines)


def histogram(row: Result) -> str:
    """How often a verification accepted so many drafts."""
    counts = row.output.stats.acceptance_histogram
    most = max(counts, default=0)
    lines = [f"{row.run.name}: accepted drafts per verification"]
    for accepted, count in enumerate(counts):
        bar = "#" * -(-count * BAR // most) if most else ""
        lines.append(f"{accepted:>4} {count:>4} {bar}".rstrip())
    return "\n".join(lines)


def demo(model: "ZayaForCausalLM", max_tokens: int, stream: TextIO = sys.stdout) -> bool:
    """Shows the runs and their table. False if a lossless run differs from plain decoding."""
    rows = list(results(model, max_tokens, stream))
    print(f"\n{table(rows)}\n", file=stream)
    for row in rows:
        if row.output.stats.verify_forwards:
            print(f"{histogram(row)}\n", file=stream)
    return all(row.identical is not False for row in rows)
