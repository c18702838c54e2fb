import torch
from torch import Tensor


def cca_mix(
    qkv: Tensor,
    row_parents: Tensor,
    row_positions: Tensor,
    row_states: Tensor,
    row_slots: Tensor,
    conv_states: Tensor,
    recurrent_states: Tensor,
    conv_qk_depthwise: Tensor,
    conv_depthwise_bias: Tensor,
    conv_qk_grouped: Tensor,
    conv_grouped_bias: Tensor,
    temp: Tensor,
    inverse_frequencies: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the joint projection of each row to its query, key and value; writes keys and values into the pages.

    Compressed convolutional attention (arXiv 2510.04476; ZAYA1): depthwise and grouped causal convolutions over
    ``u = [q | k]``, means of the raw projections, L2 norm to ``sqrt(D)``, key temperature, partial rotary embedding,
    and a value of which the second half of the heads comes from the preceding token. The preceding token of a row is
    its parent, so one call serves prefill, decoding, verification, mask groups and packed sequences alike.

    C = (Hq + Hkv) * D. Rows of one sequence lie together; a parent comes before its rows. With dtype float32 or
    bfloat16 for all tensors not said to be otherwise:

    Args:
        qkv: ``[T, C + Hkv * D]``: q heads, k heads, v_proj_current, v_proj_delayed of the row.
        row_parents: ``[T]``, int32, a row of the same sequence, or -1: the committed state of the sequence.
        row_positions: ``[T]``, int32, absolute positions.
        row_states: ``[T]``, int32, slot of the row's sequence in the states.
        row_slots: ``[T]``, int64, key slot ``page * page_size + offset`` to write, or -1 to write none.
        conv_states: ``[S, 2, C]``, u of the last two committed tokens, older first; zeros before a sequence.
        recurrent_states: ``[S, Hkv * D / 2]``, v_proj_delayed of the last committed token; zeros before a sequence.
        conv_qk_depthwise: ``[2, C]``, float32, tap 0 (older) first.
        conv_depthwise_bias: ``[C]``, float32.
        conv_qk_grouped: ``pack_weight`` of ``[Hq + Hkv, D, 2 * D]``, a head's tap 0 (older) beside its tap 1.
        conv_grouped_bias: ``[C]``, float32.
        temp: ``[Hkv]``, float32, factor of the keys.
        inverse_frequencies: ``[rotary / 2]``, float32; pairs (i, i + rotary / 2), the rest of a head passes through.
        k_pages: ``[N, Hkv, page_size / 32, 32 * D]``, written in place.
        v_pages: ``[N, Hkv, page_size / 32, 32 * D rounded up to 32]``, written in place.

    Returns:
        ``q [T, Hq, D]``, ``k [T, Hkv, D]``, ``v [T, Hkv, D]``, as attention reads them.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device, or (on the CPU) an index is out of range.
    """
    return torch.ops.blockdraft.cca_mix(
        qkv,
        row_parents,
        row_positions,
        row_states,
        row_slots,
        conv_states,
        recurrent_states,
        conv_qk_depthwise,
        conv_depthwise_bias,
        conv_qk_grouped,
        conv_grouped_bias,
        temp,
        inverse_frequencies,
        k_pages,
        v_pages,
    )


@torch.library.register_fake("blockdraft::cca_mix")
def _(qkv: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    conv_qk_grouped, temp = arguments[8], arguments[10]
    T, (heads, _, D, _), kv_heads = qkv.shape[0], conv_qk_grouped.shape, temp.shape[0]
    return (
        qkv.new_empty([T, heads - kv_heads, D]),
        qkv.new_empty([T, kv_heads, D]),
        qkv.new_empty([T, kv_heads, D]),
    )
