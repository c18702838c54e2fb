"""The rejection rule inside the engine: the law of plain decoding, by a G-test, with a control that must fail."""

import os
from collections import Counter

import pytest
import torch

from blockdraft import SamplingParams, ZayaForCausalLM
from blockdraft.outputs import GenerationStats
from blockdraft.plan import CostTable, Offer, Planner, Price, Watch
from checkpoints import random_model, save, tiny_config

PROMPT = torch.randint(5, 95, (12,), generator=torch.Generator().manual_seed(5)).tolist()
SAMPLES = 8000 if os.environ.get("BLOCKDRAFT_TEST_FULL") else 2000
ALPHA = 1e-4
LAW = {"temperature": 6.0, "top_p": 0.9}  # the random model is very sure of itself


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save(random_model(tiny_config()), tmp_path_factory.mktemp("rules"))
    return ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32, max_batch_size=64, progress=False)


def law_of(logits: torch.Tensor) -> torch.Tensor:
    """Temperature and top-p of LAW, float64."""
    p = (logits.double() / LAW["temperature"]).softmax(-1)
    order = p.argsort(-1, descending=True)
    before = p.gather(-1, order).cumsum(-1) - p.gather(-1, order)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before < LAW["top_p"])
    return (p * kept) / (p * kept).sum(-1, keepdim=True)


@pytest.fixture(scope="module")
def exact(model):
    """Law of the second and of the third token, the ones before summed out."""
    V = model.config.vocab_size
    first = law_of(model.logits(torch.tensor([PROMPT]))[0, -1])
    second = torch.zeros(V, V, dtype=torch.float64)
    kept = first.nonzero()[:, 0].tolist()
    second[kept] = law_of(model.logits(torch.tensor([[*PROMPT, t] for t in kept]))[:, -1])
    joint = first[:, None] * second
    third = torch.zeros(V, dtype=torch.float64)
    pairs = [(a, b) for a in kept for b in second[a].nonzero()[:, 0].tolist()]
    laws = law_of(model.logits(torch.tensor([[*PROMPT, *pair] for pair in pairs]))[:, -1])
    for (a, b), law in zip(pairs, laws, strict=True):
        third += joint[a, b] * law
    assert (joint > 1e-3).sum() > 100  # a law worth testing
    return joint.sum(0), third


def p_value(counts: Counter, law: torch.Tensor) -> float:
    """G-test; ids expected fewer than 10 times are one cell. 0 for an id without probability."""
    if any(law[token] == 0 for token in counts):
        return 0.0
    expected = law * sum(counts.values())
    observed = torch.tensor([counts[i] for i in range(len(law))], dtype=torch.float64)
    large = expected >= 10
    cells = torch.cat([observed[large], observed[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    g = 2 * (cells * (cells.clamp_min(1e-300) / wanted).log()).sum()
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), g / 2).item()


def counts_of(model, verification: str, drafter, **changes) -> list[Counter]:
    params = SamplingParams(
        max_tokens=4,
        n=SAMPLES,
        seed=7,
        ignore_eos=True,
        verification=verification,
        drafter=drafter,
        **{"groups": 0} | LAW | changes,
    )
    outputs = model.generate([PROMPT], params)
    assert sum(o.stats.drafted for o in outputs) > SAMPLES
    return [Counter(o.token_ids[i] for o in outputs) for i in (1, 2)]


def bigram(tokens: list[int], count: int) -> list[int]:
    """A drafter that is right at times: what is likely here is a function of the last token."""
    return [(7 * tokens[-1] + i) % 90 + 5 for i in range(count)]


@pytest.mark.parametrize("drafter", ["mask", bigram], ids=["mask", "callable"])
@pytest.mark.parametrize("verification", ["rejection", "match", "gumbel"])
def test_law(model, exact, verification, drafter):
    for counts, law in zip(counts_of(model, verification, drafter), exact, strict=True):
        assert p_value(counts, law) > ALPHA


class Turns:
    """Stands in for the n-gram drafter: after tokens with even ids it drafts what `bigram` does."""

    matched = 0

    def __init__(self):
        self.tokens: list[int] = []

    def extend(self, tokens):
        self.tokens += tokens
        self.matched = 5 * (self.tokens[-1] % 2 == 0)

    def follow(self, token):
        before = self.matched
        self.extend([token])
        return before, False

    def draft(self, count):
        return bigram(self.tokens, count)


@pytest.mark.parametrize("verification", ["rejection", "gumbel"])
def test_law_with_two_sources(model, exact, verification, monkeypatch):
    """Drafts of n-grams, which are point masses, in the place of drafts of mask rows that wait, which are not."""
    monkeypatch.setattr("blockdraft.sample.NgramDrafter", Turns)
    monkeypatch.setattr(Price, "best_block", lambda *_: Offer(1e3, 4))
    monkeypatch.setattr(Watch, "next_period", lambda _: True)
    monkeypatch.setattr(model, "planner", Planner(CostTable((1, 512), (1.0, 1.1)), 16))
    drafted_by = Counter()
    verified = GenerationStats.count_verified
    monkeypatch.setattr(
        GenerationStats, "count_verified", lambda s, who, *rest: (drafted_by.update([who]), verified(s, who, *rest))
    )
    for counts, law in zip(counts_of(model, verification, "auto", groups=None), exact, strict=True):
        assert p_value(counts, law) > ALPHA
    assert min(drafted_by["mask"], drafted_by["ngram"]) > SAMPLES // 4


def test_lenience_is_found_out(model, exact):
    """Negative control: three times as many coins accept, and the G-test sees it."""
    params = {"sampler": "mixed", "lenience": 3.0}
    values = [p_value(c, law) for c, law in zip(counts_of(model, "rejection", "mask", **params), exact, strict=True)]
    assert min(values) < ALPHA


def test_rejection_accepts_more_than_matching(model):
    """1 - TV against sum p q: what the stored draft law is for."""
    accepted = {}
    for rule in ("rejection", "match"):
        params = SamplingParams(
            max_tokens=24, n=64, seed=1, temperature=6.0, ignore_eos=True, groups=0, verification=rule
        )
        accepted[rule] = sum(o.stats.accepted for o in model.generate([PROMPT], params))
    assert accepted["rejection"] > accepted["match"]
