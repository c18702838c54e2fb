"""A step as rows: what prefill, decoding, drafting and verification have in common.

A sequence contributes causal rows at the positions from its length on, and optionally a group of mask rows after the
last of them. Rows know their parent (the row of the preceding token, -1 for the committed state), their position and
which keys they see; the operators know nothing else about a step.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

PREFILL, DRAFT, VERIFY, AR = "prefill", "draft", "verify", "ar"


@dataclass(frozen=True)
class Block:
    """The rows of one sequence in a step.

    Attributes:
        length: Committed tokens before the block.
        slot: Slot of its CCA state.
        pages: Its pages, in order.
        token_ids: Tokens of the causal rows, at positions length, length + 1, ...
        masks: Mask rows after the last causal row: a group that sees itself in both directions.
    """

    length: int
    slot: int
    pages: list[int]
    token_ids: list[int]
    masks: int = 0

    @property
    def rows(self) -> int:
        return len(self.token_ids) + self.masks


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

    def to(self, device: torch.device) -> "Step":
        return Step(*(getattr(self, f.name).to(device) for f in fields(self)))


def make_step(
    blocks: list[Block], page_size: int, mask_token_id: int | None = None, mask_parent: str = "previous"
) -> Step:
    """Lays the blocks' rows one behind the other.

    Args:
        blocks: One per sequence.
        page_size: Tokens of a page.
        mask_token_id: Token of the mask rows.
        mask_parent: What a mask row follows in the convolutions: "previous", the mask before it (the first one: the
            last causal row), or "anchor", the last causal row for all of them.
    """
    columns: list[list] = [[] for _ in range(8)]
    tokens, parents, positions, states, slots, prefix, begins, ends = columns
    cu_rows = [0]
    for block in blocks:
        first, causal = cu_rows[-1], len(block.token_ids)
        group = first + causal
        end = block.length + causal  # position after the last causal row
        last = first + block.rows
        tokens += [*block.token_ids, *[mask_token_id] * block.masks]
        parents += [-1, *range(first, group - 1)] if causal else []
        parents += range(group - 1, last - 1) if mask_parent == "previous" else [group - 1] * block.masks
        positions += range(block.length, block.length + block.rows)
        states += [block.slot] * block.rows
        slots += [block.pages[p // page_size] * page_size + p % page_size for p in range(block.length, end)]
        slots += [-1] * block.masks
        prefix += [*range(block.length + 1, end + 1), *[end] * block.masks]
        begins += [first] * causal + [group] * block.masks
        ends += [first] * causal + [last] * block.masks
        cu_rows.append(last)
    width = max((len(block.pages) for block in blocks), default=0)
    table = [block.pages + [0] * (width - len(block.pages)) for block in blocks]

    def ints(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return Step(
        token_ids=ints(tokens),
        row_parents=ints(parents),
        row_positions=ints(positions),
        row_states=ints(states),
        row_slots=torch.tensor(slots, dtype=torch.int64),
        row_prefix=ints(prefix),
        row_group_begin=ints(begins),
        row_group_end=ints(ends),
        cu_rows=ints(cu_rows),
        page_table=ints(table).reshape(len(blocks), width),
        state_slots=ints([block.slot for block in blocks]),
    )
