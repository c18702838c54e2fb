"""How a case is timed: call by call beside PyTorch, in the same minutes on the same machine."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

    def of_one(self, count: int) -> "Times":
        """Of one of `count` equal parts."""
        return Times(self.median_ms / count, self.iqr_ms / count, self.repeats)


@dataclass(frozen=True)
class Measured:
    """What a case came to.

    Attributes:
        torch: Of PyTorch, or of the fastest of `others`; None where there was nothing to compare with.
        match: None likewise.
        others: All that ran beside ours, by name, where there may be several.
        launches: GPU kernels of one call; None on the CPU.
    """

    ours: Times
    torch: Times | None
    match: Match | None
    same_bits: bool
    others: dict[str, Times] = field(default_factory=dict)
    launches: int | None = None


def seconds_of(call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    gc.disable()  # as timeit does: a collection takes longer than most operators
    try:
        start = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - start
    finally:
        gc.enable()


Call = tuple[Callable[..., Any], tuple[Any, ...]]
Prepare = Callable[[int], Call]  # what a side does in a turn; made before any of them is timed


def time_sides(sides: Sequence[Prepare], budget: Budget) -> list[Times]:
    """All sides by turns; who begins moves on, since the first call after a pause is slower."""
    seconds: list[list[float]] = [[] for _ in sides]
    deadline = time.perf_counter() + budget.seconds
    for turn in range(WARMUP + budget.most):
        if turn >= WARMUP + budget.least and time.perf_counter() > deadline:
            break
        calls = [prepare(turn) for prepare in sides]
        for i in range(turn, turn + len(sides)):
            seconds[i % len(sides)].append(seconds_of(*calls[i % len(sides)]))
    return [Times.of(own[WARMUP:]) for own in seconds]


def time_both(case: Case, budget: Budget) -> list[Times]:
    """The operator and PyTorch."""
    operator = getattr(ops, case.op)
    return time_sides(
        [lambda turn: (operator, case.arguments(turn)), lambda turn: (case.pytorch, case.torch_arguments(turn))], budget
    )


def measure(case: Case, budget: Budget) -> Measured:
    match, same_bits = case.match(), case.same_bits()
    return Measured(*time_both(case, budget), match, same_bits)


def read_bandwidth(size: int, threads: int) -> float:
    """GB/s; see csrc/host/read_bandwidth.h."""
    return _host.read_bandwidth(size, threads, repeats=5)
