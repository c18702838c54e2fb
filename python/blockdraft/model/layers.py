"""The decoder as its formulas: each module holds packed weights and calls one or two operators.

Weights are buffers, packed for the device when a module is made from a checkpoint; there is no autograd. The trainable
twin is `blockdraft.reference.model`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blockdraft import ops
from blockdraft.model.config import ZayaConfig
from blockdraft.ops.pack_weight import pack_scales
from blockdraft.steps import Step

Read = Callable[[str], Tensor]
"""A tensor of the checkpoint by its native name, in the model's dtype (of one byte: as it is) and on its device."""


class LayerCache(NamedTuple):
    """What one layer reads and writes of the cache; shapes in `blockdraft.cache`."""

    k_pages: Tensor
    v_pages: Tensor
    conv_states: Tensor
    recurrent_states: Tensor


class PackedLinear(nn.Module):
    """``x @ weight.T``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Buffer(ops.pack_weight(weight))

    def forward(self, x: Tensor, out_float32: bool = False) -> Tensor:
        return ops.packed_linear(x, self.weight, self.out_features, out_float32)


class DraftAdapter(nn.Module):
    """``y + x @ down.T @ up.T`` for rows that draft; y as it is for the others.

    Args:
        pairs: down ``[rank, inputs]`` and up ``[outputs, rank]`` of each matrix whose outputs lie in y, in order.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        downs, ups = zip(*pairs, strict=True)
        self.down = PackedLinear(torch.cat(downs))
        self.up = PackedLinear(torch.block_diag(*ups))

    def forward(self, x: Tensor, y: Tensor, step: Step) -> Tensor:
        # Computed for all rows and chosen, since a graph's shapes must not depend on which rows draft.
        return torch.where(step.drafting, y + self.up(self.down(x)), y)


class ResidualNorm(nn.Module):
    """Merge into the residual stream, then the norm that follows it."""

    def __init__(self, read: Read, scaling: str, norm: str, eps: float) -> None:
        super().__init__()
        first = scaling == "model.input_"  # the start of the stream has nothing to merge into
        self.hidden_states_scale = nn.Buffer(read(scaling + "hidden_states_scale").float())
        self.hidden_states_bias = nn.Buffer(read(scaling + "hidden_states_bias").float())
        self.residual_scale = None if first else nn.Buffer(read(scaling + "residual_scale").float())
        self.residual_bias = None if first else nn.Buffer(read(scaling + "residual_bias").float())
        self.weight = nn.Buffer(read(norm).float())
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.residual_norm(
            x,
            residual,
            self.hidden_states_scale,
            self.hidden_states_bias,
            self.residual_scale,
            self.residual_bias,
            self.weight,
            self.eps,
        )


class Attention(nn.Module):
    """Compressed convolutional attention (CCA, arXiv 2510.04476)."""

    def __init__(self, config: ZayaConfig, read: Read, layer: int) -> None:
        super().__init__()
        prefix, D = f"model.layers.{layer}.self_attn.", config.head_dim
        qkv = [
            read(f"{prefix}qkv_proj.{name}.weight") for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")
        ]
        depthwise, grouped = (f"{prefix}qkv_proj.conv_qk_{name}." for name in ("depthwise", "grouped"))
        taps = read(grouped + "weight").view(-1, D, D, 2)  # [heads, out, in, tap]
        self.qkv_proj = PackedLinear(torch.cat(qkv))
        self.conv_qk_depthwise = nn.Buffer(read(depthwise + "weight")[:, 0].T.float().contiguous())  # [tap, C]
        self.conv_depthwise_bias = nn.Buffer(read(depthwise + "bias").float())
        self.conv_qk_grouped = nn.Buffer(ops.pack_weight(taps.transpose(2, 3).flatten(2).contiguous()))
        self.conv_grouped_bias = nn.Buffer(read(grouped + "bias").float())
        self.temp = nn.Buffer(read(prefix + "qk_norm.temp").float())
        self.o_proj = PackedLinear(read(prefix + "o_proj.weight"))
        self.inverse_frequencies = nn.Buffer(config.inverse_frequencies(layer).to(self.temp.device))
        self.softmax_scale = D**-0.5
        self.sliding_window = config.window(layer)
        self.qkv_adapter: DraftAdapter | None = None
        self.o_adapter: DraftAdapter | None = None

    def adapt(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Gives the matrices adapters, in the order of `tensor_names.ADAPTED`."""
        self.qkv_adapter, self.o_adapter = DraftAdapter(pairs[:-1]), DraftAdapter(pairs[-1:])

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Returns the output and the joint projection, from which the step is committed."""
        qkv = self.qkv_proj(x)
        if self.qkv_adapter is not None:
            qkv = self.qkv_adapter(x, qkv, step)
        q, k, v = ops.cca_mix(
            qkv,
            step.row_parents,
            step.row_positions,
            step.row_states,
            step.row_slots,
            cache.conv_states,
            cache.recurrent_states,
            self.conv_qk_depthwise,
            self.conv_depthwise_bias,
            self.conv_qk_grouped,
            self.conv_grouped_bias,
            self.temp,
            self.inverse_frequencies,
            cache.k_pages,
            cache.v_pages,
        )
        out = ops.block_attention(
            q,
            k,
            v,
            cache.k_pages,
            cache.v_pages,
            step.page_table,
            step.cu_rows,
            step.row_positions,
            step.row_prefix,
            step.row_group_begin,
            step.row_group_end,
            self.softmax_scale,
            self.sliding_window,
        )
        out = out.flatten(1)
        y = self.o_proj(out)
        return (y if self.o_adapter is None else self.o_adapter(out, y, step)), qkv


class MoE(nn.Module):
    """Top-1 mixture of experts whose router has a state running through depth."""

    def __init__(self, config: ZayaConfig, read: Read, layer: int, skip_identity: bool) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}.mlp."
        gate, mlp, experts = prefix + "gate.", prefix + "gate.router_mlp.", prefix + "experts."
        self.down_proj = nn.Buffer(ops.pack_weight(read(gate + "down_proj.weight")))
        self.down_proj_bias = nn.Buffer(read(gate + "down_proj.bias").float())
        self.router_states_scale = nn.Buffer(read(gate + "router_states_scale").float()) if layer > 0 else None
        self.norm_weight = nn.Buffer(read(mlp + "norm.weight").float())
        self.fc1 = nn.Buffer(ops.pack_weight(read(mlp + "fc1.weight")))
        self.fc1_bias = nn.Buffer(read(mlp + "fc1.bias").float())
        self.fc2 = nn.Buffer(ops.pack_weight(read(mlp + "fc2.weight")))
        self.fc2_bias = nn.Buffer(read(mlp + "fc2.bias").float())
        self.out_proj = nn.Buffer(ops.pack_weight(read(mlp + "out_proj.weight")))
        self.balancing_biases = nn.Buffer(read(gate + "balancing_biases").float())
        self.gate_up_proj = nn.Buffer(ops.pack_weight(read(experts + "gate_up_proj"), halves=2))
        self.expert_down_proj = nn.Buffer(ops.pack_weight(read(experts + "down_proj")))
        scaled = config.quantized_experts is not None
        self.gate_up_scales = nn.Buffer(pack_scales(read(experts + "gate_up_proj_scale"), 2)) if scaled else None
        self.expert_down_scales = nn.Buffer(pack_scales(read(experts + "down_proj_scale"))) if scaled else None
        self.intermediate_size = config.moe_intermediate_size
        self.skip_identity = skip_identity
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor, router_states: Tensor | None) -> tuple[Tensor, Tensor]:
        topk_ids, topk_weights, router_states = ops.moe_router(
            x,
            router_states,
            self.router_states_scale,
            self.down_proj,
            self.down_proj_bias,
            self.norm_weight,
            self.fc1,
            self.fc1_bias,
            self.fc2,
            self.fc2_bias,
            self.out_proj,
            self.balancing_biases,
            self.eps,
        )
        out = ops.moe_experts(
            x,
            topk_ids,
            topk_weights,
            self.gate_up_proj,
            self.expert_down_proj,
            self.intermediate_size,
            self.skip_identity,
            self.gate_up_scales,
            self.expert_down_scales,
        )
        return out, router_states


class DecoderLayer(nn.Module):
    """Attention and MoE, each followed by its merge and the norm of what comes next."""

    def __init__(self, config: ZayaConfig, read: Read, layer: int, skip_identity: bool) -> None:
        super().__init__()
        prefix, last = f"model.layers.{layer}.", layer + 1 == config.num_hidden_layers
        next_norm = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
        self.self_attn = Attention(config, read, layer)
        self.post_attention = ResidualNorm(
            read,
            prefix + "post_attention_residual_scale.",
            prefix + "post_attention_layernorm.weight",
            config.rms_norm_eps,
        )
        self.mlp = MoE(config, read, layer, skip_identity)
        self.post_mlp = ResidualNorm(read, prefix + "post_mlp_residual_scale.", next_norm, config.rms_norm_eps)

    def forward(
        self, x: Tensor, residual: Tensor, router_states: Tensor | None, step: Step, cache: LayerCache
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x ``[T, H]`` normed, residual ``[T, H]`` float32; returns both after the layer, router state, projection."""
        a, qkv = self.self_attn(x, step, cache)
        x, residual = self.post_attention(a, residual)
        m, router_states = self.mlp(x, router_states)
        x, residual = self.post_mlp(m, residual)
        return x, residual, router_states, qkv
