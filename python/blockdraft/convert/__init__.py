"""From an autoregressive checkpoint to one that drafts blocks: the TiDAR objective (arXiv 2511.08923, section 3).

Plain PyTorch with autograd; nothing of the package imports it. A training step is

    batch = convert.doubled_batch(tokens, model.config, offset)
    ar, diffusion = convert.losses(model(batch.input_ids, batch.rows, batch.previous), batch)
    convert.objective(ar, diffusion, alpha).backward()

on a model of `convert.load`, and `convert.save` writes a checkpoint for this package and for transformers.
"""

from blockdraft.convert.adapter import LowRank, add_adapters
from blockdraft.convert.batch import Batch, doubled_batch, doubled_rows, mask_weights, previous_tokens
from blockdraft.convert.checkpoint import MASK_CONTEXTS, config_dict, load, only_draft_head, save
from blockdraft.convert.losses import losses, objective

__all__ = [
    "MASK_CONTEXTS",
    "Batch",
    "LowRank",
    "add_adapters",
    "config_dict",
    "doubled_batch",
    "doubled_rows",
    "load",
    "losses",
    "mask_weights",
    "objective",
    "only_draft_head",
    "previous_tokens",
    "save",
]
