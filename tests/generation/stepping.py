"""Drives a decoder step by step, as the engine does, and shows what the cache holds."""

import torch
from torch import Tensor

from blockdraft import ZayaForCausalLM
from blockdraft.cache import Cache, CachedSequence
from blockdraft.reference.pages import read_keys
from blockdraft.steps import Block, Group, make_step


def forward(
    model: ZayaForCausalLM,
    cache: Cache,
    parts: list[tuple[CachedSequence, list[int], int | dict[int, int]]],
    commit: list[int] | None = None,
) -> list[Tensor]:
    """One forward over (sequence, tokens, masks); commits that many rows of each; returns logits of each part.

    masks: how many after the last token, or a group's size by the index of the token that it follows.
    """
    mask = model.config.mask_token_id
    blocks = []
    for s, tokens, masks in parts:
        groups = masks if isinstance(masks, dict) else {len(tokens) - 1: masks} if masks else {}
        blocks.append(Block(s.length, s.slot, s.pages, tokens, [Group(i, [mask] * n) for i, n in groups.items()]))
    step = make_step(blocks, cache.page_size, model.config.mask_parent)
    transaction = cache.begin(step, [s for s, _, _ in parts])
    logits = model.decoder.lm_head(model.decoder(transaction), out_float32=True)
    first = step.cu_rows[:-1]
    counts = [0] * len(parts) if commit is None else commit
    last = torch.tensor([int(f) + n - 1 if n else -1 for f, n in zip(first, counts, strict=True)], dtype=torch.int32)
    transaction.commit(counts, last)
    return list(logits.split([block.rows for block in blocks]))


def prefilled(model: ZayaForCausalLM, cache: Cache, tokens: list[int], room: int = 128) -> CachedSequence:
    """A sequence with these tokens committed in one forward."""
    sequence = cache.allocate(room)
    if tokens:
        forward(model, cache, [(sequence, tokens, 0)], [len(tokens)])
    return sequence


def contents(cache: Cache, sequence: CachedSequence) -> list[Tensor]:
    """Everything the cache knows of a sequence: keys, values and CCA state of all layers."""
    pages, D = torch.tensor(sequence.pages), cache.config.head_dim
    keys = [
        x for k, v in zip(cache.k_pages, cache.v_pages, strict=True) for x in read_keys(k, v, pages, sequence.length, D)
    ]
    return [*keys, cache.conv_states[:, sequence.slot], cache.recurrent_states[:, sequence.slot]]
