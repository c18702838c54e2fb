import torch
from torch import Tensor

from blockdraft.reference.pages import read_keys


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
    """`blockdraft.ops.block_attention`, row by row; float32, or float64 for float64 arguments."""
    T, Hq, D = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = Hq // k.shape[1]
    out = torch.empty_like(q)
    for b in range(len(cu_rows) - 1):
        rows = range(int(cu_rows[b]), int(cu_rows[b + 1]))
        length = max((int(row_prefix[t]) for t in rows), default=0)
        paged_k, paged_v = read_keys(k_pages, v_pages, page_table[b], length, D)  # [length, Hkv, D]
        for t in rows:
            prefix, begin, end = int(row_prefix[t]), int(row_group_begin[t]), int(row_group_end[t])
            keys = torch.cat([paged_k[:prefix], k[begin:end]]).to(wide)  # [keys, Hkv, D]
            values = torch.cat([paged_v[:prefix], v[begin:end]]).to(wide)
            first = max(0, int(row_positions[t]) - sliding_window + 1) if sliding_window else 0
            keys, values = (x[first:].repeat_interleave(groups, 1) for x in (keys, values))  # [keys, Hq, D]
            scores = torch.einsum("hd,khd->hk", q[t].to(wide), keys) * softmax_scale
            out[t] = torch.einsum("hk,khd->hd", scores.softmax(-1), values).to(q.dtype)
    return out
