"""The training objective of recipes/nano against slow, literal definitions."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "nano"))
tidar = pytest.importorskip("tidar")

from blockdraft.reference.model import Rows  # noqa: E402
from checkpoints import random_model, tiny_config  # noqa: E402


def literal_visible(length: int, block_length: int, offset: int) -> torch.Tensor:
    visible = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for i in range(2 * length):
        for j in range(2 * length):
            block_i, block_j = ((x % length - offset) // block_length for x in (i, j))
            if i < length:
                visible[i, j] = j <= i
            elif j < length:
                visible[i, j] = block_j < block_i  # clean tokens of strictly earlier blocks
            else:
                visible[i, j] = block_i == block_j  # the masks of its own block
    return visible


@pytest.mark.parametrize(("length", "block_length", "offset"), [(12, 4, 0), (13, 4, 3), (9, 16, 5), (16, 1, 0)])
@pytest.mark.parametrize("mask_parent", ["previous", "anchor"])
def test_rows(length, block_length, offset, mask_parent):
    rows = tidar.doubled_rows(length, block_length, offset, mask_parent)
    assert torch.equal(rows.visible, literal_visible(length, block_length, offset))
    assert rows.positions.tolist() == [*range(length), *range(length)]
    for t in range(length):
        assert rows.parents[t] == t - 1
        start = max(0, offset + (t - offset) // block_length * block_length)
        expected = start - 1 if mask_parent == "anchor" or t == start else length + t - 1
        assert rows.parents[length + t] == expected


def test_losses():
    logits, tokens, labels = torch.randn(3, 20, 7), torch.randint(7, (3, 10)), torch.randint(7, (3, 10))
    ar, diffusion = tidar.losses(logits, tokens, labels, 4, 1, 0.5, 2)
    log_probs = logits.log_softmax(-1)
    expected = [-log_probs[b, t, tokens[b, t + 1]] for b in range(2) for t in range(9)]
    assert ar.item() == pytest.approx(sum(expected).item() / len(expected), rel=1e-5)
    weights = {t: 0.5 ** ((t - 1) % 4) for t in range(1, 10)}
    expected = sum(-log_probs[b, 10 + t, labels[b, t]] * w for b in range(3) for t, w in weights.items())
    assert diffusion.item() == pytest.approx(expected.item() / (3 * sum(weights.values())), rel=1e-5)


@pytest.mark.parametrize("mask_parent", ["previous", "anchor"])
def test_training_rows_are_decoding_rows(tmp_path, mask_parent):
    """A mask block of the doubled sequence sees and follows what a draft step's group does, so its logits agree."""
    from blockdraft import ZayaForCausalLM
    from checkpoints import save
    from generation.stepping import forward, prefilled

    config = tiny_config(mask_parent=mask_parent)
    reference = random_model(config)
    model = ZayaForCausalLM.from_pretrained(save(reference, tmp_path), dtype=torch.float32, progress=False)
    tokens = torch.randint(5, 90, (24,))
    doubled = torch.cat([tokens, torch.full_like(tokens, config.mask_token_id)])[None]
    with torch.no_grad():
        logits = reference(doubled, tidar.doubled_rows(24, 8, 0, mask_parent))[0]
        causal = reference(tokens[None], Rows.causal(24))[0]
    assert torch.allclose(logits[:24], causal, atol=1e-5)  # masks do not touch clean rows
    cache = model.new_cache(64, 1)
    sequence = prefilled(model, cache, tokens[:15].tolist(), 32)
    drafted = forward(model, cache, [(sequence, tokens[15:16].tolist(), 8)])[0]
    scale = logits.abs().max()
    assert (drafted[1:] - logits[24 + 16 : 24 + 24]).abs().max() <= 1e-5 * scale
    assert (drafted[:1] - causal[15:16]).abs().max() <= 1e-5 * scale
