from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blockdraft.bench.subject import Case, Setting, Subject, nbytes, pick
from blockdraft.bench.subjects.lm_head_choose import settings
from blockdraft.reference.lm_head_choose import gumbel


class ChooseTokens(Case):
    """Logits that were just written, so in the cache as far as they fit. PyTorch draws by softmax and multinomial and
    computes no log-probability."""

    op = "choose_tokens"
    cold_bytes = 0

    def __init__(self, vocab_size: int, temperature: float, rows: int) -> None:
        self.temperature = temperature
        self.logits = torch.randn(rows, vocab_size)
        self.settings = settings(rows, temperature)
        self.depth = 32  # exp and log, and a sum in blocks
        self.touched_bytes = nbytes(self.logits) + 8 * rows
        self.pytorch = self.sampled if temperature else self.greedy

    def arguments(self, turn: int) -> tuple[Any, ...]:
        return self.logits, *self.settings

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        return (self.logits,)

    @staticmethod
    def greedy(logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def sampled(self, logits: Tensor) -> Tensor:
        return torch.multinomial((logits / self.temperature).softmax(-1), 1)[:, 0]

    def first(self) -> tuple[Any, ...]:
        return self.logits[:1], *(t[:1] for t in self.settings)

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """The choice counts as wrong by what its score lacks to the best, as in `lm_head_choose`. A few rows at a time:
        the noise in float64 has a dozen intermediates."""
        parts = [
            self.pairs_of(first, *(x[first : first + 4] for x in outputs)) for first in range(0, len(outputs[0]), 4)
        ]
        return [pair for part in parts for pair in part]

    def pairs_of(self, first: int, tokens: Tensor, logprobs: Tensor) -> list[tuple[Tensor, Tensor]]:
        logits = self.logits[first : first + len(tokens)].double()
        if not self.temperature:
            return [(pick(logits, tokens), logits.max(-1).values), (logprobs, torch.zeros(len(tokens)))]
        log_p = (logits / self.temperature).log_softmax(-1)
        scores = log_p + gumbel(*settings(len(tokens), self.temperature, first)[4:], logits.shape[1])
        return [(pick(scores, tokens), scores.max(-1).values), (logprobs, pick(log_p, tokens))]


def subjects(setting: Setting) -> Iterator[Subject]:
    yield Subject("choose_tokens greedy", partial(ChooseTokens, setting.shapes.vocab_size, 0.0))
    yield Subject("choose_tokens temperature 0.8", partial(ChooseTokens, setting.shapes.vocab_size, 0.8))
