"""How a case is timed: call by call beside PyTorch, in the same minutes on the same machine."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blockdraft import _host, ops
from blockdraft.bench.subject import Case, Match

WARMUP = 2  # calls whose time is not kept


@dataclass(frozen=True)
class Budget:
    """How long one case may be repeated: `seconds`, but at least `least` calls and at most `most`."""

    seconds: float
    least: int = 5
    most: int = 300


@dataclass(frozen=True)
class Times:
    """Median and distance of the quartiles. Medians, because what disturbs a call only ever makes it slower."""

    median_ms: float
    iqr_ms: float
    repeats: int

    @staticmethod
    def of(seconds: list[float]) -> "Times":
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return Times(median * 1e3, (high - low) * 1e3, len(seconds))


@dataclass(frozen=True)
class Measured:
    ours: Times
    torch: Times
    match: Match
    same_bits: bool


def seconds_of(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    gc.disable()  # as timeit does: a collection takes longer than most operators
    try:
        start = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - start
    finally:
        gc.enable()


def time_both(case: Case, budget: Budget) -> tuple[Times, Times]:
    """The operator and PyTorch by turns; who begins alternates, since the first call after a pause is slower."""
    operator = getattr(ops, case.op)
    ours: list[float] = []
    theirs: list[float] = []
    deadline = time.perf_counter() + budget.seconds
    while len(ours) < WARMUP + budget.most:
        turn = len(ours)
        if turn >= WARMUP + budget.least and time.perf_counter() > deadline:
            break
        calls = [(ours, operator, case.arguments(turn)), (theirs, case.pytorch, case.torch_arguments(turn))]
        for times, call, arguments in calls if turn % 2 else calls[::-1]:
            times.append(seconds_of(call, arguments))
    return Times.of(ours[WARMUP:]), Times.of(theirs[WARMUP:])


def measure(case: Case, budget: Budget) -> Measured:
    match, same_bits = case.match(), case.same_bits()
    return Measured(*time_both(case, budget), match, same_bits)


def read_bandwidth(size: int, threads: int) -> float:
    """GB/s; see csrc/host/read_bandwidth.h."""
    return _host.read_bandwidth(size, threads, repeats=5)
