"""The two losses of a doubled sequence, and their mean."""

import torch.nn.functional as F
from torch import Tensor

from blockdraft.convert.batch import Batch
from blockdraft.errors import RequestError


def losses(logits: Tensor, batch: Batch, ar_sequences: int | None = None) -> tuple[Tensor, Tensor]:
    """AR loss, labels shifted by one, and diffusion loss, labels aligned; nats per token.

    Args:
        logits: ``[B, 2T, V]`` of the batch.
        batch: What they are of.
        ar_sequences: The AR loss is that of the first so many sequences; default: all. Text that the model wrote itself
            belongs behind them, for it must not teach the model to repeat itself.

    Raises:
        RequestError: The logits are not of this batch.
    """
    B, T = batch.tokens.shape
    if logits.shape[:2] != (B, 2 * T):
        raise RequestError(f"losses: logits must be [B={B}, 2T={2 * T}, V], got {list(logits.shape)}")
    clean, drafts = logits[:ar_sequences, : T - 1], logits[:, T:]
    ar = F.cross_entropy(clean.flatten(0, 1), batch.tokens[:ar_sequences, 1:].flatten())
    each = F.cross_entropy(drafts.flatten(0, 1), batch.labels.flatten(), reduction="none").view(B, T)
    return ar, (each * batch.weights).sum() / (batch.weights.sum() * B)


def objective(ar: Tensor, diffusion: Tensor, alpha: float = 1.0) -> Tensor:
    """``(alpha * ar + diffusion) / (1 + alpha)``; TiDAR's alpha is 1."""
    return (alpha * ar + diffusion) / (1 + alpha)
