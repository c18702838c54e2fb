"""`pytest bench` times every operator with pytest-benchmark, one process and one operator's weights at a time.

The cases are those of `blockdraft bench`, which also checks the results and compares with the read limit.
"""

import itertools
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import blockdraft
from blockdraft.bench.subject import ZAYA1_8B, Setting, Subject
from blockdraft.bench.subjects import SUBJECTS

COLD_BYTES = 400_000_000
MOST_ROWS = 64
SECONDS = 0.5  # of calls per benchmark

Measure = Callable[[str, int, str], None]


@pytest.fixture(scope="module")
def subjects(request: pytest.FixtureRequest) -> dict[str, Subject]:
    """Those of the operator that the file is named after, by label."""
    torch.manual_seed(0)
    setting = Setting(ZAYA1_8B, torch.bfloat16, COLD_BYTES, MOST_ROWS)
    return {subject.label: subject for subject in SUBJECTS[request.path.stem](setting)}


@pytest.fixture
def measure(benchmark, subjects: dict[str, Subject]) -> Iterator[Measure]:
    """Benchmarks one side of a case: label, rows, "blockdraft" or "torch". Every call meets cold weights."""

    def run(label: str, rows: int, implementation: str) -> None:
        case = subjects[label].case(rows)
        ours = implementation == "blockdraft"
        call = getattr(blockdraft.ops, case.op) if ours else case.pytorch
        arguments = case.arguments if ours else case.torch_arguments
        turns = itertools.count(1)
        call(*arguments(0))
        start = time.perf_counter()
        call(*arguments(next(turns)))
        rounds = min(300, max(5, int(SECONDS / (time.perf_counter() - start))))
        benchmark.group = f"{label}, {rows} rows" + (f" ({case.note})" if case.note else "")
        benchmark.pedantic(call, setup=lambda: (arguments(next(turns)), {}), rounds=rounds)
        benchmark.extra_info["cpu_isa"] = blockdraft.cpu_isa()
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["computed_touched_bytes"] = case.touched_bytes

    with torch.inference_mode():
        yield run
