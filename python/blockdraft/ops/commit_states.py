import torch
from torch import Tensor


def commit_states(
    qkv: Tensor,
    row_parents: Tensor,
    commit_rows: Tensor,
    state_slots: Tensor,
    conv_states: Tensor,
    recurrent_states: Tensor,
) -> None:
    """Moves the CCA state of every layer to the last committed row of each sequence.

    The state of a convolution is a slice of its past inputs: committing is a gather, and a rejected draft leaves
    nothing to undo. On a GPU, a sequence with an index out of range is left untouched.

    Args:
        qkv: ``[L, T, C + Hkv * D]``, float32 or bfloat16, what `cca_mix` read in each layer.
        row_parents: ``[T]``, int32, -1 or a row.
        commit_rows: ``[B]``, int32; -1 leaves the sequence untouched.
        state_slots: ``[B]``, int32, slot of each sequence.
        conv_states: ``[L, S, 2, C]``, written in place.
        recurrent_states: ``[L, S, Hkv * D / 2]``, written in place.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device, or (on the CPU) an index is out of range.
    """
    torch.ops.blockdraft.commit_states(qkv, row_parents, commit_rows, state_slots, conv_states, recurrent_states)


@torch.library.register_fake("blockdraft::commit_states")
def _(*_: Tensor) -> None:
    return None
