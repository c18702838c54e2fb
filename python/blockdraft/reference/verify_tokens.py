import torch
from torch import Tensor


def verify_tokens(
    token_ids: Tensor, chosen: Tensor, cu_rows: Tensor, verify_lengths: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`blockdraft.ops.verify_tokens`, sequence by sequence."""
    results = []
    for first, length, limit in zip(cu_rows.tolist(), verify_lengths.tolist(), limits.tolist(), strict=False):
        drafts = range(first + 1, first + length)
        right = int((token_ids[list(drafts)] == chosen[[r - 1 for r in drafts]]).long().cumprod(0).sum())
        kept = min(right + 1, max(0, limit), length)
        last = first + kept - 1 if kept else -1
        results.append((right, kept, last, int(chosen[last]) if kept else -1))
    columns = torch.tensor(results, dtype=torch.int32).reshape(-1, 4)
    accepted, committed, commit_rows, next_tokens = (column.contiguous() for column in columns.unbind(1))
    return accepted, committed, commit_rows, next_tokens
