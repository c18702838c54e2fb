"""A row's bits do not depend on its company: batch, place, what the others do, or the number of threads."""

import pytest
import torch
from torch import Tensor

from blockdraft import ZayaForCausalLM
from blockdraft.cache import Cache, CachedSequence
from generation.stepping import forward, prefilled

GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(5, 95, (n,), generator=GENERATOR).tolist() for n in (23, 1, 40, 2, 31, 65, 3, 33)]
BLOCK = torch.randint(5, 95, (16,), generator=GENERATOR).tolist()

# What the rows of a sequence are, as (tokens, masks): all are compared with the same rows one at a time.
KINDS = {"ar": (BLOCK[:1], 0), "verify": (BLOCK, 0), "draft": (BLOCK[:1], 16), "short": (BLOCK[:5], 0)}


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def one_by_one(model: ZayaForCausalLM, cache: Cache, sequence: CachedSequence, tokens: list[int], masks: int) -> Tensor:
    """Logits of causal rows decoded one a forward; with masks, of the whole draft step alone."""
    if masks:
        return forward(model, cache, [(sequence, tokens, masks)])[0]
    rows = [forward(model, cache, [(sequence, [token], 0)], [1])[0] for token in tokens]
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_rows_in_a_batch(tiny, kind, batch, place, threads):
    """The sequence under test stands first, in the middle or last among sequences that do all kinds of things."""
    tokens, masks = KINDS[kind]
    cache = tiny.new_cache(4096, batch + 1)
    alone = one_by_one(tiny, cache, prefilled(tiny, cache, PROMPTS[0]), tokens, masks)
    others = list(KINDS.values())
    parts = []
    index = {"first": 0, "middle": batch // 2, "last": batch - 1}[place]
    for i in range(batch):
        what = KINDS[kind] if i == index else others[i % len(others)]
        parts.append((prefilled(tiny, cache, PROMPTS[0] if i == index else PROMPTS[i % 8]), *what))
    together = forward(tiny, cache, parts)[index]
    assert torch.equal(together, alone)


def test_page_order_does_not_matter(tiny):
    cache = tiny.new_cache(1024, 2)
    straight = prefilled(tiny, cache, PROMPTS[5], 96)
    cache.free_pages = cache.free_pages[::-1]
    shuffled = prefilled(tiny, cache, PROMPTS[5], 96)
    assert straight.pages != shuffled.pages
    assert torch.equal(*(forward(tiny, cache, [(s, BLOCK, 16)])[0] for s in (straight, shuffled)))


def test_threads_do_not_matter(tiny):
    ids = torch.randint(5, 95, (3, 50), generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(tiny.logits(ids))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_test_can_fail(tiny):
    """Negative control: a product whose order of summation depends on the number of rows is found out."""
    weight = torch.randn(64, 2048)
    x = torch.randn(16, 2048)
    same = [torch.equal((x @ weight.T)[:1], x[:1] @ weight.T), torch.equal((x @ weight.T)[:2], x[:2] @ weight.T)]
    split = x[:, :1024] @ weight[:, :1024].T + x[:, 1024:] @ weight[:, 1024:].T
    assert not all([*same, torch.equal(split[:1], x[:1] @ weight.T)])
