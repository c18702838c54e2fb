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
        return len(self.token_ids) + sum(len(group.token_ids) for group in self.groups)


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

    def to(self, device: torch.device) -> Self:
        if self.token_ids.device == device:
            return self
        return type(self)(*moved([getattr(self, f.name) for f in fields(self)], device))


class Rows:
    """Columns of a step in the making."""

    def __init__(self, page_size: int, mask_parent: str) -> None:
        self.page_size, self.mask_parent = page_size, mask_parent
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.positions: list[int] = []
        self.states: list[int] = []
        self.slots: list[int] = []
        self.prefix: list[int] = []
        self.begins: list[int] = []
        self.ends: list[int] = []

    def add_causal(self, block: Block) -> None:
        first, count, size = len(self.tokens), len(block.token_ids), self.page_size
        positions = range(block.length, block.length + count)
        self.tokens += block.token_ids
        self.parents += [-1, *range(first, first + count - 1)] if count else []
        self.positions += positions
        self.states += [block.slot] * count
        self.slots += [block.pages[p // size] * size + p % size for p in positions]
        self.prefix += [p + 1 for p in positions]
        self.begins += [first] * count
        self.ends += [first] * count

    def add_group(self, block: Block, group: Group, first_causal: int) -> None:
        first, count = len(self.tokens), len(group.token_ids)
        seen = block.length + group.after + 1
        detached = self.mask_parent == "none"
        parent = first_causal + group.after if group.after >= 0 and not detached else -1
        chained = self.mask_parent == "previous"
        self.tokens += group.token_ids
        self.parents += [parent, *range(first, first + count - 1)] if chained else [parent] * count
        self.positions += range(seen + group.skip, seen + group.skip + count)
        self.states += [EMPTY_SLOT if detached else block.slot] * count
        self.slots += [-1] * count
        self.prefix += [seen] * count
        self.begins += [first] * count
        self.ends += [first + count] * count


def make_step(blocks: list[Block], page_size: int, mask_parent: str = "previous") -> Step:
    """Lays the blocks' rows one behind the other.

    Args:
        blocks: One per sequence.
        page_size: Tokens of a page.
        mask_parent: What a row of a group follows in the convolutions: "previous", the row before it (the first one:
            the causal row that the group follows), "anchor", that causal row for all of them, or "none", nothing.
    """
    rows, cu_rows = Rows(page_size, mask_parent), [0]
    for block in blocks:
        rows.add_causal(block)
        for group in block.groups:
            rows.add_group(block, group, cu_rows[-1])
        cu_rows.append(len(rows.tokens))
    width = max((len(block.pages) for block in blocks), default=0)
    pages = [page for block in blocks for page in (*block.pages, *[0] * (width - len(block.pages)))]
    slots = [block.slot for block in blocks]
    columns = (rows.tokens, rows.parents, rows.positions, rows.states, rows.prefix, rows.begins, rows.ends)
    ints = as_tensors([*columns, cu_rows, pages, slots], torch.int32)
    return Step(
        token_ids=ints[0],
        row_parents=ints[1],
        row_positions=ints[2],
        row_states=ints[3],
        row_slots=torch.tensor(rows.slots, dtype=torch.int64),
        row_prefix=ints[4],
        row_group_begin=ints[5],
        row_group_end=ints[6],
        cu_rows=ints[7],
        page_table=ints[8].view(len(blocks), width),
        state_slots=ints[9],
    )


def as_tensors(columns: Sequence[Sequence[float]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One for each list, as parts of one tensor: ten of their own cost a step of a small model 12 us."""
    values = [value for column in columns for value in column]
    return torch.tensor(values, dtype=dtype).split([len(column) for column in columns])
