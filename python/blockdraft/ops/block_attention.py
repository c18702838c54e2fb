import torch
from torch import Tensor


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_rows: Tensor,
    row_positions: Tensor,
    row_prefix: Tensor,
    row_group_begin: Tensor,
    row_group_end: Tensor,
    softmax_scale: float,
    sliding_window: int = 0,
) -> Tensor:
    """Attention of query rows over a paged prefix and over the rows of their own mask group (GQA).

    Row t sees the keys at positions [0, row_prefix[t]) of its sequence in the pages, and the rows
    [row_group_begin[t], row_group_end[t]) of this call, which stand at the positions from row_prefix[t] on, in both
    directions. Visibility is these integers; there is no bias tensor. A causal row has row_prefix = position + 1 and
    an empty group; its own key is in the pages, where `cca_mix` wrote it.

    Softmax in float32 over blocks of 32 keys at absolute positions, in chunks of 512 merged in order: a row's bits
    depend on its own keys alone.

    Args:
        q: ``[T, Hq, D]``, float32 or bfloat16; D even, at most 256; Hq / Hkv at most 16.
        k, v: ``[T, Hkv, D]``, keys and values of the rows, read for mask groups.
        k_pages, v_pages: As `cca_mix` wrote them.
        page_table: ``[B, M]``, int32, pages of each sequence in order; entries past its length are not read.
        cu_rows: ``[B + 1]``, int32, first row of each sequence, then T.
        row_positions: ``[T]``, int32, for the sliding window.
        row_prefix: ``[T]``, int32.
        row_group_begin, row_group_end: ``[T]``, int32, rows of the same sequence; equal where a row has no group.
        softmax_scale: Factor of the scores, ``D ** -0.5`` in ZAYA1.
        sliding_window: Keys a row sees, itself included; 0 for all.

    Returns:
        ``[T, Hq, D]`` in the dtype of q.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device, or (on the CPU) an index is out of range.
    """
    return torch.ops.blockdraft.block_attention(
        q,
        k,
        v,
        k_pages,
        v_pages,
        page_table,
        cu_rows,
        row_positions,
        row_prefix,
        row_group_begin,
        row_group_end,
        softmax_scale,
        sliding_window,
    )


@torch.library.register_fake("blockdraft::block_attention")
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)
