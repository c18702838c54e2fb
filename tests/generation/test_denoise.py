"""Iterative denoising: the engine's passes equal forwards made one by one, from a fresh cache each time."""

from dataclasses import replace
from math import exp

import pytest
import torch

from blockdraft import SamplingParams, ZayaForCausalLM
from blockdraft.steps import Block, Group, make_step
from checkpoints import random_model, save, tiny_config
from generation.stepping import prefilled

PROMPTS = [torch.randint(5, 95, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 9, 40)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request, tmp_path_factory):
    folder = save(random_model(tiny_config()), tmp_path_factory.mktemp("denoise"))
    return ZayaForCausalLM.from_pretrained(folder, dtype=getattr(torch, request.param), progress=False)


def by_hand(model, prompt, count, params):
    """Tokens and passes without any reuse: each pass has a new cache, in which all finished tokens are one prefill."""
    known, passes, mask = list(prompt), 0, model.config.mask_token_id
    while len(known) < len(prompt) + count:
        length = min(params.block_length or 16, len(prompt) + count - len(known))
        block, used = [None] * length, 0
        while None in block:
            cache = model.new_cache(256, 1)
            sequence = prefilled(model, cache, known)
            rows = [mask if t is None else t for t in block]
            group = Block(len(known), sequence.slot, sequence.pages, [], [Group(-1, rows)])
            step = make_step([group], cache.page_size, model.config.mask_parent)
            logits = model.decoder.lm_head(model.decoder(cache.begin(step, [sequence])), out_float32=True)
            used += 1
            fill(block, logits, params, used)
        known, passes = known + block, passes + used
    return known[len(prompt) :], passes


def fill(block, logits, params, used):
    law = logits.double().log_softmax(-1)
    best, token = law.max(-1)
    open_ = [i for i, t in enumerate(block) if t is None]
    left = max(1, (params.denoising_steps or len(block)) - used + 1)
    least = -(-len(open_) // left)
    if params.reveal == "entropy":
        h = -(law.exp() * law).sum(-1)
        open_.sort(key=lambda i: h[i])
        total = torch.tensor([h[i] for i in open_]).cumsum(0)
        count = int((total <= params.reveal_threshold).sum())
    else:
        open_.sort(key=lambda i: -best[i])
        sure = [i for i in open_ if exp(best[i]) >= params.reveal_threshold]
        count = 0 if params.reveal == "schedule" else len(sure)
    for i in open_[: max(least, count)]:
        block[i] = int(token[i])


RULES = [
    {"reveal": "schedule", "denoising_steps": 4, "reveal_threshold": 0.0},
    {"reveal": "schedule", "denoising_steps": 1, "reveal_threshold": 0.0},
    {"reveal": "schedule", "denoising_steps": 5, "block_length": 7, "reveal_threshold": 0.0},
    {"reveal": "confidence", "reveal_threshold": 0.3},
    {"reveal": "confidence", "reveal_threshold": 0.05, "denoising_steps": 3},
    {"reveal": "entropy", "reveal_threshold": 3.0},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
def test_equals_passes_made_by_hand(model, rule):
    params = SamplingParams(max_tokens=35, sampler="denoise", ignore_eos=True, **rule)
    outputs = model.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens, passes = by_hand(model, prompt, 35, params)
        assert output.token_ids == tokens
        assert output.stats.denoise_forwards + 1 == passes  # the prompt's last rows look at the first block


def test_batches_and_other_samplers_beside_it(model):
    params = SamplingParams(max_tokens=20, sampler="denoise", denoising_steps=3, reveal="schedule", ignore_eos=True)
    other = SamplingParams(max_tokens=20, groups=1, ignore_eos=True)
    alone = [model.generate([p], q)[0].token_ids for p, q in zip(PROMPTS, (params, other, params), strict=True)]
    together = model.generate(PROMPTS, [params, other, params])
    assert [o.token_ids for o in together] == alone


def test_sampling_repeats_and_differs(model):
    params = SamplingParams(max_tokens=20, sampler="denoise", temperature=1.0, seed=3, n=2, ignore_eos=True)
    first, again = (model.generate([PROMPTS[1]], params) for _ in range(2))
    assert [o.token_ids for o in first] == [o.token_ids for o in again]
    assert first[0].token_ids != first[1].token_ids


def test_stream_shows_the_block_as_it_fills(model):
    params = SamplingParams(max_tokens=16, sampler="denoise", denoising_steps=4, reveal="schedule", ignore_eos=True)
    events = list(model.stream([PROMPTS[1]], params))
    masks = [event.provisional.count(model.config.mask_token_id) for event in events]
    assert masks[:3] == [12, 8, 4]  # a random model may choose the mask token itself; this one does not here
    assert events[-1].finish_reason == "length"
    assert len(events[-1].output.token_ids) == 16


def test_stop_token_inside_a_block_ends_the_text(model):
    params = SamplingParams(max_tokens=32, sampler="denoise", denoising_steps=2, reveal="schedule", ignore_eos=True)
    tokens = model.generate([PROMPTS[2]], params)[0].token_ids
    output = model.generate([PROMPTS[2]], replace(params, stop=(tokens[20],)))[0]
    assert output.token_ids == tokens[: tokens.index(tokens[20]) + 1]
    assert output.finish_reason == "stop"
