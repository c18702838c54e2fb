from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blockdraft import reference
from blockdraft.bench.subject import BLOCK, Case, Setting, Subject, block_starts, nbytes


class VerifyTokens(Case):
    """Sequences of one block each, of whose drafts four in five are accepted. All of it is a few hot bytes.

    PyTorch gets the rows of the blocks as an index made beforehand.
    """

    op = "verify_tokens"
    roundings = 0
    cold_bytes = 0

    def __init__(self, rows: int) -> None:
        self.cu_rows = block_starts(rows)
        self.lengths = self.cu_rows.diff()
        self.token_ids = torch.randint(1000, (rows,), dtype=torch.int32)
        accepted = torch.rand(rows) < 0.8
        self.chosen = torch.where(accepted, self.token_ids.roll(-1), self.token_ids.roll(-1) + 1)
        column = torch.arange(BLOCK)
        self.index = (self.cu_rows[:-1, None].long() + column).clamp_max(rows - 1)  # [B, BLOCK]
        self.drafted = column[1:] < self.lengths[:, None]  # [B, BLOCK - 1]
        self.touched_bytes = nbytes(self.token_ids, self.chosen, self.cu_rows) + 6 * nbytes(self.lengths)
        self.note = f"sequences: {len(self.lengths)}"

    def arguments(self, turn: int) -> tuple[Any, ...]:
        return self.token_ids, self.chosen, self.cu_rows, self.lengths, self.lengths

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        return self.token_ids, self.chosen, self.index, self.drafted, self.lengths

    @staticmethod
    def pytorch(
        token_ids: Tensor, chosen: Tensor, index: Tensor, drafted: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        equal = (token_ids[index[:, 1:]] == chosen[index[:, :-1]]) & drafted
        accepted = equal.long().cumprod(1).sum(1)
        committed = torch.minimum(accepted + 1, limits)
        last = index[:, 0] + committed - 1
        return accepted, committed, last, chosen[last]

    def first(self) -> tuple[Any, ...]:
        rows, one = int(self.cu_rows[1]), self.lengths[:1]
        return self.token_ids[:rows], self.chosen[:rows], self.cu_rows[:2], one, one

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(outputs, reference.verify_tokens(*self.arguments(0)), strict=True))


def subjects(setting: Setting) -> Iterator[Subject]:
    yield Subject("verify_tokens", VerifyTokens)
