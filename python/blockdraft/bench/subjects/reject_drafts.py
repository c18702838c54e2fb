from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blockdraft.bench.subject import Case, Setting, Subject, nbytes, pick


class RejectDrafts(Case):
    """Drafts from a law near the target's, of which about two in three are accepted."""

    op = "reject_drafts"
    cold_bytes = 0

    def __init__(self, vocab_size: int, rows: int) -> None:
        self.logits = 3 * torch.randn(rows, vocab_size)
        self.draft_logits = self.logits + torch.randn(rows, vocab_size)
        self.draft_rows = torch.arange(rows, dtype=torch.int32)
        self.drafts = torch.cat([torch.multinomial(row.softmax(-1), 1) for row in self.draft_logits]).int()
        ones, zeros = torch.ones(rows), torch.zeros(rows)
        self.laws = ones, zeros.int(), ones, zeros, ones  # temperature, top_k, top_p, min_p, lenience
        self.uniforms = torch.rand(rows), torch.rand(rows)
        self.depth = 32  # exp and log, and a sum in blocks
        self.touched_bytes = nbytes(self.logits, self.draft_logits) + 52 * rows
        tokens, _ = self.pytorch(*self.torch_arguments(0))
        self.note = f"accepted: {int((tokens == self.drafts).sum())}"

    def arguments(self, turn: int) -> tuple[Any, ...]:
        return self.logits, self.draft_logits, self.draft_rows, self.drafts, *self.laws, *self.uniforms

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        return self.logits, self.draft_logits, self.drafts, *self.uniforms

    @staticmethod
    def pytorch(
        logits: Tensor, draft_logits: Tensor, drafts: Tensor, accept_uniforms: Tensor, residual_uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_p, q, d = logits.log_softmax(-1), draft_logits.softmax(-1), drafts[:, None].long()
        p = log_p.exp()
        accepted = accept_uniforms * q.gather(1, d)[:, 0] < p.gather(1, d)[:, 0]
        running = (p - q).clamp_min(0).cumsum(-1)
        drawn = torch.searchsorted(running, residual_uniforms[:, None] * running[:, -1:], right=True)[:, 0]
        tokens = torch.where(accepted, drafts, drawn)
        return tokens, log_p.gather(1, tokens[:, None])[:, 0]

    def first(self) -> tuple[Any, ...]:
        logits, draft_logits, *rest = self.arguments(0)
        return logits[:1], draft_logits[:1], *(t[:1] for t in rest)

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """A token counts as wrong by how far its uniform is from those that give it, so that a uniform at the border of
        two may be resolved either way. A few rows at a time: float64 of 262,272 ids, several times."""
        parts = [
            self.pairs_of(first, *(x[first : first + 4] for x in outputs)) for first in range(0, len(outputs[0]), 4)
        ]
        return [pair for part in parts for pair in part]

    def pairs_of(self, first: int, tokens: Tensor, logprobs: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = slice(first, first + len(tokens))
        drafts, accept, share = (x[rows] for x in (self.drafts, *self.uniforms))
        log_p = self.logits[rows].double().log_softmax(-1)
        p, q = log_p.exp(), self.draft_logits[rows].double().softmax(-1)
        over = accept * pick(q, drafts) / pick(p, drafts) - 1  # below 0: to be accepted
        running = (p - q).clamp_min(0).cumsum(-1)
        above = pick(running, tokens) / running[:, -1]
        below = above - pick((p - q).clamp_min(0), tokens) / running[:, -1]
        wrong = torch.where(tokens == drafts, over, torch.maximum(-over, torch.maximum(below - share, share - above)))
        return [(1 + wrong.clamp_min(0), torch.ones(len(tokens))), (logprobs, pick(log_p, tokens))]


def subjects(setting: Setting) -> Iterator[Subject]:
    yield Subject("reject_drafts", partial(RejectDrafts, setting.shapes.vocab_size))
