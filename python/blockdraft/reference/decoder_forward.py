from collections.abc import Sequence

from torch import Tensor

from blockdraft.ops.decoder_forward import EXPERT_SCALES, LAYER_WEIGHTS, MERGE, MODEL_WEIGHTS
from blockdraft.reference.block_attention import block_attention
from blockdraft.reference.cca_mix import cca_mix
from blockdraft.reference.moe_experts import moe_experts
from blockdraft.reference.moe_router import moe_router
from blockdraft.reference.packed_embedding import packed_embedding
from blockdraft.reference.packed_linear import packed_linear
from blockdraft.reference.residual_norm import residual_norm


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
    """`blockdraft.ops.decoder_forward`, by the definitions of its operators."""
    model = dict(zip(MODEL_WEIGHTS, weights, strict=False))
    stacks = dict(zip(LAYER_WEIGHTS + EXPERT_SCALES, weights[len(MODEL_WEIGHTS) :], strict=False))
    input_scale, input_bias, input_norm, embedding = model.values()
    H, rows = len(input_norm), (row_parents, row_positions, row_states, row_slots)
    seen = (page_table, cu_rows, row_positions, row_prefix, row_group_begin, row_group_end)
    width = conv_states.shape[3] + 2 * recurrent_states.shape[2]
    x = packed_embedding(token_ids, embedding, vocab_size, H)
    x, residual = residual_norm(x, None, input_scale, input_bias, None, None, input_norm, eps)
    router_states: Tensor | None = None
    projections = token_ids.new_empty(len(layer_kinds), len(token_ids), width, dtype=x.dtype)
    for i, kind in enumerate(layer_kinds):
        states_scale = stacks["mlp.router_states_scale"][i - 1] if i else None
        w = {name: stack[i] for name, stack in stacks.items() if name != "mlp.router_states_scale"}
        attention, mlp = (
            {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}
            for prefix in ("self_attn.", "mlp.")
        )
        pages = k_pages[i], v_pages[i]
        projections[i] = packed_linear(x, attention["qkv_proj.weight"], width)
        q, k, v = cca_mix(
            projections[i],
            *rows,
            conv_states[i],
            recurrent_states[i],
            attention["conv_qk_depthwise"],
            attention["conv_depthwise_bias"],
            attention["conv_qk_grouped"],
            attention["conv_grouped_bias"],
            attention["temp"],
            inverse_frequencies[kind],
            *pages,
        )
        out = block_attention(q, k, v, *pages, *seen, softmax_scale, sliding_windows[kind])
        out = packed_linear(out.flatten(1), attention["o_proj.weight"], H)
        x, residual = merge(out, residual, [w[f"post_attention.{name}"] for name in MERGE], eps)
        ids, probabilities, router_states = moe_router(
            x,
            router_states,
            states_scale,
            mlp["down_proj"],
            mlp["down_proj_bias"],
            mlp["norm_weight"],
            mlp["fc1"],
            mlp["fc1_bias"],
            mlp["fc2"],
            mlp["fc2_bias"],
            mlp["out_proj"],
            mlp["balancing_biases"],
            eps,
        )
        out = moe_experts(
            x,
            ids,
            probabilities,
            mlp["gate_up_proj"],
            mlp["expert_down_proj"],
            intermediate_size,
            skip_identity,
            mlp.get("gate_up_scales"),
            mlp.get("expert_down_scales"),
        )
        x, residual = merge(out, residual, [w[f"post_mlp.{name}"] for name in MERGE], eps)
    return x, projections


def merge(x: Tensor, residual: Tensor, weights: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    scale, bias, residual_scale, residual_bias, norm_weight = weights
    return residual_norm(x, residual, scale, bias, residual_scale, residual_bias, norm_weight, eps)
