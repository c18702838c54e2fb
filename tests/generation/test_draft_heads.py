"""Checkpoints whose drafts have an output matrix of their own, with or without a bias by the token before."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockdraft import CheckpointError, ConfigError, SamplingParams, ZayaForCausalLM
from blockdraft.model.config import ZayaConfig
from checkpoints import config_json, random_model, save, tiny_config
from generation.stepping import forward, prefilled

PROMPT = torch.randint(5, 95, (20,), generator=torch.Generator().manual_seed(2)).tolist()
RANK = 12


@pytest.fixture(params=["separate", "markov"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """The tiny model with random matrices for the drafts."""
    model = random_model(tiny_config())
    save(model, tmp_path)
    generator = torch.Generator().manual_seed(3)
    H, V = model.config.hidden_size, model.config.vocab_size
    extra = {"diffusion_output_layer.weight": torch.randn(V, H, generator=generator) * 0.8}
    if kind == "markov":
        extra["diffusion_markov_head.w1"] = torch.randn(V, RANK, generator=generator)
        extra["diffusion_markov_head.w2"] = torch.randn(RANK, V, generator=generator)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), **extra}, path)
    values = config_json(model.config) | {"draft_head": kind, "markov_rank": RANK}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.fixture
def model(folder):
    return ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32, progress=False)


@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_lossless(model, groups, temperature):
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=4, groups=groups, ignore_eos=True)
    drafted = model.generate([PROMPT, PROMPT[:3]], params)
    plain = model.generate([PROMPT, PROMPT[:3]], replace(params, sampler="ar"))
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    assert sum(o.stats.drafted for o in drafted) > 0


def test_greedy_drafts_are_those_of_the_formula(model, folder, kind):
    """Draft k: argmax of h_k W_d^T + w1[token before] w2, in sequence; id 0 counts at multiples of 16."""
    weights = load_file(folder / "model.safetensors")
    embed, output = weights["model.embed_tokens.weight"], weights["diffusion_output_layer.weight"]
    tokens, seen = [], 0
    for event in model.stream([PROMPT], SamplingParams(max_tokens=30, groups=0, ignore_eos=True)):
        tokens += event.token_ids
        if event.kind != "draft" or not event.provisional:
            continue
        known = PROMPT + tokens
        cache = model.new_cache(256, 1)
        sequence = prefilled(model, cache, known[:-2])
        (logits,) = forward(model, cache, [(sequence, known[-2:-1], 16)])
        states = logits @ torch.linalg.pinv(embed.double()).float().T  # V >= H: the hidden states behind the logits
        expected, previous = [], known[-1]
        for k, state in enumerate(states[2:]):
            law = state @ output.T
            if kind == "markov":
                before = 0 if (len(known) + k) % 16 == 0 else previous
                law = law + weights["diffusion_markov_head.w1"][before] @ weights["diffusion_markov_head.w2"]
            previous = int(law.argmax())
            expected.append(previous)
        assert list(event.provisional) == expected[: len(event.provisional)]
        seen += 1
    assert seen > 5


def test_rejection_and_mixing_run(model):
    for changes in ({"verification": "rejection"}, {"sampler": "mixed", "mix": 0.4}):
        params = SamplingParams(max_tokens=30, temperature=0.9, seed=1, groups=2, ignore_eos=True, **changes)
        output = model.generate([PROMPT], params)[0]
        assert len(output.token_ids) == 30
        assert output.stats.drafted > 0
    assert output.stats.kl > 0


def test_missing_matrix(folder, kind):
    weights = load_file(folder / "model.safetensors")
    name = "diffusion_markov_head.w2" if kind == "markov" else "diffusion_output_layer.weight"
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        ZayaForCausalLM.from_pretrained(folder, progress=False)


def test_config_refusals():
    with pytest.raises(ConfigError, match="draft_head: wanted one of shared, separate, markov"):
        tiny_config(draft_head="own")
    with pytest.raises(ConfigError, match="markov_rank"):
        tiny_config(markov_rank=0)
    with pytest.raises(ConfigError, match="mask_parent: wanted 'previous' with draft_layout 'anchor_in_block'"):
        tiny_config(draft_layout="anchor_in_block", mask_parent="anchor")
    assert ZayaConfig.from_dict(config_json(tiny_config(draft_head="markov", markov_rank=8))).markov_rank == 8
