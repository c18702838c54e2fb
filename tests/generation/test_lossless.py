"""Drafting and verifying gives the tokens of plain decoding, in bfloat16 and float32, whatever the drafter.

BLOCKDRAFT_TEST_FULL=1 takes all 200 prompts, and 1,000 pairs of prompt and seed for each way to draft; otherwise a part
of them, chosen by a fixed seed. Unless a test says otherwise, drafting and verifying alternate (groups=0).
"""

import os
import random
from dataclasses import replace

import pytest
import torch

from blockdraft import SamplingParams, ZayaForCausalLM, bundled_model
from blockdraft.plan import CostTable, Planner
from bundled_prompts import held_out_prompts

FULL = bool(os.environ.get("BLOCKDRAFT_TEST_FULL"))
PROMPTS = 200 if FULL else 10
TOKENS = 96 if FULL else 64
PAIRS, PAIR_TOKENS = (1000, 64) if FULL else (12, 48)
LAWS = {
    "greedy": {"temperature": 0.0},
    "T0.7": {"temperature": 0.7},
    "T1-top-p0.9": {"temperature": 1.0, "top_p": 0.9},
    "T1-top-k-min-p": {"temperature": 1.0, "top_k": 20, "min_p": 0.05},
}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def model(request):
    return ZayaForCausalLM.from_pretrained(bundled_model(), dtype=getattr(torch, request.param), progress=False)


@pytest.fixture(scope="module")
def prompts():
    """Of different lengths, so that batches are ragged."""
    pieces = held_out_prompts(200)
    chosen = pieces if FULL else random.Random(0).sample(pieces, PROMPTS)
    return [piece[: 20 + 140 * i // len(chosen)] for i, piece in enumerate(chosen)]


@pytest.fixture(scope="module")
def plain(model, prompts):
    """Tokens of plain decoding, one prompt at a time, by law."""
    known = {}

    def decode(law: str) -> list[list[int]]:
        if law not in known:
            known[law] = [
                model.generate(p, params_of(law, i, sampler="ar"))[0].token_ids for i, p in enumerate(prompts)
            ]
        return known[law]

    return decode


def params_of(law: str, seed: int, **changes: object) -> SamplingParams:
    return replace(SamplingParams(max_tokens=TOKENS, seed=seed, groups=0, **LAWS[law]), **changes)


def assert_identical(outputs, expected):
    different = [i for i, (o, e) in enumerate(zip(outputs, expected, strict=True)) if o.token_ids != e]
    assert not different, f"{len(different)} of {len(expected)} differ, first: prompt {different[0]}"


@pytest.mark.parametrize("law", LAWS)
def test_one_at_a_time(model, prompts, plain, law):
    outputs = [model.generate(p, params_of(law, i))[0] for i, p in enumerate(prompts)]
    assert_identical(outputs, plain(law))
    assert sum(o.stats.verify_forwards for o in outputs) > 0
    if law == "greedy":
        assert sum(o.stats.accepted for o in outputs) > len(outputs)  # drafts are worth something


@pytest.mark.parametrize("law", LAWS)
def test_mixed_batches(model, prompts, plain, law):
    """Batches of 2 to 9, plain and drafting sequences side by side."""
    outputs, first, size = [], 0, 2
    while first < len(prompts):
        batch = range(first, min(first + size, len(prompts)))
        params = [params_of(law, i, sampler="ar" if i % 4 == 3 else "lossless") for i in batch]
        outputs += model.generate([prompts[i] for i in batch], params)
        first, size = first + size, size % 9 + 1 if size < 9 else 2
    assert_identical(outputs, plain(law))


@pytest.mark.parametrize("law", LAWS)
def test_adversarial_drafter(model, prompts, plain, law):
    noise = random.Random(7)
    drafter = lambda tokens, count: [noise.randrange(model.config.vocab_size) for _ in range(count)]  # noqa: E731
    params = [params_of(law, i, drafter=drafter) for i in range(len(prompts))]
    assert_identical(model.generate(prompts, params), plain(law))


@pytest.mark.parametrize("law", LAWS)
def test_oracle_drafter_commits_whole_blocks(model, prompts, plain, law):
    expected = plain(law)
    known = {tuple(model.encode(p)): e for p, e in zip(prompts, expected, strict=True)}

    def oracle(prompt: list[int]):
        def draft(tokens: list[int], count: int) -> list[int]:
            done = len(tokens) - len(prompt)
            return known[tuple(prompt)][done : done + count]

        return draft

    params = [params_of(law, i, drafter=oracle(model.encode(p))) for i, p in enumerate(prompts)]
    outputs = model.generate(prompts, params)
    assert_identical(outputs, expected)
    for output in outputs:
        histogram = output.stats.acceptance_histogram
        assert output.stats.draft_forwards == 0
        assert sum(histogram[:15]) <= 1  # the last block may be shorter
        if len(output.token_ids) == TOKENS:
            assert output.stats.verify_forwards + output.stats.ar_forwards == -(-(TOKENS - 1) // 16)


@pytest.fixture(scope="module")
def pairs(prompts):
    """(prompt, law, seed): every prompt again and again, with other noise and another law."""
    laws = list(LAWS)
    return [(prompts[i % len(prompts)], laws[(i + i // len(prompts)) % len(laws)], i) for i in range(PAIRS)]


@pytest.fixture(scope="module")
def plain_pairs(model, pairs):
    params = [params_of(law, seed, sampler="ar", max_tokens=PAIR_TOKENS) for _, law, seed in pairs]
    return [o.token_ids for o in model.generate([p for p, _, _ in pairs], params)]


def run_pairs(model, pairs, **changes):
    params = [params_of(law, seed, max_tokens=PAIR_TOKENS, **changes) for _, law, seed in pairs]
    return model.generate([p for p, _, _ in pairs], params)


@pytest.mark.parametrize("groups", [0, 1, 3, 16, (0, 5), None], ids=str)
def test_mask_groups(model, pairs, plain_pairs, groups):
    """Mask rows beside the verified ones change nothing; None leaves it to the planner."""
    outputs = run_pairs(model, pairs, groups=groups, drafter="mask")
    assert_identical(outputs, plain_pairs)
    if groups is not None:
        assert sum(o.stats.accepted for o in outputs) > 0
        planned = {name for o in outputs for name in o.stats.plan}
        most = groups if isinstance(groups, int) else len(groups)
        assert ("verify" if most == 0 else f"verify+{most}") in planned


@pytest.mark.parametrize("drafter", ["auto", "ngram", "random", "adversarial"])
def test_drafters(model, pairs, plain_pairs, drafter):
    """Without mask rows a number of groups has nothing to say; given, it must not harm. "auto" is "mask" with one."""
    groups = 16
    V, noise = model.config.vocab_size, random.Random(3)
    known = {(tuple(model.encode(p)), seed): e for (p, _, seed), e in zip(pairs, plain_pairs, strict=True)}

    def never_right(prompt: list[int], seed: int):
        """Knows the tokens of plain decoding, and proposes others."""
        expected = known[tuple(prompt), seed]
        return lambda tokens, count: [(t + 1) % V for t in expected[len(tokens) - len(prompt) :][:count]]

    def drafter_of(prompt: str, seed: int):
        if drafter in ("auto", "ngram"):
            return drafter
        if drafter == "random":
            return lambda tokens, count: [noise.randrange(V) for _ in range(count)]
        return never_right(model.encode(prompt), seed)

    params = [
        params_of(law, seed, max_tokens=PAIR_TOKENS, drafter=drafter_of(p, seed), groups=groups)
        for p, law, seed in pairs
    ]
    outputs = model.generate([p for p, _, _ in pairs], params)
    assert_identical(outputs, plain_pairs)
    assert sum(o.stats.drafted for o in outputs) > 0
    if drafter == "adversarial":
        assert sum(o.stats.accepted for o in outputs) == 0


@pytest.mark.parametrize("verification", ["gumbel", "match"])
def test_auto(model, pairs, plain_pairs, verification, monkeypatch):
    """Drafts of mask rows and of n-grams by turns, with groups beside both, in one batch."""
    monkeypatch.setattr(model, "planner", Planner(CostTable((1, 512), (1.0, 1.5)), 16))
    outputs = run_pairs(model, pairs, groups=None, drafter="auto", verification=verification)
    assert_identical(outputs, plain_pairs)
    for source in ("mask", "ngram"):
        assert sum(o.stats.accepted_by.get(source, 0) for o in outputs) > 0, source
    assert any("+" in name for o in outputs for name in o.stats.plan)


def test_auto_with_many_samples_and_plain_ones_beside(model, prompts):
    """Samples of a prompt share what the planner learns, and nothing else."""
    params = params_of("T0.7", 5, n=3, groups=None, drafter="auto")
    ways = [params, replace(params, sampler="ar"), replace(params, drafter="mask"), replace(params, drafter="ngram")]
    outputs = model.generate([prompts[1]] * 4, ways)
    assert [o.token_ids for o in outputs[:3]] * 3 == [o.token_ids for o in outputs[3:]]


def test_match_gives_the_tokens_of_plain_decoding(model, pairs, plain_pairs):
    outputs = run_pairs(model, pairs, verification="match")
    assert_identical(outputs, plain_pairs)


def test_rejection_is_plain_decoding_when_greedy(model, prompts, plain):
    outputs = model.generate(prompts, [params_of("greedy", i, verification="rejection") for i in range(len(prompts))])
    assert_identical(outputs, plain("greedy"))


@pytest.mark.parametrize("length", [2, 3, 7, 16, 32])
def test_block_lengths(model, prompts, plain, length):
    params = [params_of("T0.7", i, block_length=length) for i in range(4)]
    assert_identical(model.generate(prompts[:4], params), plain("T0.7")[:4])


def test_samples_differ_and_repeat(model, prompts):
    params = params_of("T0.7", 5, n=3)
    outputs = model.generate(prompts[:2], params)
    assert [(o.request, o.sample) for o in outputs] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert len({tuple(o.token_ids) for o in outputs[:3]}) == 3
    alone = model.generate(prompts[0], replace(params, sampler="ar"))
    assert [o.token_ids for o in alone] == [o.token_ids for o in outputs[:3]]


def test_queued_requests(model, prompts, plain):
    """More prompts than there is room for."""
    small = ZayaForCausalLM(
        model.config, model.decoder, model.tokenizer, model.dtype, model.device, kv_cache_tokens=300, max_batch_size=3
    )
    params = [params_of("greedy", i) for i in range(len(prompts))]
    assert_identical(small.generate(prompts[:8], params[:8]), plain("greedy")[:8])


def test_log_probabilities_equal_a_teacher_forced_pass(model, prompts):
    for output in model.generate(prompts[:4], params_of("T0.7", 1, logprobs=0)):
        ids = output.prompt_token_ids + output.token_ids
        law = model.logits(torch.tensor([ids])).log_softmax(-1)[0, len(output.prompt_token_ids) - 1 : -1]
        expected = law.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(output.logprobs), expected, atol=2e-5, rtol=0)


def test_the_test_can_fail(model, prompts, plain):
    """Negative control: other noise gives other tokens."""
    outputs = model.generate(prompts, [params_of("T0.7", i + 1) for i in range(len(prompts))])
    with pytest.raises(AssertionError, match="differ"):
        assert_identical(outputs, plain("T0.7"))
