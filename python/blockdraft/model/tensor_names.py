"""The tensors of a ZAYA1 checkpoint: their shapes, and what the older layout of alternating half-layers calls them."""

import re

from blockdraft.model.config import ZayaConfig
from blockdraft.model.expert_formats import EXPERT_FORMATS

RESIDUAL_SCALE = ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias")

# The drafts' own matrices, where config.draft_head says that there are some; named as the vendor's checkpoints do.
OUTPUT = "diffusion_output_layer.weight"
MARKOV_IN, MARKOV_OUT = "diffusion_markov_head.w1", "diffusion_markov_head.w2"

# Matrices of a layer that take an adapter, below its prefix (`blockdraft.convert.add_adapters`).
ADAPTED = (
    *(f"self_attn.qkv_proj.{name}" for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")),
    "self_attn.o_proj",
)

FLOATS = ("F32", "BF16", "F16")
QUANTIZED = (".experts.gate_up_proj", ".experts.down_proj")
SCALES = (".experts.gate_up_proj_scale", ".experts.down_proj_scale")

# Native to older names, below a layer's prefix; attention is half-layer 2l, MoE is 2l + 1.
LEGACY_ATTENTION = {
    "input_layernorm.": "input_norm.",
    "self_attn.qkv_proj.q_proj.": "self_attn.qkv.linear_q.",
    "self_attn.qkv_proj.k_proj.": "self_attn.qkv.linear_k.",
    "self_attn.qkv_proj.v_proj_current.": "self_attn.qkv.val_proj1.",
    "self_attn.qkv_proj.v_proj_delayed.": "self_attn.qkv.val_proj2.",
    "self_attn.qkv_proj.conv_qk_depthwise.": "self_attn.qkv.conv_qk.0.",
    "self_attn.qkv_proj.conv_qk_grouped.": "self_attn.qkv.conv_qk.1.",
    "self_attn.qk_norm.": "self_attn.qkv.",
    "self_attn.o_proj.": "self_attn.o_proj.",
}
LEGACY_MOE = {
    "post_attention_residual_scale.": "res_scale.",
    "post_attention_layernorm.": "input_norm.",
    "mlp.gate.router_mlp.norm.": "zaya_block.router.rmsnorm_eda.",
    "mlp.gate.router_mlp.fc1.": "zaya_block.router.router_mlp.0.",
    "mlp.gate.router_mlp.fc2.": "zaya_block.router.router_mlp.2.",
    "mlp.gate.router_mlp.out_proj.": "zaya_block.router.router_mlp.4.",
    "mlp.gate.": "zaya_block.router.",  # last: the four above begin with it
}
LEGACY_EXPERTS = {
    "mlp.experts.gate_up_proj": "linear_fc1.weight",
    "mlp.experts.down_proj": "linear_fc2.weight",
    "mlp.experts.gate_up_proj_scale": "linear_fc1.weight_scale",
    "mlp.experts.down_proj_scale": "linear_fc2.weight_scale",
}


def expected_shapes(config: ZayaConfig) -> dict[str, tuple[int, ...]]:
    """The native name and the shape of every tensor of a model."""
    H = (config.hidden_size,)
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, *H),
        "model.input_hidden_states_scale": H,
        "model.input_hidden_states_bias": H,
    }
    for layer in range(config.num_hidden_layers):
        leaves = _attention_shapes(config) | _moe_shapes(config, layer)
        shapes |= {f"model.layers.{layer}.{leaf}": shape for leaf, shape in leaves.items()}
    return shapes | {"model.norm.weight": H} | _draft_head_shapes(config)


def _draft_head_shapes(config: ZayaConfig) -> dict[str, tuple[int, ...]]:
    V, rank = config.vocab_size, config.markov_rank
    shapes: dict[str, tuple[int, ...]] = {}
    if config.draft_head != "shared":
        shapes[OUTPUT] = (V, config.hidden_size)
    if config.draft_head == "markov":
        shapes |= {MARKOV_IN: (V, rank), MARKOV_OUT: (rank, V)}
    return shapes


def adapter_shapes(config: ZayaConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every tensor of a model's adapters."""
    weights = expected_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (f"model.layers.{layer}.{leaf}" for layer in range(config.num_hidden_layers) for leaf in ADAPTED):
        outputs, inputs = weights[f"{name}.weight"]
        shapes |= {f"{name}.adapter.down": (rank, inputs), f"{name}.adapter.up": (outputs, rank)}
    return shapes


def _attention_shapes(config: ZayaConfig) -> dict[str, tuple[int, ...]]:
    H, D = config.hidden_size, config.head_dim
    query, key = config.num_attention_heads * D, config.num_key_value_heads * D
    qkv = "self_attn.qkv_proj."
    return {
        "input_layernorm.weight": (H,),
        f"{qkv}q_proj.weight": (query, H),
        f"{qkv}k_proj.weight": (key, H),
        f"{qkv}v_proj_current.weight": (key // 2, H),
        f"{qkv}v_proj_delayed.weight": (key // 2, H),
        f"{qkv}conv_qk_depthwise.weight": (query + key, 1, 2),
        f"{qkv}conv_qk_depthwise.bias": (query + key,),
        f"{qkv}conv_qk_grouped.weight": (query + key, D, 2),
        f"{qkv}conv_qk_grouped.bias": (query + key,),
        "self_attn.qk_norm.temp": (config.num_key_value_heads,),
        "self_attn.o_proj.weight": (H, query),
        **{f"post_attention_residual_scale.{leaf}": (H,) for leaf in RESIDUAL_SCALE},
    }


def _moe_shapes(config: ZayaConfig, layer: int) -> dict[str, tuple[int, ...]]:
    H, R, E = config.hidden_size, config.router_hidden_size, config.num_experts
    router = "mlp.gate.router_mlp."
    return {
        "post_attention_layernorm.weight": (H,),
        "mlp.gate.down_proj.weight": (R, H),
        "mlp.gate.down_proj.bias": (R,),
        **({"mlp.gate.router_states_scale": (R,)} if layer else {}),  # layer 0 has no state to scale
        f"{router}norm.weight": (R,),
        f"{router}fc1.weight": (R, R),
        f"{router}fc1.bias": (R,),
        f"{router}fc2.weight": (R, R),
        f"{router}fc2.bias": (R,),
        f"{router}out_proj.weight": (E + 1, R),
        "mlp.gate.balancing_biases": (E + 1,),
        **_expert_shapes(config),
        **{f"post_mlp_residual_scale.{leaf}": (H,) for leaf in RESIDUAL_SCALE},
    }


def _expert_shapes(config: ZayaConfig) -> dict[str, tuple[int, ...]]:
    E, H, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes = {"mlp.experts.gate_up_proj": (E, 2 * inner, H), "mlp.experts.down_proj": (E, H, inner)}
    if config.quantized_experts is None:
        return {**shapes}
    stored = EXPERT_FORMATS[config.quantized_experts]
    values = {name: stored.values_shape(*shape) for name, shape in shapes.items()}
    scales = {f"{name}_scale": stored.scales_shape(*shape) for name, shape in shapes.items()}
    return {**values, **scales}


def is_quantized(name: str, config: ZayaConfig) -> bool:
    """Whether a native tensor is stored in the bytes that the config names."""
    return config.quantized_experts is not None and name.endswith(QUANTIZED)


def stored_dtypes(name: str, config: ZayaConfig) -> tuple[str, ...]:
    """The dtypes that a native tensor may have in a file, in safetensors' words."""
    if config.quantized_experts is not None:
        stored = EXPERT_FORMATS[config.quantized_experts]
        if name.endswith(QUANTIZED):
            return (stored.values,)
        if name.endswith(SCALES):
            return stored.scales
    return FLOATS


def legacy_names(name: str, config: ZayaConfig) -> tuple[str, ...]:
    """What the older layout calls a native tensor: one name, or one for each expert."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if not match:
        name = name.replace("model.norm.", "model.final_norm.")
        return (name.replace("model.input_hidden_states_", "model.layers.0.res_scale.hidden_states_"),)
    layer, leaf = int(match[1]), match[2]
    if leaf in LEGACY_EXPERTS:
        experts = f"model.layers.{2 * layer + 1}.zaya_block.experts.local_experts"
        return tuple(f"{experts}.{e}.{LEGACY_EXPERTS[leaf]}" for e in range(config.num_experts))
    if leaf.startswith("post_mlp_residual_scale."):
        # A half-layer merges the output of the one before it: this scale stands in the next layer's attention half.
        owner = f"layers.{2 * layer + 2}." if layer + 1 < config.num_hidden_layers else ""
        return (f"model.{owner}res_scale.{leaf.removeprefix('post_mlp_residual_scale.')}",)
    table, half = (
        (LEGACY_ATTENTION, 2 * layer) if leaf.startswith(tuple(LEGACY_ATTENTION)) else (LEGACY_MOE, 2 * layer + 1)
    )
    native = next(prefix for prefix in table if leaf.startswith(prefix))
    return (f"model.layers.{half}.{table[native]}{leaf.removeprefix(native)}",)
