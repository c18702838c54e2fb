import torch
from torch import Tensor


def verify_tokens(
    token_ids: Tensor, chosen: Tensor, cu_rows: Tensor, verify_lengths: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many rows of each sequence's block are committed, and which token comes next.

    The first ``verify_lengths[b]`` rows of sequence b are its anchor and its drafts; ``chosen[r]`` is the token that
    the model decides after row r. A draft is accepted while it equals the choice of the row before it. With shared
    noise this is exact: the emitted tokens are those of plain decoding with the same seed.

    Args:
        token_ids: ``[T]``, int32, tokens of the rows.
        chosen: ``[T]``, int32; only the entries of verified rows are read.
        cu_rows: ``[B + 1]``, int32, first row of each sequence, then T.
        verify_lengths: ``[B]``, int32, 1 + number of drafts; 0: a sequence without rows to keep.
        limits: ``[B]``, int32, the most rows to commit; 0 leaves the sequence untouched.

    Returns:
        Four ``[B]`` int32 tensors: ``accepted`` drafts, ``committed = min(accepted + 1, limits)`` rows, ``commit_rows``
        (the last committed row, -1 for none) and ``next_tokens`` (the choice of that row, -1 for none). On a GPU a
        sequence with a length or first row out of range is taken as one without rows to keep.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device, or (on the CPU) a length is out of range.
    """
    return torch.ops.blockdraft.verify_tokens(token_ids, chosen, cu_rows, verify_lengths, limits)


@torch.library.register_fake("blockdraft::verify_tokens")
def _(
    token_ids: Tensor, chosen: Tensor, cu_rows: Tensor, verify_lengths: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(limits), torch.empty_like(limits), torch.empty_like(limits), torch.empty_like(limits)
