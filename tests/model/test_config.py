import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockdraft.errors import ConfigError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.config_styles import quantization_config

# The released files, field for field; the list-style one after its description, no copy of it was at hand.
NATIVE: dict[str, Any] = {
    "architectures": ["ZayaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "cca_time0": 2,
    "cca_time1": 2,
    "dtype": "bfloat16",
    "eos_token_id": 106,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "layer_types": ["hybrid"] * 40,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "model_type": "zaya",
    "moe_intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "hybrid": {"partial_rotary_factor": 0.5, "rope_theta": 5000000, "rope_type": "default"},
        "hybrid_sliding": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
        "rope_type": "default",
    },
    "router_hidden_size": 256,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 262272,
}
SCALARS: dict[str, Any] = {
    "activation_func": "swiglu",
    "activation_func_fp8_input_store": False,
    "add_bias_linear": False,
    "architectures": ["ZayaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bias_activation_fusion": True,
    "bos_token_id": 2,
    "cca": True,
    "clamp_temp": False,
    "dtype": "bfloat16",
    "eos_token_id": 106,
    "ffn_hidden_size": 4096,
    "gated_linear_unit": True,
    "head_dim": 128,
    "hidden_size": 2048,
    "kv_channels": 128,
    "lm_head_bias": False,
    "mamba_cache_dtype": "float32",
    "max_position_embeddings": 131072,
    "model_type": "zaya",
    "moe_router_topk": 1,
    "norm_epsilon": 1e-05,
    "normalization": "RMSNorm",
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_hidden_layers": 80,
    "num_key_value_heads": 2,
    "num_query_groups": 2,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "residual_in_fp32": True,
    "rope_scaling": False,
    "rope_theta": 5000000,
    "scale_residual_merge": True,
    "sliding_window": None,
    "use_cache": True,
    "vocab_size": 262272,
    "zaya_mlp_expansion": 256,
    "zaya_use_eda": True,
    "zaya_use_mod": True,
}
LISTS: dict[str, Any] = {
    "apply_rope_fusion": True,
    "architectures": ["ZayaForCausalLM"],
    "cca": True,
    "cca_num_q_heads": [8, 0] * 40,
    "eos_token_id": 1,
    "ffn_hidden_size_list": [0, 4096] * 40,
    "fused_add_norm": False,
    "hidden_size": 2048,
    "max_position_embeddings": 32768,
    "model_type": "zaya",
    "moe_router_topk": 1,
    "norm_epsilon": 1e-05,
    "num_attention_heads": 16,  # of the uncompressed queries
    "num_hidden_layers": 120,  # stale
    "num_query_groups_list": [2, 0] * 40,
    "rope_scaling": False,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "vocab_size": 262272,
    "zaya_high_prec": True,
    "zaya_layers": ["a", 16] * 40,
    "zaya_mlp_expansion": [0, 256] * 40,
    "zaya_use_eda": True,
    "zaya_use_mod": True,
}
STYLES = {"native": NATIVE, "scalars": SCALARS, "lists": LISTS}
GONE = object()
SLIDING: dict[str, Any] = {"layer_types": ["hybrid", "hybrid_sliding"] * 20, "sliding_window": 4097}


def changed(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (data | changes).items() if value is not GONE}


def with_rope(**changes: Any) -> dict[str, Any]:
    return changed(NATIVE, partial_rotary_factor=GONE, rope_parameters={"hybrid": changed(ROPE, **changes)})


ROPE: dict[str, Any] = {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_type": "default"}


@pytest.mark.parametrize("data", STYLES.values(), ids=STYLES)
def test_every_style_gives_the_released_geometry(data):
    config = ZayaConfig.from_dict(data)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (40, 8, 2)
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (2048, 128, 262272)
    assert (config.num_experts, config.moe_intermediate_size, config.router_hidden_size) == (16, 2048, 256)
    assert config.layer_types == ("hybrid",) * 40
    assert config.sliding_window is None
    assert config.rms_norm_eps == 1e-5
    assert (config.mask_token_id, config.block_length, config.draft_layout) == (None, 16, "extra_first_mask")


def test_what_differs_between_the_files():
    native, scalars, lists = (ZayaConfig.from_dict(data) for data in STYLES.values())
    assert native == replace(scalars, rope_parameters=native.rope_parameters)
    assert native.rope_parameters["hybrid"] == scalars.rope_parameters["hybrid"]
    assert (native.bos_token_id, native.eos_token_ids, native.pad_token_id) == (2, (106,), 0)
    assert (lists.bos_token_id, lists.eos_token_ids, lists.pad_token_id) == (None, (1,), None)
    assert lists.max_position_embeddings == 32768
    assert lists.rope_parameters == {
        "hybrid": {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_type": "default"}
    }


def test_a_config_of_transformers_is_accepted_whole():
    zaya = pytest.importorskip("transformers").ZayaConfig
    made = zaya(mask_token_id=4)
    for text in (made.to_json_string(), made.to_json_string(use_diff=False)):
        config = ZayaConfig.from_dict(json.loads(text))
        assert config.rope_parameters == made.rope_parameters
        assert (config.num_hidden_layers, config.mask_token_id) == (40, 4)


@pytest.mark.parametrize(
    ("data", "windows"),
    [
        (changed(NATIVE, **SLIDING), [0, 4097] * 20),
        (changed(SCALARS, swa_layers=[4096, 0, 0, 0] * 20, swa_rotary_base=10000), [4097, 0] * 20),
        (changed(SCALARS, swa_layers=[0, 0, 4096, 4096] * 20, swa_rotary_base=10000), [0, 4097] * 20),
        (changed(SCALARS, swa_layers=[4096, 0] * 20, swa_rotary_base=10000), [4097, 0] * 20),
        (changed(SCALARS, swa_layers=[0] * 80), [0] * 40),
    ],
    ids=["native", "swa per half-layer", "swa on both halves", "swa per layer", "swa all full"],
)
def test_sliding_windows_include_the_current_token(data, windows):
    config = ZayaConfig.from_dict(data)
    assert [config.window(layer) for layer in range(40)] == windows
    if any(windows):
        assert config.rope_parameters["hybrid_sliding"]["rope_theta"] == 10000


def test_sizes_of_the_74b_preview():
    config = ZayaConfig.from_dict(
        changed(
            NATIVE,
            hidden_size=4096,
            num_hidden_layers=60,
            num_attention_heads=16,
            num_experts=24,
            moe_intermediate_size=4096,
            layer_types=["hybrid_sliding", "hybrid"] * 30,
            sliding_window=4097,
        )
    )
    assert (len(config.layer_types), config.num_attention_heads, config.sliding_window) == (60, 16, 4097)


MASK_KEYS = [
    "tidar_mask_token_id",
    "parallel_drafting_mask_token_id",
    "draft_mask_token_id",
    "bidirectional_mask_token_id",
    "mask_token_id",
]


@pytest.mark.parametrize("first", range(5), ids=MASK_KEYS)
def test_mask_token_id_keys_in_order(first):
    data = changed(NATIVE, **{key: 10 + i for i, key in enumerate(MASK_KEYS) if i >= first})
    assert ZayaConfig.from_dict(data).mask_token_id == 10 + first


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": [1, 106]},
        {"eos_token_id": None},
        {"eos_token_id": GONE},
        {"tidar_mask_token_id": None, "mask_token_id": 4},
        {"block_length": 32, "draft_layout": "anchor_in_block"},
        {"_name_or_path": "x", "_anything": {"nested": 1}},
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"tie_word_embeddings": GONE, "hidden_act": GONE, "cca_time0": GONE, "architectures": GONE},
        {"layer_types": GONE},
        {"rope_parameters": GONE, "rope_theta": 5000000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "rope_theta": 5000000},
        {"partial_rotary_factor": GONE},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"quantization_config": None},
        {"quantization_config": quantization_config("int8")},
        {"kv_channels": 128},
        {"moe_router_topk": 1, "zaya_use_mod": True},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_accepts(changes):
    config = ZayaConfig.from_dict(changed(NATIVE, **changes))
    assert config.num_hidden_layers == 40
    assert config.rope_parameters["hybrid"] | {"rope_theta": 5e6} == ROPE | {"rope_theta": 5e6}


NUMBERS = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "moe_intermediate_size",
    "router_hidden_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "block_length",
]
NO_SIZES = [0, -1, 2**31, 2**63, 2.5, float("nan"), float("inf"), "8", True, [8], {}]


@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
@pytest.mark.parametrize("key", NUMBERS)
def test_refuses_what_is_no_size(key, value):
    with pytest.raises(ConfigError, match=rf"^file: {key}: wanted .*, got "):
        ZayaConfig.from_dict(changed(NATIVE, **{key: value}), "file")


@pytest.mark.parametrize("key", NUMBERS[:-2])
def test_refuses_a_missing_size(key):
    with pytest.raises(ConfigError, match=rf"^file: {key}: missing"):
        ZayaConfig.from_dict(changed(NATIVE, **{key: GONE}), "file")


@pytest.mark.parametrize("value", [-1, 262272, 2**63, 2.0, "2", True], ids=repr)
@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id", "eos_token_id", "mask_token_id"])
def test_refuses_what_is_no_token_id(key, value):
    with pytest.raises(ConfigError, match=key):
        ZayaConfig.from_dict(changed(NATIVE, **{key: value}))


CHANGED_MATHEMATICS: dict[str, list[Any]] = {
    "clamp_temp": [True, 0],
    "zaya_use_eda": [False, 1],
    "zaya_use_mod": [False],
    "tie_word_embeddings": [False],
    "attention_bias": [True],
    "lm_head_bias": [True],
    "num_experts_per_tok": [2, 0, True],
    "moe_router_topk": [2],
    "cca_time0": [3, 2.0],
    "cca_time1": [4],
    "hidden_act": ["gelu"],
    "activation_func": ["geglu"],
    "quantization_config": [
        {"quant_method": "fp8"},
        quantization_config("int8") | {"format": "pack-quantized"},
        "int8",
        [],
    ],
    "model_type": ["llama", "zaya1_vl", 5],
    "architectures": [["LlamaForCausalLM"], [], "ZayaForCausalLM", 5],
    "rope_scaling": [True, {"rope_type": "yarn", "factor": 4.0}, "linear"],
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in CHANGED_MATHEMATICS.items() for value in values], ids=repr
)
def test_refuses_other_mathematics_by_name(style, key, value):
    with pytest.raises(ConfigError, match=rf"^file: {key}: wanted .*, got "):
        ZayaConfig.from_dict(changed(STYLES[style], **{key: value}), "file")


def test_refuses_a_missing_model_type():
    with pytest.raises(ConfigError, match="model_type"):
        ZayaConfig.from_dict(changed(NATIVE, model_type=GONE))


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (changed(NATIVE, num_key_value_heads=3), "num_attention_heads: wanted a multiple of .* got 8"),
    "more kv heads": (changed(NATIVE, num_key_value_heads=16), "num_attention_heads"),
    "odd head_dim": (changed(NATIVE, head_dim=129), "head_dim|partial_rotary"),
    "odd rotary": (changed(NATIVE, head_dim=6), "partial_rotary_factor: wanted a factor that rotates an even number"),
    "head_dim, kv_channels": (changed(NATIVE, kv_channels=64), "kv_channels: wanted the value of head_dim"),
    "few layer_types": (changed(NATIVE, layer_types=["hybrid"] * 39), "layer_types"),
    "stale layer count": (changed(NATIVE, num_hidden_layers=120), "layer_types"),
    "other layer type": (changed(NATIVE, layer_types=["hybrid"] * 39 + ["mamba"]), "layer_types"),
    "layer type no string": (changed(NATIVE, layer_types=["hybrid"] * 39 + [["hybrid"]]), "layer_types"),
    "layer_types no list": (changed(NATIVE, layer_types="hybrid"), "layer_types"),
    "no window": (changed(NATIVE, **SLIDING | {"sliding_window": None}), "sliding_window: wanted an integer"),
    "window 0": (changed(NATIVE, **SLIDING | {"sliding_window": 0}), "sliding_window"),
    "window bool": (changed(NATIVE, sliding_window=True), "sliding_window"),
    "window huge": (changed(NATIVE, sliding_window=2**63), "sliding_window"),
    "block_length 1": (changed(NATIVE, block_length=1), "block_length: wanted an integer from 2 to 32, got 1"),
    "block_length 33": (changed(NATIVE, block_length=33), "block_length"),
    "draft_layout": (changed(NATIVE, draft_layout="other"), "draft_layout: wanted one of extra_first_mask"),
    "draft_layout list": (changed(NATIVE, draft_layout=[]), "draft_layout"),
    "mask later in order": (changed(NATIVE, tidar_mask_token_id=4, mask_token_id="4"), "mask_token_id"),
    "eos inside list": (changed(NATIVE, eos_token_id=[1, "2"]), "eos_token_id"),
    "eos nested": (changed(NATIVE, eos_token_id=[[1]]), "eos_token_id"),
    "rope no object": (changed(NATIVE, rope_parameters=[1]), "rope_parameters"),
    "rope entry no object": (changed(NATIVE, rope_parameters={"hybrid": 3}), "rope_parameters.hybrid"),
    "rope stray type": (
        changed(NATIVE, rope_parameters={"hybrid": ROPE, "rope_type": "yarn"}),
        "rope_parameters.rope_type",
    ),
    "rope other layer": (changed(NATIVE, rope_parameters={"hybrid": ROPE, "full": ROPE}), "rope_parameters"),
    "rope sliding absent": (changed(NATIVE, **SLIDING, rope_parameters={"hybrid": ROPE}), "rope_parameters"),
    "rope scaled": (with_rope(rope_type="yarn"), "rope_parameters.hybrid.rope_type: wanted 'default'"),
    "rope factor": (with_rope(factor=4.0), "rope_parameters.hybrid: wanted"),
    "rope theta absent": (with_rope(rope_theta=GONE), "rope_parameters.hybrid.rope_theta"),
    "rope theta 0": (with_rope(rope_theta=0), "rope_theta"),
    "rope theta negative": (with_rope(rope_theta=-1e6), "rope_theta"),
    "rope theta huge": (with_rope(rope_theta=2**63), "rope_theta"),
    "rope theta NaN": (with_rope(rope_theta=float("nan")), "rope_theta"),
    "rope theta string": (with_rope(rope_theta="1e6"), "rope_theta"),
    "rope theta bool": (with_rope(rope_theta=True), "rope_theta"),
    "rotary absent": (with_rope(partial_rotary_factor=GONE), "partial_rotary_factor"),
    "rotary 0": (with_rope(partial_rotary_factor=0), "partial_rotary_factor"),
    "rotary above 1": (with_rope(partial_rotary_factor=1.5), "partial_rotary_factor"),
    "rotary odd": (with_rope(partial_rotary_factor=5 / 128), "partial_rotary_factor"),
    "rotary not whole": (with_rope(partial_rotary_factor=0.333), "partial_rotary_factor"),
    "rotary none": (with_rope(partial_rotary_factor=1e-9), "partial_rotary_factor"),
    "theta at the top": (changed(NATIVE, rope_theta=1e6), "rope_theta: wanted the value of rope_parameters.hybrid"),
    "rotary at the top": (changed(NATIVE, partial_rotary_factor=1.0), "partial_rotary_factor"),
    "no rope at all": (changed(NATIVE, rope_parameters=GONE), "rope_theta: missing"),
    "both styles": (changed(SCALARS, moe_intermediate_size=2048), "moe_intermediate_size, ffn_hidden_size: .* both"),
    "eps differ": (changed(NATIVE, norm_epsilon=1e-6), "norm_epsilon: wanted the value of rms_norm_eps"),
    "second eps no number": (changed(NATIVE, norm_epsilon="1e-5"), "norm_epsilon: wanted a number"),
    "odd half-layers": (changed(SCALARS, num_hidden_layers=79), "num_hidden_layers"),
    "no half-layers": (changed(SCALARS, num_hidden_layers=0), "num_hidden_layers"),
    "2^31 - 2 half-layers": (changed(SCALARS, num_hidden_layers=2**31 - 2), "num_hidden_layers"),
    "odd ffn": (changed(SCALARS, ffn_hidden_size=4095), "ffn_hidden_size: wanted an even"),
    "ffn 0": (changed(SCALARS, ffn_hidden_size=0), "moe_intermediate_size"),
    "ffn gone": (changed(SCALARS, ffn_hidden_size=GONE), "ffn_hidden_size: missing"),
    "ffn float": (changed(SCALARS, ffn_hidden_size=4096.0), "ffn_hidden_size"),
    "groups differ": (
        changed(SCALARS, num_query_groups=4),
        "num_key_value_heads: wanted the value of num_query_groups",
    ),
    "scalar head_dim gone": (changed(SCALARS, head_dim=GONE, kv_channels=GONE), "head_dim: missing"),
    "scalar theta gone": (changed(SCALARS, rope_theta=GONE), "rope_theta: missing"),
    "legacy window": (changed(SCALARS, sliding_window=4097), "sliding_window: wanted null"),
    "swa two windows": (changed(SCALARS, swa_layers=[4096, 512] * 20, swa_rotary_base=1e4), "swa_layers"),
    "swa on MoE": (changed(SCALARS, swa_layers=[0, 4096] * 40, swa_rotary_base=1e4), "swa_layers"),
    "swa length": (changed(SCALARS, swa_layers=[4096] * 41, swa_rotary_base=1e4), "swa_layers"),
    "swa negative": (changed(SCALARS, swa_layers=[-1] * 40), "swa_layers"),
    "swa no list": (changed(SCALARS, swa_layers=4096), "swa_layers"),
    "swa theta gone": (changed(SCALARS, swa_layers=[4096] * 40), "swa_rotary_base: missing"),
    "swa and window": (
        changed(SCALARS, swa_layers=[4096] * 40, swa_rotary_base=1e4, sliding_window=4096),
        "sliding_window",
    ),
    "expansion list in scalars": (changed(SCALARS, zaya_mlp_expansion=[256, 0] * 40), "zaya_mlp_expansion"),
    "layers swapped": (changed(LISTS, zaya_layers=[16, "a"] * 40), "zaya_layers"),
    "layers odd": (changed(LISTS, zaya_layers=["a", 16] * 40 + ["a"]), "zaya_layers"),
    "layers empty": (changed(LISTS, zaya_layers=[]), "zaya_layers"),
    "layers of two sizes": (changed(LISTS, zaya_layers=["a", 16, "a", 8] * 20), "zaya_layers"),
    "layers no list": (changed(LISTS, zaya_layers="aa"), "zaya_layers"),
    "layers of strings": (changed(LISTS, zaya_layers=["a", "16"] * 40), "num_experts"),
    "layers of bools": (changed(LISTS, zaya_layers=["a", True] * 40), "num_experts"),
    "heads list short": (changed(LISTS, cca_num_q_heads=[8, 0] * 39), "cca_num_q_heads"),
    "heads list swapped": (changed(LISTS, cca_num_q_heads=[0, 8] * 40), "cca_num_q_heads"),
    "heads list uneven": (changed(LISTS, cca_num_q_heads=[8, 0, 4, 0] * 20), "cca_num_q_heads"),
    "heads no list": (changed(LISTS, cca_num_q_heads=8), "cca_num_q_heads"),
    "heads list of zeros": (changed(LISTS, cca_num_q_heads=[0] * 80), "num_attention_heads"),
    "groups list float": (changed(LISTS, num_query_groups_list=[2.0, 0] * 40), "num_query_groups_list"),
    "ffn list negative": (changed(LISTS, ffn_hidden_size_list=[0, -4096] * 40), "ffn_hidden_size_list"),
    "list head_dim": (changed(LISTS, num_attention_heads=15), "num_attention_heads: wanted a divisor"),
    "list head_dim 0": (changed(LISTS, num_attention_heads=0), "num_attention_heads"),
}


@pytest.mark.parametrize(("data", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_refuses(data, message):
    with pytest.raises(ConfigError, match=message):
        ZayaConfig.from_dict(data)


def test_a_list_longer_than_the_layers_is_padding():
    assert ZayaConfig.from_dict(changed(LISTS, ffn_hidden_size_list=[0, 4096] * 60)).moe_intermediate_size == 2048


@pytest.mark.parametrize("style", STYLES)
def test_unknown_keys_are_named(style):
    with pytest.raises(ConfigError, match="^config.json: 'attention_sinks', 'shared_expert': unknown key$"):
        ZayaConfig.from_dict(changed(STYLES[style], shared_expert=1, attention_sinks=True))


@pytest.mark.parametrize("style", STYLES)
def test_any_value_at_any_key_gives_a_config_or_a_config_error(style):
    """No other exception, whatever stands where: each key of each style with each of the values."""
    values = [None, True, -1, 0, 2**80, 1e300, float("nan"), "", "hybrid", [], [[]], [None], ["a"], {}, {"hybrid": {}}]
    outcomes = set()
    for key in [*STYLES[style], "swa_layers", "head_dim", "rope_parameters", "mask_token_id", "draft_layout"]:
        for value in values:
            try:
                ZayaConfig.from_dict(changed(STYLES[style], **{key: value}))
                outcomes.add("config")
            except ConfigError:
                outcomes.add("error")
    assert outcomes == {"config", "error"}


@pytest.mark.parametrize("data", [None, [], "zaya", 3, True, [NATIVE]], ids=lambda data: type(data).__name__)
def test_refuses_what_is_no_object(data):
    with pytest.raises(ConfigError, match="config: wanted an object"):
        ZayaConfig.from_dict(data)


def test_the_constructor_checks_too():
    config = ZayaConfig.from_dict(NATIVE)
    with pytest.raises(ConfigError, match="^ZayaConfig: hidden_size: wanted an integer from 1 to 65536, got -1$"):
        replace(config, hidden_size=-1)
    with pytest.raises(ConfigError, match="mask_token_id"):
        config.with_mask_token_id(262272)
    with pytest.raises(ConfigError, match="eos_token_ids: wanted a tuple"):
        replace(config, eos_token_ids=[1])


def test_long_values_are_cut_in_messages():
    with pytest.raises(ConfigError) as error:
        ZayaConfig.from_dict(changed(NATIVE, hidden_act="\ud800x" * 100_000))
    assert len(str(error.value)) < 200
    assert str(error.value).isascii()


def test_reads_the_file_of_a_folder(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(NATIVE))
    assert ZayaConfig.from_folder(tmp_path) == ZayaConfig.from_dict(NATIVE)


def test_a_wrong_value_names_the_file(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(changed(NATIVE, head_dim="128")))
    with pytest.raises(ConfigError, match=r"config\.json: head_dim: wanted an integer .* got '128'") as error:
        ZayaConfig.from_folder(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "array": (b"[]", "wanted an object"),
    "BOM": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "NUL": (b"{}\0", "not valid JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON"),
    "UTF-16": ("{}".encode("utf-16"), "not valid JSON"),
    "NaN": (b'{"model_type": "zaya", "rms_norm_eps": NaN}', "NaN is not a number"),
    "Infinity": (b'{"model_type": "zaya", "rope_theta": -Infinity}', "-Infinity is not a number"),
    "twice": (b'{"head_dim": 128, "head_dim": 64}', "the name 'head_dim' occurs 2 times"),
    "twice, nested": (b'{"rope_parameters": {"hybrid": 1, "hybrid": 2}}', "'hybrid' occurs 2 times"),
    "deep": (b"[" * 100_000, "nested deeper than 16"),
    "deep objects": (b'{"a":' * 100_000, "nested deeper than 16"),
    "comment": (b"{} // no", "not valid JSON"),
    "long integer": (b'{"head_dim": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "large": (b" " * ((1 << 20) + 1), "at most 1048576 are read"),
    "quotes": (b'"\\"' + b'\\"' * 200_000, "not valid JSON"),  # quadratic in a careless scanner
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_refuses_text(tmp_path: Path, text: bytes, message: str):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        ZayaConfig.from_folder(tmp_path)


def test_brackets_in_strings_are_no_depth(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(changed(NATIVE, _note='[{"\\' * 50)))
    assert ZayaConfig.from_folder(tmp_path).head_dim == 128


def test_refuses_files_that_are_none(tmp_path: Path):
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: No such file"):
        ZayaConfig.from_folder(path.parent)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        ZayaConfig.from_folder(path.parent)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="not a regular file"):
        ZayaConfig.from_folder(path.parent)
    path.rmdir()
    (tmp_path / "outside.json").write_text(json.dumps(NATIVE))
    path.symlink_to("../outside.json")
    with pytest.raises(ConfigError, match="links to a file outside the model folder"):
        ZayaConfig.from_folder(path.parent)
