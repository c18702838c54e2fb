from torch import Tensor


def commit_states(
    qkv: Tensor,
    row_parents: Tensor,
    commit_rows: Tensor,
    state_slots: Tensor,
    conv_states: Tensor,
    recurrent_states: Tensor,
) -> None:
    """`blockdraft.ops.commit_states`, sequence by sequence."""
    C, delayed = conv_states.shape[-1], recurrent_states.shape[-1]
    for row, slot in zip(commit_rows.tolist(), state_slots.tolist(), strict=True):
        if row < 0:
            continue
        parent = int(row_parents[row])
        conv_states[:, slot, 0] = conv_states[:, slot, 1] if parent < 0 else qkv[:, parent, :C]
        conv_states[:, slot, 1] = qkv[:, row, :C]
        recurrent_states[:, slot] = qkv[:, row, C + delayed :]
