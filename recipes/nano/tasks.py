"""Short tasks made from held-out files, and pass@k on them: plain decoding, lossless block drafting, a mixed law.

    python recipes/nano/tasks.py [MODEL] [--json FILE]
    python recipes/nano/tasks.py --prompts tasks.jsonl    # the tasks alone, for blockdraft passk

A file is cut at a random place; what is missing is one of
    line       the rest of a statement's line, as the file has it
    name       the rest of a name that the prompt has once already
    brackets   what closes the open brackets of a statement
    docstring  two words or more, and the end of the docstring
and `checks.py` judges it. The tasks follow from the files and the seed.
"""

import argparse
import ast
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import checks
import data
from blockdraft import SamplingParams, ZayaForCausalLM, bundled_model, passk

CONTEXT = 320  # characters of a prompt at most, some 250 tokens: the weights are trained on 256 to 512
MISSING = 40  # characters of the file's own solution at most; a token is a character at least
PARAMS = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=48, n=10, seed=0, groups=0, ignore_eos=True)
SAMPLERS = ("ar", "lossless", "mixed:mix=0.5")
KS = (1, 5, 10)
SIMPLE = (ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.Raise, ast.Import, ast.ImportFrom, ast.Assert)


class Span(NamedTuple):
    """A task may be cut out of ``text[low:end]``, up to `high`; what is checked begins at `begin`."""

    begin: int
    low: int
    high: int
    end: int


class Source:
    """An ASCII file: its syntax tree with places in the text."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text
        self.nodes = list(ast.walk(ast.parse(text)))
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def place(self, node: ast.AST) -> tuple[int, int]:
        """Where a node of the tree begins and ends."""
        starts = self.line_starts
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def lines(self) -> Iterator[Span]:
        for node in self.nodes:
            if isinstance(node, SIMPLE) and node.lineno == node.end_lineno:
                begin, end = self.place(node)
                if self.text[end : end + 1] == "\n":
                    yield Span(begin, max(begin + 4, end - MISSING // 2), end - 3, end)

    def names(self) -> Iterator[Span]:
        for node in self.nodes:
            if isinstance(node, ast.Name) and len(node.id) >= 6:
                begin, end = self.place(node)
                if re.search(rf"\b{node.id}\b", self.text[max(0, begin - CONTEXT // 2) : begin]):
                    yield Span(begin, begin + 2, begin + 2, end)

    def brackets(self) -> Iterator[Span]:
        for node in self.nodes:
            if isinstance(node, ast.Assign | ast.Return | ast.Expr):
                begin, end = self.place(node)
                if self.text[end - 1] in ")]}":
                    yield Span(begin, max(begin + 4, end - MISSING), end - 3, end)

    def docstrings(self) -> Iterator[Span]:
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                first, end = self.place(node.body[0])
                if self.text[first : first + 3] == '"""':
                    yield Span(self.place(node)[0], max(first + 3, end - MISSING), end - 12, end)

    def task(self, kind: str, span: Span, rng: random.Random) -> dict[str, Any] | None:
        """None where the span has no place for it: nothing would be missing, or the prompt would not hold its start."""
        if span.low > span.high:
            return None
        cut = rng.randint(span.low, span.high)
        first = next(start for start in self.line_starts if start >= cut - CONTEXT or start == self.line_starts[-1])
        prompt, reference = self.text[first:cut], self.text[cut : span.end]
        task = {"kind": kind, "prompt": prompt, "reference": reference, "begin": span.begin - first, "file": self.path}
        if span.begin < first or answered(task, "\n") or not answered(task, reference + "\n"):
            return None
        return task


KINDS: dict[str, Callable[[Source], Iterator[Span]]] = {
    "line": Source.lines,
    "name": Source.names,
    "brackets": Source.brackets,
    "docstring": Source.docstrings,
}


def answered(task: dict[str, Any], completion: str) -> bool:
    return checks.passes(task | {"completion": completion, "text": task["prompt"] + completion})


def sources(files: list[tuple[Path, str]]) -> list[Source]:
    """Those that this Python can parse, and whose columns count characters."""
    return [Source(str(path), text) for path, text in files if text.isascii() and checks.parses(text)]


def make(files: list[tuple[Path, str]], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` tasks of each kind, no two of a kind from one file as long as there are others."""
    rng, parsed, tasks = random.Random(seed), sources(files), []
    for kind, spans_of in KINDS.items():
        piles = [list(spans_of(source)) for source in parsed]
        turns = _turns(piles, rng)
        for number in range(count):
            tasks.append({"id": f"{kind}-{number}"} | _next_task(kind, parsed, turns, rng))
    return tasks


def _turns(piles: list[list[Span]], rng: random.Random) -> Iterator[tuple[int, Span]]:
    """All spans in random order, one of each file in turn, with the number of the file."""
    for pile in piles:
        rng.shuffle(pile)
    while any(piles):
        for i in rng.sample(range(len(piles)), len(piles)):
            if piles[i]:
                yield i, piles[i].pop()


def _next_task(
    kind: str, parsed: list[Source], turns: Iterator[tuple[int, Span]], rng: random.Random
) -> dict[str, Any]:
    for i, span in turns:
        if task := parsed[i].task(kind, span, rng):
            return task
    raise SystemExit(f"the files have too few places for tasks of kind {kind!r}")


def by_kind(report: passk.Report) -> dict[str, dict[str, dict[str, float | None]]]:
    """pass@1 of each kind of task by sampler, with its interval."""
    result: dict[str, dict] = {}
    for kind in KINDS:
        for run in report.results:
            values = [p for i, p in zip(run.ids, run.pass_at_k(1), strict=True) if i.startswith(f"{kind}-")]
            result.setdefault(kind, {})[run.sampler] = asdict(passk.Interval.bootstrap(values, PARAMS.seed))
    return result


def evaluate(model: ZayaForCausalLM, tasks: list[dict[str, Any]], jobs: int) -> tuple[str, dict[str, Any]]:
    """As a table and as JSON, which leaves out what generating took: that depends on what else the machine does."""
    report = passk.evaluate(model, tasks, checks.passes, PARAMS, samplers=SAMPLERS, k=KS, jobs=jobs)
    result = report.as_json()
    for run in result["samplers"].values():
        del run["seconds"]
    return report.as_text(), result | {"pass_at_1_by_kind": by_kind(report)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=bundled_model())
    parser.add_argument("--count", type=int, default=30, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")
    parser.add_argument("--jobs", type=int, default=1, help="checks at a time")
    parser.add_argument("--prompts", type=Path, help="write the tasks here, and do nothing else")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    tasks = make(data.split()[1], args.count, args.seed)
    if args.prompts:
        args.prompts.write_text("".join(json.dumps(task) + "\n" for task in tasks))
        return
    table, result = evaluate(ZayaForCausalLM.from_pretrained(args.model, max_batch_size=32), tasks, args.jobs)
    print(table)
    for kind, samplers in result["pass_at_1_by_kind"].items():
        print(kind, {name: round(interval["mean"], 3) for name, interval in samplers.items()})
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
