from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blockdraft import ops, reference
from blockdraft.bench.subject import Case, Setting, Subject, block_starts


class CommitStates(Case):
    """Sequences of one block each, which commit some row of it, in all layers."""

    op = "commit_states"
    roundings = 0

    def __init__(self, setting: Setting, rows: int) -> None:
        s, starts = setting.shapes, block_starts(rows)
        lengths, delayed = starts.diff(), s.kv_heads * s.head_dim // 2
        B = len(lengths)
        self.starts = starts
        self.parents = torch.arange(rows, dtype=torch.int32) - 1
        self.parents[starts[:-1].long()] = -1
        self.commit_rows = starts[:-1] + (torch.rand(B) * lengths).to(torch.int32)
        self.slots = torch.arange(B, dtype=torch.int32)
        memory = (
            setting.normal(s.layers, rows, s.qkv_width),
            setting.normal(s.layers, B, 2, s.channels),
            setting.normal(s.layers, B, delayed),
        )
        self.copies, self.torch_copies = setting.copies(*memory), setting.copies(*memory)
        # Two rows of u and one of v_delayed are read and written; a first row reads the state instead of its parent.
        self.touched_bytes = 2 * B * s.layers * (2 * s.channels + delayed) * setting.dtype.itemsize
        self.cold_bytes = self.touched_bytes
        self.note = f"sequences: {B}"

    def places(self) -> tuple[Tensor, ...]:
        return self.parents, self.commit_rows, self.slots

    def arguments(self, turn: int) -> tuple[Any, ...]:
        qkv, *states = self.copies[turn]
        return qkv, *self.places(), *states

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        qkv, *states = self.torch_copies[turn]
        return qkv, *(x.long() for x in self.places()), *states

    @staticmethod
    def pytorch(qkv: Tensor, parents: Tensor, rows: Tensor, slots: Tensor, conv: Tensor, recurrent: Tensor) -> None:
        C, delayed = conv.shape[-1], recurrent.shape[-1]
        parent = parents[rows]
        older = torch.where((parent < 0)[:, None], conv[:, slots, 1], qkv[:, parent, :C])  # [L, B, C]
        conv[:, slots, 0] = older
        conv[:, slots, 1] = qkv[:, rows, :C]
        recurrent[:, slots] = qkv[:, rows, C + delayed :]

    def first(self) -> tuple[Any, ...]:
        (qkv, *states), rows = self.copies[0], int(self.starts[1])
        return qkv[:, :rows].contiguous(), self.parents[:rows], self.commit_rows[:1], self.slots[:1], *states

    def run(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return committed(ops.commit_states, arguments)

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(outputs, committed(reference.commit_states, self.arguments(0)), strict=True))


def committed(operator: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """States after the operator, sequences first; the arguments stay as they are."""
    *given, conv, recurrent = arguments
    states = conv.clone(), recurrent.clone()
    operator(*given, *states)
    return tuple(state[:, given[-1].long()].transpose(0, 1) for state in states)


def subjects(setting: Setting) -> Iterator[Subject]:
    yield Subject("commit_states", partial(CommitStates, setting))
