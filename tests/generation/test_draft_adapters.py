"""Checkpoints whose drafting rows have low-rank additions: other rows keep their bits, these are as in training."""

from dataclasses import replace

import pytest
import torch

from blockdraft import SamplingParams, ZayaForCausalLM, convert
from blockdraft.model import decoder as decoder_module
from blockdraft.model.weights import read_adapters
from blockdraft.quantize import quantize
from blockdraft.steps import Block, Group, make_step
from checkpoints import random_model, save, tiny_config
from generation.recording import use_graphs
from generation.stepping import prefilled
from test_convert import CASES, draft_logits

B, MASK = 8, 4
PROMPT = torch.randint(5, 90, (24,), generator=torch.Generator().manual_seed(2)).tolist()


def adapted(folder, rank=3, scale=0.3, dtype=torch.float32, **changes):
    """Folders of a model without adapters and with random ones, and the second model as it is trained."""
    config = tiny_config(block_length=B, sliding_window=12, **changes)
    plain = save(random_model(config), folder / "plain", dtype)
    model = convert.load(plain, dtype=dtype)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in convert.add_adapters(model, rank):
            p.normal_(0, scale)
    convert.save(model, folder / "adapted", dtype=dtype)
    return plain, folder / "adapted", model


def load(folder, dtype=torch.float32):
    return ZayaForCausalLM.from_pretrained(folder, dtype=dtype, progress=False)


def states_of(model, groups=True):
    """Hidden states of three sequences in a step: causal rows with two groups, causal rows, and an anchor with one."""
    cache, blocks, sequences = model.new_cache(256, 3), [], []
    for length, rows, after in ((7, 4, (0, 3)), (5, 3, ()), (12, 1, (0,))):
        sequence = prefilled(model, cache, PROMPT[:length], 64)
        own = [Group(i, [MASK] * B) for i in after] if groups else []
        blocks.append(Block(length, sequence.slot, sequence.pages, PROMPT[length : length + rows], own))
        sequences.append(sequence)
    step = make_step(blocks, cache.page_size, model.config.mask_parent)
    return model.decoder(cache.begin(step, sequences)), step.drafting[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_causal_rows_keep_their_bits(tmp_path, rank, dtype):
    plain, folder, _ = adapted(tmp_path, rank, dtype=dtype)
    (before, drafting), (after, _) = (states_of(load(f, dtype)) for f in (plain, folder))
    assert drafting.tolist() == [False] * 4 + [True] * 16 + [False] * 4 + [True] * 8
    assert torch.equal(before[~drafting], after[~drafting])
    assert (before[drafting] != after[drafting]).any(1).all()
    alone, _ = states_of(load(folder, dtype), groups=False)
    assert torch.equal(alone, after[~drafting])


@pytest.mark.parametrize(("mask_parent", "draft_layout"), CASES)
@torch.no_grad()
def test_drafting_rows_are_those_of_training(tmp_path, mask_parent, draft_layout):
    plain, folder, reference = adapted(tmp_path, mask_parent=mask_parent, draft_layout=draft_layout)
    start = 16
    batch = convert.doubled_batch(torch.tensor([PROMPT]), reference.config)
    logits = reference(batch.input_ids, batch.rows)[0]
    first = len(PROMPT) + start + (draft_layout == "masks_after_anchor")
    expected = logits[first : len(PROMPT) + start + B]
    drafts, without = (draft_logits(load(f), PROMPT[:start], PROMPT[start], draft_layout) for f in (folder, plain))
    assert (drafts - expected).abs().max() <= 1e-5 * logits.abs().max()
    assert (without - expected).abs().max() > 0.05 * logits.abs().max()


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_lossless(tmp_path, groups, temperature):
    plain, folder, _ = adapted(tmp_path)
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=4, groups=groups, ignore_eos=True)
    prompts = [PROMPT, PROMPT[:3]]
    model = load(folder)
    drafted = model.generate(prompts, params)
    for decoder in (model, load(plain)):
        expected = decoder.generate(prompts, replace(params, sampler="ar"))
        assert [o.token_ids for o in drafted] == [o.token_ids for o in expected]
    assert sum(o.stats.drafted for o in drafted) > 0


def test_drafts_do_not_depend_on_the_batch(tmp_path):
    """Mixed laws emit what drafts say, so that rows that draft need the same bits in any company."""
    model = load(adapted(tmp_path)[1])
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=1, groups=1, ignore_eos=True, sampler="mixed", mix=0.5)
    together = model.generate([PROMPT, PROMPT[:7], PROMPT[3:]], params)
    alone = [model.generate([prompt], params)[0] for prompt in (PROMPT, PROMPT[:7], PROMPT[3:])]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert all(o.stats.mixed > 0 for o in alone)


def test_quantized_experts_keep_the_adapters(tmp_path):
    _, folder, _ = adapted(tmp_path)
    quantize(folder, tmp_path / "int8", progress=False)
    before, after = (read_adapters(f, load(f).config) for f in (folder, tmp_path / "int8"))
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    states, drafting = states_of(load(tmp_path / "int8"))
    assert torch.equal(states_of(load(tmp_path / "int8"), groups=False)[0], states[~drafting])


def test_graphs_of_steps_that_draft(tmp_path, monkeypatch):
    """On a GPU no forward is looked at for rows that draft: all of them go the way that knows adapters."""
    monkeypatch.setattr(decoder_module, "_may_draft", lambda step: True)
    model = load(adapted(tmp_path)[1])
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=1, groups=1, ignore_eos=True)
    prompts = [PROMPT, PROMPT[:7], PROMPT[3:]]
    events = [(e.token_ids, e.logprobs, e.provisional) for e in model.stream(prompts, params)]
    graphs = use_graphs(model)
    assert [(e.token_ids, e.logprobs, e.provisional) for e in model.stream(prompts, params)] == events
    assert graphs.capture.replays > 0


def test_forwards_without_drafting_rows_are_one_operator(tmp_path, monkeypatch):
    model = load(adapted(tmp_path)[1])
    calls = []
    monkeypatch.setattr(model.decoder, "_run_modules", lambda transaction: calls.append(transaction))
    model.generate([PROMPT], SamplingParams(max_tokens=5, sampler="ar", ignore_eos=True))
    assert calls == []
