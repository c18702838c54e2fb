"""Cache and CCA state after verification, against a fresh prefill of the accepted tokens: the same bits."""

import pytest
import torch

from blockdraft import RequestError
from generation.stepping import contents, forward, prefilled

TOKENS = torch.randint(5, 95, (64,), generator=torch.Generator().manual_seed(3)).tolist()


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), f"entry {i} differs"


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("accepted", range(16))
def test_commit_equals_fresh_prefill(tiny, prefix, accepted):
    cache = tiny.new_cache(512, 3)
    sequence = prefilled(tiny, cache, TOKENS[:prefix])
    block = TOKENS[prefix : prefix + accepted + 1] + [7] * (15 - accepted)  # drafts after the accepted ones are wrong
    forward(tiny, cache, [(sequence, block, 0)], [accepted + 1])
    fresh = prefilled(tiny, cache, TOKENS[: prefix + accepted + 1])
    assert sequence.length == fresh.length
    assert_same(contents(cache, sequence), contents(cache, fresh))


@pytest.mark.parametrize("prefix", [0, 1, 2, 17])
def test_draft_step_equals_fresh_prefill(tiny, prefix):
    """The rows of a mask group leave nothing behind."""
    cache = tiny.new_cache(512, 3)
    sequence = prefilled(tiny, cache, TOKENS[:prefix])
    forward(tiny, cache, [(sequence, TOKENS[prefix : prefix + 1], 16)], [1])
    assert_same(contents(cache, sequence), contents(cache, prefilled(tiny, cache, TOKENS[: prefix + 1])))


@pytest.mark.parametrize("prefix", [0, 1, 2, 17])
def test_commit_of_nothing_leaves_all_untouched(tiny, prefix):
    cache = tiny.new_cache(512, 2)
    sequence = prefilled(tiny, cache, TOKENS[:prefix])
    before = [x.clone() for x in contents(cache, sequence)]
    forward(tiny, cache, [(sequence, TOKENS[:16], 16)], [0])
    assert sequence.length == prefix
    assert_same(before, contents(cache, sequence))
    after = forward(tiny, cache, [(sequence, TOKENS[prefix : prefix + 1], 0)])[0]
    fresh = prefilled(tiny, cache, TOKENS[:prefix])
    assert torch.equal(after, forward(tiny, cache, [(fresh, TOKENS[prefix : prefix + 1], 0)])[0])


def test_rollback_leaves_all_untouched(tiny):
    from blockdraft.steps import Block, make_step

    cache = tiny.new_cache(512, 2)
    sequence = prefilled(tiny, cache, TOKENS[:9])
    before = [x.clone() for x in contents(cache, sequence)]
    step = make_step([Block(9, sequence.slot, sequence.pages, TOKENS[9:20])], cache.page_size)
    transaction = cache.begin(step, [sequence])
    tiny.decoder(transaction)
    transaction.rollback()
    assert_same(before, contents(cache, sequence))


@pytest.mark.parametrize("chunks", [(1,) * 40, (6, 1, 3, 30), (31, 1, 8), (33, 7)], ids=str)
def test_chunks_equal_one_prefill(tiny, chunks):
    cache = tiny.new_cache(512, 3)
    sequence, first, parts = cache.allocate(64), 0, []
    for size in chunks:
        parts += forward(tiny, cache, [(sequence, TOKENS[first : first + size], 0)], [size])
        first += size
    whole = cache.allocate(64)
    logits = forward(tiny, cache, [(whole, TOKENS[:40], 0)], [40])[0]
    assert torch.equal(torch.cat(parts), logits)
    assert_same(contents(cache, sequence), contents(cache, whole))


def test_released_room_is_used_again_and_clean(tiny):
    cache = tiny.new_cache(64, 1)
    first = prefilled(tiny, cache, TOKENS[:40], 64)
    kept = [x.clone() for x in contents(cache, first)]
    with pytest.raises(RequestError, match="no room"):
        cache.allocate(1)
    cache.release(first)
    assert_same(kept, contents(cache, prefilled(tiny, cache, TOKENS[:40], 64)))
    assert len(cache.free_pages) + 2 == cache.num_pages
