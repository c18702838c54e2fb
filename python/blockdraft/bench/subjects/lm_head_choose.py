from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdraft import ops
from blockdraft.bench.subject import Case, Setting, Subject, nbytes, pick
from blockdraft.reference.lm_head_choose import gumbel

SEED, SAMPLE, POSITION = 1234, 0, 1000


@dataclass
class Head:
    """Weights, the rows of all cases, and what they should give; large, so made once."""

    hidden_states: Tensor  # [most rows, H]
    plain: Tensor  # [V, H]
    packed: Tensor

    @cached_property
    def logits(self) -> Tensor:
        """``[most rows, V]`` in float64."""
        x = self.hidden_states.double()
        return torch.cat([x @ part.double().T for part in self.plain.split(16384)], -1)

    @cached_property
    def noise(self) -> Tensor:
        """``[most rows, V]`` in float64, a few rows at a time: the reference has a dozen intermediates."""
        parts = (settings(4, 1.0, first) for first in range(0, len(self.hidden_states), 4))
        return torch.cat([gumbel(*part[4:], len(self.plain)) for part in parts])[: len(self.hidden_states)]


def settings(rows: int, temperature: float, first: int = 0) -> tuple[Tensor, ...]:
    """``temperature, top_k, top_p, min_p, seeds, samples, positions`` of neighbouring positions of one sample."""
    ints = torch.zeros(rows, dtype=torch.int32)
    positions = torch.arange(first, first + rows, dtype=torch.int32) + POSITION
    floats = (torch.full((rows,), temperature), ints, torch.ones(rows), torch.zeros(rows))
    return *floats, torch.full((rows,), SEED), ints + SAMPLE, positions


class LmHeadChoose(Case):
    """PyTorch computes no log-probability, and draws by softmax and multinomial."""

    op = "lm_head_choose"

    def __init__(self, head: Head, temperature: float, rows: int) -> None:
        self.head, self.temperature, self.rows = head, temperature, rows
        self.x, self.settings = head.hidden_states[:rows], settings(rows, temperature)
        self.depth = self.x.shape[1] + len(head.plain) // 64  # sums over the ids run in blocks and lanes
        self.cold_bytes = nbytes(head.packed)
        self.touched_bytes = self.cold_bytes + nbytes(self.x) + 8 * rows
        self.pytorch = self.sampled if temperature else self.greedy

    def arguments(self, turn: int) -> tuple[Any, ...]:
        return self.x, self.head.packed, len(self.head.plain), *self.settings

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        return self.x, self.head.plain

    @staticmethod
    def greedy(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight).argmax(-1)

    def sampled(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.multinomial((F.linear(x, weight).float() / self.temperature).softmax(-1), 1)[:, 0]

    def first(self) -> tuple[Any, ...]:
        return self.x[:1], self.head.packed, len(self.head.plain), *(t[:1] for t in self.settings)

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """The choice counts as wrong by what its score lacks to the best, so that equals may be resolved either way."""
        tokens, logprobs = outputs
        logits = self.head.logits[: self.rows]
        scores = logits / self.temperature + self.head.noise[: self.rows] if self.temperature else logits
        return [
            (pick(scores, tokens), scores.max(-1).values),
            (logprobs, pick(logits.log_softmax(-1), tokens)),
        ]


def subjects(setting: Setting) -> Iterator[Subject]:
    V, H = setting.shapes.vocab_size, setting.shapes.hidden_size
    plain = setting.normal(V, H, scale=H**-0.5)
    head = Head(setting.normal(setting.most_rows, H), plain, ops.pack_weight(plain))
    del plain
    yield Subject("lm_head_choose greedy", partial(LmHeadChoose, head, 0.0))
    yield Subject("lm_head_choose temperature 0.8", partial(LmHeadChoose, head, 0.8))
