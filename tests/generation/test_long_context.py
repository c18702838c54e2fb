"""Long contexts: positions, pages and windows far from the start. BLOCKDRAFT_TEST_FULL=1 goes to 131,072 tokens."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from blockdraft import SamplingParams, ZayaForCausalLM
from blockdraft.reference.model import Rows
from checkpoints import random_model, save, tiny_config

LENGTH = 131_072 if os.environ.get("BLOCKDRAFT_TEST_FULL") else 6_000
LAST = 33  # rows compared


@pytest.fixture(scope="module")
def reference():
    """A layer with a window, whose rows have a short past, and one that sees everything."""
    config = tiny_config(
        num_hidden_layers=2, layer_types=("hybrid_sliding", "hybrid"), max_position_embeddings=LENGTH, num_experts=2,
        num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=8,
    )  # fmt: skip
    return random_model(config)


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    folder = save(reference, tmp_path_factory.mktemp("long"))
    return ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32, kv_cache_tokens=LENGTH, progress=False)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(5, 95, (LENGTH,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def last_logits(reference, tokens, chunk=2048, overlap=8):
    """The first layer in pieces: a row depends on its window of 5 and the two tokens before each, 6 rows back."""
    first, second = reference.model.layers
    residuals, states = [], []
    for begin in range(0, len(tokens), chunk):
        start = max(0, begin - overlap)
        piece = tokens[start : begin + chunk][None]
        rows = Rows(torch.arange(piece.shape[1]) - 1, torch.arange(start, start + piece.shape[1]))
        embedded = reference.model.embed_tokens(piece)
        model = reference.model
        residual = (embedded + model.input_hidden_states_bias) * model.input_hidden_states_scale
        residual, state = first(residual, None, rows)
        residuals.append(residual[:, begin - start :])
        states.append(state[:, begin - start :])
    residual, state = torch.cat(residuals, 1), torch.cat(states, 1)
    x = attend(second.self_attn, second.input_layernorm(residual))
    residual = second.post_attention_residual_scale(x, residual[:, -LAST:])
    x, _ = second.mlp(second.post_attention_layernorm(residual), state[:, -LAST:])
    hidden = reference.model.norm(second.post_mlp_residual_scale(x, residual))
    return F.linear(hidden, reference.model.embed_tokens.weight)[0]


def attend(attention, x):
    """The last rows over all keys."""
    positions = torch.arange(x.shape[1])
    Q, K, V = attention.qkv_proj(x, Rows(positions - 1, positions))
    D = Q.shape[-1]
    K = attention.rotate(F.normalize(K, dim=-1) * (D**0.5 * attention.qk_norm.temp[:, None]), positions)
    Q = attention.rotate(F.normalize(Q[:, -LAST:], dim=-1) * D**0.5, positions[-LAST:])
    visible = positions[-LAST:, None] >= positions
    heads = (h.transpose(1, 2) for h in (Q, K, V))
    out = F.scaled_dot_product_attention(*heads, attn_mask=visible)
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def test_logits_at_the_end(model, reference, tokens):
    ours = model.logits(tokens[None])[0, -LAST:]
    expected = last_logits(reference, tokens)
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_the_reference_in_pieces_is_the_reference(reference, tokens):
    short = tokens[:300]
    with torch.no_grad():
        expected = reference(short[None])[0, -LAST:]
    assert torch.allclose(last_logits(reference, short, chunk=64), expected, atol=1e-4)


@pytest.mark.parametrize("groups", [0, 3])
def test_drafting_at_the_end(model, tokens, groups):
    """Up to the last position that the model knows."""
    params = SamplingParams(max_tokens=100, temperature=3.0, seed=1, groups=groups, ignore_eos=True)
    prompt = tokens[:-60].tolist()
    drafted = model.generate([prompt], params)[0]
    plain = model.generate([prompt], replace(params, sampler="ar"))[0]
    assert drafted.token_ids == plain.token_ids
    assert (drafted.finish_reason, len(drafted.token_ids)) == ("context", 60)
    assert drafted.stats.drafted > 0
