"""A step as rows: what prefill, decoding, drafting and verification have in common.

A sequence contributes causal rows at the positions from its length on, and groups of rows that draft: each follows one
of the causal rows and sees what that row sees, that row, and itself in both directions. Rows know their parent (the row
of the preceding token, -1 for the committed state), their position and which keys they see; the operators know nothing
else about a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from blockdraft._host import StepRows
from blockdraft.pieces import moved

PREFILL, DRAFT, VERIFY, AR, DENOISE = "prefill", "draft", "verify", "ar", "denoise"
EMPTY_SLOT = 0  # its state is that before any token: blockdraft.cache


@dataclass(frozen=True)
class Group:
    """Rows that see each other; never committed.

    Attributes:
        after: Index of the causal row it follows; -1: the committed tokens.
        token_ids: Mask tokens, or tokens revealed among them.
        skip: Positions left out between that row and the first of the group.
    """

    after: int
    token_ids: list[int]
    skip: int = 0


@dataclass(frozen=True)
class Block:
    """The rows of one sequence in a step: causal rows, then its groups, one behind the other.

    Attributes:
        length: Committed tokens before the block.
        slot: Slot of its CCA state.
        pages: Its pages, in order.
        token_ids: Tokens of the causal rows, at positions length, length + 1, ...
        groups: Any number, in any order.
    """

    length: int
    slot: int
    pages: list[int]
    token_ids: list[int]
    groups: Sequence[Group] = ()

    @property
    def rows(self) -> int:
        causal = len(self.token_ids)
        return causal + sum(len(group.token_ids) for group in self.groups) if self.groups else causal


@dataclass(frozen=True)
class Step:
    """Row descriptions as the operators take them (int32, row_slots int64): `ops.cca_mix`, `ops.block_attention`."""

    token_ids: Tensor  # [T]
    row_parents: Tensor  # [T]
    row_positions: Tensor  # [T]
    row_states: Tensor  # [T]
    row_slots: Tensor  # [T]
    row_prefix: Tensor  # [T]
    row_group_begin: Tensor  # [T]
    row_group_end: Tensor  # [T]
    cu_rows: Tensor  # [B + 1]
    page_table: Tensor  # [B, M]
    state_slots: Tensor  # [B]

    @property
    def drafting(self) -> Tensor:
        """``[T, 1]`` bool: the rows of groups."""
        return (self.row_group_end > self.row_group_begin)[:, None]

    def to(self, device: torch.device) -> Self:
        if self.token_ids.device == device:
            return self
        return type(self)(*moved([getattr(self, f.name) for f in fields(self)], device))


def make_step(blocks: list[Block], page_size: int, mask_parent: str = "previous") -> Step:
    """Lays the blocks' rows one behind the other (`csrc/host/step_rows.h`).

    Args:
        blocks: One per sequence.
        page_size: Tokens of a page.
        mask_parent: What a row of a group follows in the convolutions: "previous", the row before it (the first one:
            the causal row that the group follows), "anchor", that causal row for all of them, or "none", nothing.

    Raises:
        IndexError: A sequence without a page for one of its causal rows.
    """
    rows = StepRows(page_size, mask_parent == "previous", mask_parent == "none", EMPTY_SLOT)
    for block in blocks:
        rows.add(block.length, block.slot, block.pages, block.token_ids)
        for group in block.groups:
            rows.add_group(group.after, group.token_ids, group.skip)
    T, B, pages = rows.rows, rows.sequences, rows.width
    parts = torch.frombuffer(rows.packed(), dtype=torch.int32).split([2 * T, *[T] * 7, B + 1, B * pages, B])
    row_slots, tokens, parents, positions, states, prefix, begins, ends, cu_rows, page_table, state_slots = parts
    return Step(
        token_ids=tokens,
        row_parents=parents,
        row_positions=positions,
        row_states=states,
        row_slots=row_slots.view(torch.int64),
        row_prefix=prefix,
        row_group_begin=begins,
        row_group_end=ends,
        cu_rows=cu_rows,
        page_table=page_table.view(B, pages),
        state_slots=state_slots,
    )


def as_tensors(columns: Sequence[Sequence[float]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One for each list, as parts of one tensor: ten of their own cost a step of a small model 12 us."""
    values = [value for column in columns for value in column]
    return torch.tensor(values, dtype=dtype).split([len(column) for column in columns])
