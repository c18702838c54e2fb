"""Mask groups beside verified rows: each is exactly what a forward of its own would give, and costs no head rows."""

from dataclasses import replace

import pytest
import torch

from blockdraft import SamplingParams, ZayaForCausalLM, bundled_model, ops
from blockdraft.plan import spread_levels
from blockdraft.steps import Block, Group, make_step
from checkpoints import random_model, save, tiny_config
from generation.stepping import forward, prefilled

GENERATOR = torch.Generator().manual_seed(8)
PREFIX = torch.randint(5, 95, (70,), generator=GENERATOR).tolist()
BLOCK = torch.randint(5, 95, (16,), generator=GENERATOR).tolist()


@pytest.fixture(params=["previous", "anchor", "none"])
def model(request, tiny):
    return ZayaForCausalLM(
        replace(tiny.config, mask_parent=request.param), tiny.decoder, None, tiny.dtype, tiny.device
    )  # fmt: skip


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 17, 64])
@pytest.mark.parametrize("groups", [1, 3, 16])
def test_every_group_equals_its_own_forward(model, prefix, groups):
    """The group after row i, beside all other rows, has the bits of a forward of rows 0..i and that group alone."""
    cache = model.new_cache(1024, 4)
    sequence = prefilled(model, cache, PREFIX[:prefix])
    levels = spread_levels(groups, 16)
    (together,) = forward(model, cache, [(sequence, BLOCK, dict.fromkeys(levels, 16))])
    for place, level in enumerate(levels):
        (alone,) = forward(model, cache, [(sequence, BLOCK[: level + 1], 16)])
        at = 16 + 16 * place
        assert torch.equal(together[: level + 1], alone[: level + 1])
        assert torch.equal(together[at : at + 16], alone[level + 1 :])


@pytest.mark.parametrize("accepted", range(16))
def test_groups_equal_a_draft_step_after_each_accept_length(model, accepted):
    """A group for `accepted` equals the group that follows when exactly those tokens are committed first."""
    cache = model.new_cache(1024, 4)
    sequence = prefilled(model, cache, PREFIX[:17])
    (together,) = forward(model, cache, [(sequence, BLOCK, dict.fromkeys(range(16), 16))])
    fresh = prefilled(model, cache, PREFIX[:17] + BLOCK[:accepted])
    (alone,) = forward(model, cache, [(fresh, BLOCK[accepted : accepted + 1], 16)])
    at = 16 + 16 * accepted
    assert torch.equal(together[at : at + 16], alone[1:])


def test_the_test_can_fail(model):
    """A group after another row, or one that sees one row more, has other bits."""
    cache = model.new_cache(1024, 4)
    sequence = prefilled(model, cache, PREFIX[:17])
    (right,) = forward(model, cache, [(sequence, BLOCK, {4: 16})])
    (other,) = forward(model, cache, [(sequence, BLOCK, {5: 16})])
    assert not torch.equal(right[16:], other[16:])


def test_columns_of_a_step():
    block = Block(9, 3, [7, 2], [50, 51, 52], [Group(0, [4, 4]), Group(2, [4, 60], skip=1)])
    chained = make_step([block], 8)
    assert chained.token_ids.tolist() == [50, 51, 52, 4, 4, 4, 60]
    assert chained.row_parents.tolist() == [-1, 0, 1, 0, 3, 2, 5]
    assert make_step([block], 8, "anchor").row_parents.tolist() == [-1, 0, 1, 0, 0, 2, 2]
    assert chained.row_positions.tolist() == [9, 10, 11, 10, 11, 13, 14]
    assert chained.row_prefix.tolist() == [10, 11, 12, 10, 10, 12, 12]
    assert chained.row_group_begin.tolist() == [0, 0, 0, 3, 3, 5, 5]
    assert chained.row_group_end.tolist() == [0, 0, 0, 5, 5, 7, 7]
    assert chained.row_slots.tolist() == [17, 18, 19, -1, -1, -1, -1]


def test_groups_without_causal_rows():
    step = make_step([Block(9, 0, [0, 1], [], [Group(-1, [4, 60, 4])])], 8)
    assert step.row_parents.tolist() == [-1, 0, 1]
    assert step.row_positions.tolist() == [9, 10, 11]
    assert step.row_prefix.tolist() == [9, 9, 9]


@pytest.mark.parametrize("block_length", [2, 3, 8, 16, 32])
def test_levels(block_length):
    for groups in range(33):
        levels = spread_levels(groups, block_length)
        assert len(set(levels)) == len(levels) == min(groups, block_length)
        assert all(0 <= level < block_length for level in levels)
        assert groups == 0 or block_length - 1 in levels  # all accepted
        assert groups < 2 or 0 in levels  # none accepted


def test_head_rows(monkeypatch):
    """The head reads the rows that decide and one group at most: never those of all groups."""
    counts = []
    real = ops.lm_head_choose

    def spy(hidden_states, *args):
        counts.append(len(hidden_states))
        return real(hidden_states, *args)

    monkeypatch.setattr(ops, "lm_head_choose", spy)
    model = ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)
    output = model.generate(["import os\n\n\ndef "], SamplingParams(max_tokens=64, groups=16, ignore_eos=True))[0]
    assert output.stats.plan["verify+16"] > 3
    assert max(counts) <= 16


def test_closest_lower_group_is_used():
    """Groups for 0 accepted drafts alone are never a miss, those for 15 mostly are; both keep the tokens."""
    model = ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)
    by_groups = {
        groups: model.generate(["import os\n\n\ndef "], SamplingParams(max_tokens=80, groups=groups, ignore_eos=True))[
            0
        ]
        for groups in (0, (0,), (15,), 16)
    }
    assert len({tuple(o.token_ids) for o in by_groups.values()}) == 1
    low, high, every = (by_groups[groups].stats for groups in ((0,), (15,), 16))
    assert 0 < high.missed_groups <= high.draft_forwards
    assert every.draft_forwards == every.missed_groups == 0
    assert low.missed_groups <= sum(low.acceptance_histogram[15:])  # its drafts end where 15 are accepted
    assert every.tokens_per_forward > by_groups[0].stats.tokens_per_forward


@pytest.mark.parametrize("layout", ["extra_first_mask", "masks_after_anchor", "anchor_in_block"])
@pytest.mark.parametrize("groups", [0, 2])
def test_layouts(tmp_path, layout, groups):
    """Drafts of every layout come from the rows that it says, at the positions after the next anchor."""
    groups = 0 if layout == "anchor_in_block" else groups
    folder = save(random_model(tiny_config(draft_layout=layout, block_length=6)), tmp_path)
    model = ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32, progress=False)
    params = SamplingParams(max_tokens=30, ignore_eos=True, groups=groups)
    plain = model.generate([PREFIX[:20]], replace(params, sampler="ar"))[0]
    seen, tokens = 0, []
    for event in model.stream([PREFIX[:20]], params):
        tokens += event.token_ids
        if event.provisional and (event.kind != "verify" or event.accepted in event.plan[1]):
            assert list(event.provisional) == drafts_by_hand(model, layout, PREFIX[:20] + tokens)
            seen += 1
    assert tokens == plain.token_ids
    assert seen > 3


def drafts_by_hand(model, layout, known):
    """Greedy drafts after known tokens, of which the last is the anchor, from a forward of its own."""
    committed, anchor, mask = known[:-1], known[-1], model.config.mask_token_id
    cache = model.new_cache(256, 1)
    if layout == "anchor_in_block":
        sequence = prefilled(model, cache, committed)
        block = Block(len(committed), sequence.slot, sequence.pages, [], [Group(-1, [anchor] + [mask] * 5)])
    else:
        sequence = prefilled(model, cache, committed[:-1])
        group = Group(0, [mask] * 6) if layout == "extra_first_mask" else Group(0, [mask] * 5, skip=1)
        block = Block(len(committed) - 1, sequence.slot, sequence.pages, committed[-1:], [group])
    step = make_step([block], cache.page_size, model.config.mask_parent)
    logits = model.decoder.lm_head(model.decoder(cache.begin(step, [sequence])), out_float32=True)
    return logits[-5:].argmax(-1).tolist()
