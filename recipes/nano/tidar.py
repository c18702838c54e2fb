"""The TiDAR objective (arXiv 2511.08923, section 3): a clean half and an all-mask half in one sequence, two losses.

Rows 0..T-1 are the clean tokens, causal. Rows T..2T-1 are masks: the mask at position t predicts token t; it sees the
clean tokens of strictly earlier blocks and the masks of its own block, in both directions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdraft.reference.model import Rows


def doubled_rows(
    length: int, block_length: int, offset: int, mask_parent: str = "anchor", device: str | torch.device = "cpu"
) -> Rows:
    """Blocks start at offset + k * block_length; the first one is shorter where offset is not 0.

    mask_parent says what a mask follows in the convolutions: "previous", the mask to its left (the first mask of a
    block: the clean token before the block), or "anchor", the clean token before the block for every mask.
    """
    position = torch.arange(length, device=device)
    block = (position - offset).div(block_length, rounding_mode="floor")
    start = (offset + block * block_length).clamp_min(0)
    mask_parents = start - 1
    if mask_parent == "previous":
        mask_parents = torch.where(position == start, position - 1, position - 1 + length)
    visible = torch.zeros(2 * length, 2 * length, dtype=torch.bool, device=device)
    visible[:length, :length] = position[:, None] >= position
    visible[length:, :length] = block[:, None] > block
    visible[length:, length:] = block[:, None] == block
    return Rows(torch.cat([position - 1, mask_parents]), position.repeat(2), visible)


def losses(
    logits: Tensor, tokens: Tensor, labels: Tensor, block_length: int, offset: int, decay: float, real: int
) -> tuple[Tensor, Tensor]:
    """AR loss (labels shifted by one) and diffusion loss (labels aligned); ``logits [B, 2T, V]``, others ``[B, T]``.

    `labels` is what the masks predict: the tokens, or the model's own continuation (branches.py). The j-th mask of a
    block weighs decay ** j: a draft counts only while all before it are right, so the first ones decide the
    acceptance. Position 0 is <bos>, which nothing predicts. The AR loss is that of the first `real` rows; the others
    are the model's own text, which must not teach it to repeat itself.
    """
    length = tokens.shape[1]
    ar = F.cross_entropy(logits[:real, : length - 1].flatten(0, 1), tokens[:real, 1:].flatten())
    index = (torch.arange(1, length, device=tokens.device) - offset) % block_length
    weight = decay ** index.float()
    each = F.cross_entropy(logits[:, length + 1 :].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    diffusion = (each.view(len(tokens), -1) * weight).sum() / (weight.sum() * len(tokens))
    return ar, diffusion
