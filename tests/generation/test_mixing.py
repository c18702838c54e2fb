"""Logit mixing: nothing at 0, more drafts accepted with more of it, its distance to the AR law measured and bounded."""

from dataclasses import replace

import pytest

from blockdraft import SamplingParams, ZayaForCausalLM, bundled_model
from bundled_prompts import held_out_prompts

PARAMS = SamplingParams(max_tokens=64, seed=11, groups=0, ignore_eos=True, sampler="mixed")


@pytest.fixture(scope="module")
def model():
    return ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)


@pytest.fixture(scope="module")
def prompts():
    return [p[:120] for p in held_out_prompts(12)]


def tokens(outputs):
    return [o.token_ids for o in outputs]


def per_forward(outputs):
    return sum(o.stats.committed for o in outputs) / sum(o.stats.decode_forwards for o in outputs)


@pytest.mark.parametrize("verification", ["gumbel", "rejection", "match"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_mix_0_is_the_lossless_path(model, prompts, verification, temperature):
    params = replace(PARAMS, temperature=temperature, verification=verification, logprobs=0)
    mixed = model.generate(prompts[:4], params)
    lossless = model.generate(prompts[:4], replace(params, sampler="lossless"))
    assert tokens(mixed) == tokens(lossless)
    assert [o.logprobs for o in mixed] == [o.logprobs for o in lossless]
    assert all(o.stats.mixed == 0 and o.stats.kl is None for o in mixed)


@pytest.mark.parametrize("verification", ["gumbel", "rejection"])
def test_more_mixing_accepts_more_and_strays_further(model, prompts, verification):
    runs = [
        model.generate(prompts, replace(PARAMS, temperature=0.9, verification=verification, mix=mix))
        for mix in (0.0, 0.5, 0.9)
    ]
    speeds = [per_forward(outputs) for outputs in runs]
    assert speeds[0] < speeds[1] < speeds[2]
    kl = [sum(o.stats.kl * o.stats.mixed for o in outputs) for outputs in runs[1:]]
    distance = [sum(o.stats.total_variation * o.stats.mixed for o in outputs) for outputs in runs[1:]]
    assert 0 < kl[0] < kl[1]
    assert 0 < distance[0] < distance[1]


def test_mixing_is_not_lossless(model, prompts):
    plain = model.generate(prompts, replace(PARAMS, sampler="ar", temperature=0.9))
    mixed = model.generate(prompts, replace(PARAMS, temperature=0.9, mix=0.5))
    assert tokens(plain) != tokens(mixed)


def test_everything_is_accepted_at_mix_1(model, prompts):
    """The mixed law is then the draft's own, and the noise is shared."""
    for output in model.generate(prompts[:4], replace(PARAMS, temperature=0.9, mix=1.0)):
        histogram = output.stats.acceptance_histogram
        assert sum(histogram[:-1]) <= 1  # the last block may be shorter
        assert len(histogram) == 16


@pytest.mark.parametrize("limit", [0.001, 0.05])
def test_divergence_guard(model, prompts, limit):
    outputs = model.generate(prompts, replace(PARAMS, temperature=0.9, mix=0.5, mix_max_kl=limit))
    free = model.generate(prompts, replace(PARAMS, temperature=0.9, mix=0.5))
    assert 0 < sum(o.stats.mixed for o in outputs) < sum(o.stats.mixed for o in free)
    assert all(o.stats.kl is None or o.stats.kl <= 1.05 * limit for o in outputs)  # mixed states round in bfloat16
    assert any(o.stats.kl > limit for o in free)


def test_guard_0_is_lossless_but_for_equal_laws(model, prompts):
    plain = model.generate(prompts[:4], replace(PARAMS, sampler="ar", temperature=0.9))
    mixed = model.generate(prompts[:4], replace(PARAMS, temperature=0.9, mix=0.5, mix_max_kl=0.0))
    assert tokens(plain) == tokens(mixed)


def test_entropy_gate(model, prompts):
    free, sure, never = (
        model.generate(prompts[:6], replace(PARAMS, temperature=0.9, mix=0.5, mix_max_entropy=limit))
        for limit in (None, 0.5, 0.0)
    )
    mixed = [sum(o.stats.mixed for o in outputs) for outputs in (free, sure, never)]
    assert mixed[0] > mixed[1] > mixed[2] == 0


def test_fresh_logits_need_their_groups(model, prompts):
    """Without groups only the first token and those of draft forwards are mixed; with all of them every token is."""
    params = replace(PARAMS, temperature=0.9, mix=0.5, mix_source="fresh")
    for output in model.generate(prompts[:2], params):
        assert output.stats.draft_forwards <= output.stats.mixed <= 1 + output.stats.draft_forwards
    for output in model.generate(prompts[:2], replace(params, groups=16)):
        assert output.stats.mixed >= output.stats.tokens - 4  # the end of a request carries no groups


def test_lenience_accepts_more(model, prompts):
    params = replace(PARAMS, temperature=0.9, verification="rejection")
    strict, lenient = (model.generate(prompts, replace(params, lenience=value)) for value in (1.0, 4.0))
    assert per_forward(lenient) > 1.05 * per_forward(strict)
