from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MERGE = ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias", "weight")

MODEL_WEIGHTS = ("input.hidden_states_scale", "input.hidden_states_bias", "input.weight", "lm_head.weight")
LAYER_WEIGHTS = (
    "self_attn.conv_qk_grouped",
    "self_attn.temp",
    "self_attn.qkv_proj.weight",
    "self_attn.conv_qk_depthwise",
    "self_attn.conv_depthwise_bias",
    "self_attn.conv_grouped_bias",
    "self_attn.o_proj.weight",
    *(f"post_attention.{name}" for name in MERGE),
    "mlp.down_proj_bias",
    "mlp.balancing_biases",
    "mlp.down_proj",
    "mlp.router_states_scale",
    "mlp.norm_weight",
    "mlp.fc1",
    "mlp.fc1_bias",
    "mlp.fc2",
    "mlp.fc2_bias",
    "mlp.out_proj",
    "mlp.gate_up_proj",
    "mlp.expert_down_proj",
    *(f"post_mlp.{name}" for name in MERGE),
)
EXPERT_SCALES = ("mlp.gate_up_scales", "mlp.expert_down_scales")


def decoder_forward(
    token_ids: Tensor,
    row_parents: Tensor,
    row_positions: Tensor,
    row_states: Tensor,
    row_slots: Tensor,
    row_prefix: Tensor,
    row_group_begin: Tensor,
    row_group_end: Tensor,
    cu_rows: Tensor,
    page_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    conv_states: Tensor,
    recurrent_states: Tensor,
    weights: Sequence[Tensor],
    inverse_frequencies: Sequence[Tensor],
    sliding_windows: Sequence[int],
    layer_kinds: Sequence[int],
    vocab_size: int,
    intermediate_size: int,
    skip_identity: bool,
    softmax_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """All layers of ZAYA1, from token ids to normed hidden states: the operators of `blockdraft.model.layers` in turn.

    The bits are those of calling them one by one; a call costs what one of them does. Weights are named as the modules'
    buffers; each of a layer is one tensor for all layers, whose first axis is the layer.

    Args:
        token_ids: ``[T]``, int32.
        row_parents, row_positions, row_states: ``[T]``, int32, and row_slots, ``[T]``, int64, as `cca_mix` takes them.
        row_prefix, row_group_begin, row_group_end, cu_rows, page_table: int32, as `block_attention` takes them.
        k_pages, v_pages: ``[L, N, Hkv, page_size / 32, ...]``, changed in place.
        conv_states: ``[L, S, 2, C]``; recurrent_states: ``[L, S, Hkv * D / 2]``.
        weights: Those of MODEL_WEIGHTS, then those of LAYER_WEIGHTS with a first axis of L, and where experts have
            scales those of EXPERT_SCALES, likewise; in shapes and dtypes as the operators take them.
            ``mlp.router_states_scale``, which layer 0 has none of, begins with layer 1.
        inverse_frequencies: For each kind of layer ``[rotary / 2]``, float32.
        sliding_windows: For each kind of layer; 0 for none.
        layer_kinds: For each layer an index into these two.
        vocab_size, intermediate_size, skip_identity, softmax_scale, eps: As the operators take them.

    Returns:
        hidden_states ``[T, H]`` and projections ``[L, T, C + Hkv * D]``, from which the step is committed.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device, or (on the CPU) an index is out of range.
    """
    return torch.ops.blockdraft.decoder_forward(
        token_ids,
        row_parents,
        row_positions,
        row_states,
        row_slots,
        row_prefix,
        row_group_begin,
        row_group_end,
        cu_rows,
        page_table,
        k_pages,
        v_pages,
        conv_states,
        recurrent_states,
        weights,
        inverse_frequencies,
        sliding_windows,
        layer_kinds,
        vocab_size,
        intermediate_size,
        skip_identity,
        softmax_scale,
        eps,
    )


@torch.library.register_fake("blockdraft::decoder_forward")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    token_ids, k_pages, conv_states, recurrent_states, weights = (arguments[i] for i in (0, 10, 12, 13, 14))
    T, (L, _, _, C) = token_ids.shape[0], conv_states.shape
    return k_pages.new_empty(T, len(weights[0])), k_pages.new_empty(L, T, C + 2 * recurrent_states.shape[2])
