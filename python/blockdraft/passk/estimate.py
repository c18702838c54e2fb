"""The estimate of pass@k from n samples, and the interval of its mean over prompts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockdraft.errors import RequestError

LEVEL = 0.95
RESAMPLES = 10_000  # another bootstrap seed then moves an end of the interval by 1 % of the interval's width
PICKS = 1 << 22  # prompts drawn at once, 32 MiB of indices


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn at random where c of the n pass, hold one that passes.

    Args:
        n: Samples, at least 1.
        c: Those that pass, in [0, n].
        k: Size of the draw, in [1, n].

    Returns:
        1 - C(n-c, k) / C(n, k), as 1 minus the product of 1 - k / i over i in (n-c, n]: the binomials leave float64
        (arXiv 2107.03374, section 2.1).

    Raises:
        RequestError: An argument that is no integer or out of its range.
    """
    check_integer("n", n, 1)
    check_integer("c", c, 0, n)
    check_integer("k", k, 1, n)
    # Where n - c < k, so that each draw holds one that passes, the factor of i = k is 0.
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise RequestError(f"{name} must be an integer {wanted}, got {value!r}")


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its 95 % interval. A single prompt tells no spread: low and high are None."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def bootstrap(cls, values: Sequence[float], seed: int) -> "Interval":
        """Percentile interval of the mean of `values`, one per prompt, over resamples of the prompts.

        The same seed and number of prompts give the same resamples, so that samplers are compared on equal ones.
        """
        column = torch.tensor(values, dtype=torch.float64)
        mean = float(column.mean())
        if len(column) < 2:
            return cls(mean, None, None)
        means = torch.cat([column[picks].mean(1) for picks in _resamples(len(column), seed)])
        tail = (1 - LEVEL) / 2
        low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return cls(mean, low, high)

    def shown(self, style: str) -> str:
        if self.low is None:
            return format(self.mean, style)
        return f"{self.mean:{style}} [{self.low:{style}}, {self.high:{style}}]"


def _resamples(prompts: int, seed: int) -> Iterator[Tensor]:
    """Indices ``[resamples, prompts]``, RESAMPLES rows in all."""
    generator = torch.Generator().manual_seed(seed)
    most = max(1, PICKS // prompts)
    for first in range(0, RESAMPLES, most):
        yield torch.randint(prompts, (min(most, RESAMPLES - first), prompts), generator=generator)
