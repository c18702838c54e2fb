"""What the tests of the operators share that draw tokens: arguments, laws written out, and a test of draws."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0, "samples": 0, "positions": 0}
DTYPES = {"top_k": torch.int32, "seeds": torch.int64, "samples": torch.int32, "positions": torch.int32}

# Arguments and values that they do not take.
WITHOUT_LAW = [("top_k", -1)]
WITHOUT_LAW += [("temperature", value) for value in (-1, math.nan, math.inf, 1e-7, 1e-30, 1e-45)]  # 1e-6 is the least
WITHOUT_LAW += [("top_p", value) for value in (0, -1, 1.5, math.nan)]
WITHOUT_LAW += [("min_p", value) for value in (-0.5, 1.5, math.nan)]
each_value_without_a_law = pytest.mark.parametrize(
    ("name", "value"), WITHOUT_LAW, ids=[f"{name}={value}" for name, value in WITHOUT_LAW]
)


def law_columns(T: int, **laws: Any) -> dict[str, Tensor]:
    """Every argument of OFF as a column of T; those not given are temperature 1 and no truncation."""
    values = {n: torch.as_tensor(x, dtype=DTYPES.get(n, torch.float32)) for n, x in (OFF | laws).items()}
    return {name: x.expand(T).contiguous() for name, x in values.items()}


def random_laws(T: int) -> dict[str, Tensor]:
    """Of every kind: greedy, plain, one truncation, all of them."""
    kind = torch.arange(T) % 6
    return {
        "temperature": torch.where(kind == 0, 0.0, 0.3 + 2 * torch.rand(T)),
        "top_k": torch.where((kind == 2) | (kind == 5), torch.randint(1, 40, (T,)), 0),
        "top_p": torch.where((kind == 3) | (kind == 5), 0.05 + 0.9 * torch.rand(T), 1.0),
        "min_p": torch.where((kind == 4) | (kind == 5), 0.3 * torch.rand(T), 0.0),
        "seeds": torch.randint(-(2**62), 2**62, (T,)),
        "samples": torch.randint(8, (T,)),
        "positions": torch.randint(100_000, (T,)),
    }


def law_of(logits: list[float], temperature: float, top_k: int = 0, top_p: float = 1, min_p: float = 0) -> list[float]:
    """Written from the docstring, apart from the definition in `reference`."""
    kept = set(range(len(logits)))
    if 0 < top_k < len(logits):
        limit = sorted(logits, reverse=True)[top_k - 1]
        kept = {i for i in kept if logits[i] >= limit}
    weight = [math.exp(x / temperature) for x in logits]
    if top_p < 1:
        total, mass = sum(weight[i] for i in kept), 0.0
        for limit in sorted({logits[i] for i in kept}, reverse=True):
            mass += sum(weight[i] for i in kept if logits[i] == limit)
            if mass >= top_p * total:
                break
        kept = {i for i in kept if logits[i] >= limit}
    kept = {i for i in kept if weight[i] >= min_p * max(weight)}
    return [weight[i] / sum(weight[j] for j in kept) if i in kept else 0.0 for i in range(len(logits))]


def assert_follows(draws: Tensor, law: Tensor) -> None:
    """G-test with Williams' correction at 1e-4; cells with less than five expected draws are pooled, where that is not
    enough with the least of the others."""
    counts, expected = torch.bincount(draws, minlength=len(law)).double(), law.double() * len(draws)
    assert not counts[law == 0].any(), "an id without probability was drawn"
    order = expected.argsort(descending=True)
    order = order[law[order] > 0]
    large = int((expected[order] >= 5).sum())
    cells = [x[order].tensor_split([large]) for x in (counts, expected)]
    (counts, rest), (expected, expected_rest) = cells
    if expected_rest.sum() >= 5:
        counts, expected = torch.cat([counts, rest.sum()[None]]), torch.cat([expected, expected_rest.sum()[None]])
    else:
        counts[-1] += rest.sum()
        expected[-1] += expected_rest.sum()
    k, n = len(counts), counts.sum()
    if k == 1:  # one id has all the probability
        return
    G = 2 * torch.special.xlogy(counts, counts / expected).sum()
    G = G / (1 + ((n / expected).sum() - 1) / (6 * n * (k - 1)))
    p = torch.special.gammaincc(torch.tensor((k - 1) / 2).double(), G / 2)
    assert p > 1e-4, f"G = {G:.1f} over {k} cells, p = {p:.2g}"
