"""The doubled sequence: T clean rows, causal, and T rows that draft, in blocks, all in one forward.

The row at T + t drafts token t. It sees the clean tokens before its block and, in both directions, its block: what a
mask group sees while decoding. No clean row sees it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blockdraft.errors import ConfigError, RequestError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.heads import MARKOV_PERIOD
from blockdraft.reference.model import Rows


@dataclass(frozen=True)
class Batch:
    """What a training step feeds and compares.

    Attributes:
        input_ids: ``[B, 2T]``, the tokens, then the rows that draft.
        rows: How these hang together.
        tokens: ``[B, T]``, what the clean rows predict, each the next one.
        labels: ``[B, T]``, what the rows that draft predict, each its own position.
        weights: ``[T]`` float32, of the labels; 0 where nothing is predicted.
        previous: ``[B, T]``, the token before each label, which a Markov head goes by; 0 where that forgets it.
    """

    input_ids: Tensor
    rows: Rows
    tokens: Tensor
    labels: Tensor
    weights: Tensor
    previous: Tensor


def _starts(length: int, block_length: int, offset: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Position, number of its block and where that begins, ``[T]`` each. The block before the first may be short."""
    position = torch.arange(length, device=device)
    block = (position - offset).div(block_length, rounding_mode="floor")
    return position, block, (offset + block * block_length).clamp_min(0)


def doubled_rows(
    length: int,
    block_length: int,
    offset: int = 0,
    mask_parent: str = "previous",
    draft_layout: str = "extra_first_mask",
    device: torch.device | str = "cpu",
) -> Rows:
    """Rows of a doubled sequence of T = `length` tokens.

    Args:
        length: Tokens.
        block_length: Rows of a block; they begin at offset + k * block_length.
        offset: 0 to block_length - 1. While decoding a block begins anywhere, so draw it anew for each batch.
        mask_parent, draft_layout: As in `ZayaConfig`. With ``masks_after_anchor`` a block has no row at its first
            position: the row is there, but no other sees or follows it. With ``anchor_in_block`` its first row is the
            clean token.
        device: Of the tensors.
    """
    position, block, start = _starts(length, block_length, offset, device)
    own = block[:, None] == block
    first = start
    if draft_layout == "masks_after_anchor":
        own = own & (position != start) | torch.eye(length, dtype=torch.bool, device=device)
        first = start + 1
    visible = torch.zeros(2 * length, 2 * length, dtype=torch.bool, device=device)
    visible[:length, :length] = position[:, None] >= position
    visible[length:, :length] = block[:, None] > block
    visible[length:, length:] = own
    parents = torch.cat([position - 1, _mask_parents(position, start, first, mask_parent)])
    return Rows(parents, position.repeat(2), visible, first_mask=length)


def _mask_parents(position: Tensor, start: Tensor, first: Tensor, mask_parent: str) -> Tensor:
    if mask_parent == "none":
        return torch.full_like(position, -1)
    if mask_parent == "anchor":
        return start - 1
    return torch.where(position <= first, start - 1, position - 1 + len(position))


def mask_weights(
    length: int,
    block_length: int,
    offset: int = 0,
    decay: float = 1.0,
    draft_layout: str = "extra_first_mask",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Weights ``[T]`` of the drafts' labels: the j-th row of a block weighs decay ** j.

    A draft counts only while all before it are right, so the first ones decide the acceptance. Position 0 is <bos>,
    which nothing predicts, and the first row of a block predicts nothing in layouts that have none or a token there.
    """
    position, _, start = _starts(length, block_length, offset, device)
    weights = decay ** ((position - offset) % block_length).float()
    idle = position == 0
    if draft_layout != "extra_first_mask":
        idle = idle | (position == start)
    return weights.masked_fill(idle, 0.0)


def previous_tokens(
    tokens: Tensor, labels: Tensor, block_length: int, offset: int = 0, draft_layout: str = "extra_first_mask"
) -> Tensor:
    """The token ``[B, T]`` before each label, as a Markov head is given it while decoding: 0 at multiples of 16.

    Within a block that is the label before, since a draft follows the block's drafts; before a block it is the text.
    """
    T = tokens.shape[1]
    position, _, start = _starts(T, block_length, offset, tokens.device)
    of_text = position == start
    if draft_layout == "anchor_in_block":
        of_text = of_text | (position == start + 1)  # its first row is the token itself
    previous = torch.where(of_text, tokens.roll(1, 1), labels.roll(1, 1))
    return previous.masked_fill(position % MARKOV_PERIOD == 0, 0)


def doubled_batch(
    tokens: Tensor, config: ZayaConfig, offset: int = 0, labels: Tensor | None = None, decay: float = 1.0
) -> Batch:
    """The batch of a training step.

    Args:
        tokens: ``[B, T]`` int64, one sequence a row.
        config: Its mask token, block length, layout and mask parent.
        offset: Where the blocks begin, 0 to block_length - 1.
        labels: ``[B, T]`` int64, what the rows that draft predict; default: the tokens. The model's own continuations
            are drafts that verification will accept.
        decay: See `mask_weights`.

    Raises:
        ConfigError: The config has no mask token.
        RequestError: A wrong shape or dtype, or an offset out of range.
    """
    labels = tokens if labels is None else labels
    _check(tokens, labels, config, offset, decay)
    T, c = tokens.shape[1], config
    drafting = torch.full_like(tokens, c.mask_token_id)
    if c.draft_layout == "anchor_in_block":
        position, _, start = _starts(T, c.block_length, offset, tokens.device)
        drafting = torch.where(position == start, tokens, drafting)
    rows = doubled_rows(T, c.block_length, offset, c.mask_parent, c.draft_layout, tokens.device)
    weights = mask_weights(T, c.block_length, offset, decay, c.draft_layout, tokens.device)
    previous = previous_tokens(tokens, labels, c.block_length, offset, c.draft_layout)
    return Batch(torch.cat([tokens, drafting], 1), rows, tokens, labels, weights, previous)


def _check(tokens: Tensor, labels: Tensor, config: ZayaConfig, offset: int, decay: float) -> None:
    if config.mask_token_id is None:
        raise ConfigError("doubled_batch: mask_token_id: wanted a token id in the config, got None")
    for name, ids in (("tokens", tokens), ("labels", labels)):
        if ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape != tokens.shape or ids.shape[1] < 2:
            wanted = "int64 [B, T >= 2]" if name == "tokens" else f"int64 {list(tokens.shape)} like tokens"
            raise RequestError(f"doubled_batch: {name} must be {wanted}, got {ids.dtype} {list(ids.shape)}")
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < config.block_length:
        wanted = f"an integer in [0, {config.block_length - 1}]"
        raise RequestError(f"doubled_batch: offset must be {wanted}, got {offset!r}")
    if not 0 < decay <= 1:
        raise RequestError(f"doubled_batch: decay must be in (0, 1], got {decay!r}")
