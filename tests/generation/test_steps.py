"""A step's columns are what its blocks say, row by row."""

import random

import pytest

from blockdraft.steps import EMPTY_SLOT, Block, Group, make_step


def random_block(rng: random.Random, slot: int, page_size: int) -> Block:
    length, causal = rng.randrange(40), rng.choice([0, 1, 1, 5, 17])
    pages = rng.sample(range(100), -(-(length + causal) // page_size) + rng.randrange(3))
    afters = rng.sample(range(-1, causal), rng.randrange(min(causal + 1, 4) + 1))
    groups = [Group(after, [7] * rng.randrange(1, 5), rng.randrange(3)) for after in afters]
    return Block(length, slot, pages, [rng.randrange(500) for _ in range(causal)], groups)


def causal_rows(block: Block, first: int, page_size: int) -> list[dict[str, int]]:
    rows = []
    for i, token in enumerate(block.token_ids):
        p = block.length + i
        rows.append(
            {
                "token_ids": token,
                "row_parents": first + i - 1 if i else -1,
                "row_positions": p,
                "row_states": block.slot,
                "row_slots": block.pages[p // page_size] * page_size + p % page_size,
                "row_prefix": p + 1,
                "row_group_begin": first,
                "row_group_end": first,
            }
        )
    return rows


def group_rows(block: Block, group: Group, first: int, at: int, mask_parent: str) -> list[dict[str, int]]:
    rows, seen = [], block.length + group.after + 1
    for i, token in enumerate(group.token_ids):
        anchor = first + group.after if group.after >= 0 else -1
        before = at + i - 1 if i else anchor
        rows.append(
            {
                "token_ids": token,
                "row_parents": {"previous": before, "anchor": anchor, "none": -1}[mask_parent],
                "row_positions": seen + group.skip + i,
                "row_states": EMPTY_SLOT if mask_parent == "none" else block.slot,
                "row_slots": -1,
                "row_prefix": seen,
                "row_group_begin": at,
                "row_group_end": at + len(group.token_ids),
            }
        )
    return rows


@pytest.mark.parametrize("mask_parent", ["previous", "anchor", "none"])
@pytest.mark.parametrize("page_size", [8, 32])
def test_random_steps(mask_parent, page_size):
    rng = random.Random(page_size)
    for _ in range(50):
        blocks = [random_block(rng, slot, page_size) for slot in rng.sample(range(1, 20), rng.randrange(1, 6))]
        rows, cu_rows = [], [0]
        for block in blocks:
            first = len(rows)
            rows += causal_rows(block, first, page_size)
            for group in block.groups:
                rows += group_rows(block, group, first, len(rows), mask_parent)
            cu_rows.append(len(rows))
        step = make_step(blocks, page_size, mask_parent)
        for name in (*causal_rows(Block(0, 1, [0], [1]), 0, 8)[0],):
            assert getattr(step, name).tolist() == [row[name] for row in rows], name
        assert step.cu_rows.tolist() == cu_rows
        assert step.state_slots.tolist() == [block.slot for block in blocks]
        width = max(len(block.pages) for block in blocks)
        assert step.page_table.tolist() == [block.pages + [0] * (width - len(block.pages)) for block in blocks]


def test_a_position_without_a_page():
    with pytest.raises(IndexError, match=r"make_step: wanted a page for position 16, got 2 pages of 8 tokens"):
        make_step([Block(15, 1, [3, 4], [7, 8])], 8)


def test_no_blocks():
    step = make_step([], 8)
    assert step.token_ids.numel() == 0
    assert step.cu_rows.tolist() == [0]
