"""The three styles of config.json: native, and Zyphra's two older ones, which count half-layers.

The older styles say the same in scalars (the ``*-legacy`` repositories) or in lists with an entry per half-layer
(ZAYA1-base); where a file has both, the list is right and the scalar may be stale. A key that is neither read here
nor in one of the tables is refused, because it may change the mathematics.
"""

from collections.abc import Callable
from typing import Any

from blockdraft.errors import ConfigError
from blockdraft.model.expert_formats import EXPERT_FORMATS
from blockdraft.model.files import shown

LAYER_TYPES = ("hybrid", "hybrid_sliding")
MAX_INTEGER = (1 << 31) - 1
MAX_HALF_LAYERS = 1 << 11
# Drafts are garbage with a wrong id and nothing fails, so the order is that of Zyphra's own serving code.
DRAFT_KEYS = ("block_length", "draft_layout", "mask_parent", "draft_head", "markov_rank")
MASK_KEYS = (
    "tidar_mask_token_id",
    "parallel_drafting_mask_token_id",
    "draft_mask_token_id",
    "bidirectional_mask_token_id",
    "mask_token_id",
)
NATIVE_KEYS = ("moe_intermediate_size", "router_hidden_size", "layer_types")
LEGACY_KEYS = (
    "ffn_hidden_size",
    "ffn_hidden_size_list",
    "zaya_mlp_expansion",
    "zaya_layers",
    "cca_num_q_heads",
    "num_query_groups",
    "num_query_groups_list",
    "swa_layers",
)
# The only values of these keys that this package computes. Absent or null means that value.
FIXED: dict[str, Any] = {
    "clamp_temp": False,
    "zaya_use_eda": True,
    "zaya_use_mod": True,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "lm_head_bias": False,
    "num_experts_per_tok": 1,
    "moe_router_topk": 1,
    "cca_time0": 2,
    "cca_time1": 2,
    "hidden_act": "silu",
    "activation_func": "swiglu",
}
QUANTIZED_TARGETS = ["re:.*mlp\\.experts\\..*"]
# ZAYA1's own: implied by the tensors, or about speed and precision.
IGNORED_OF_ZAYA = """
    cca normalization add_bias_linear gated_linear_unit fused_add_norm apply_rope_fusion bias_activation_fusion
    activation_func_fp8_input_store mamba_cache_dtype residual_in_fp32 scale_residual_merge zaya_high_prec
"""
# About files, training, outputs and the generation defaults of old files. auto_map names code, which is never run.
IGNORED_OF_TRANSFORMERS = """
    dtype torch_dtype transformers_version use_cache initializer_range attention_dropout auto_map name_or_path
    output_router_logits output_attentions output_hidden_states return_dict chunk_size_feed_forward id2label label2id
    is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder pruned_heads
    problem_type finetuning_task task_specific_params tokenizer_class prefix torchscript use_bfloat16 tf_legacy_loss
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sep_token_id
    decoder_start_token_id
"""


def refusal(source: str, key: str, wanted: str, got: object) -> ConfigError:
    return ConfigError(f"{source}: {key}: wanted {wanted}, got {shown(got)}")


class Keys:
    """The keys of one config.json. Remembers which were read; null counts as absent."""

    def __init__(self, data: dict[str, Any], source: str) -> None:
        self.data, self.source = data, source
        self.known = set(f"{IGNORED_OF_ZAYA} {IGNORED_OF_TRANSFORMERS}".split())

    def get(self, key: str, default: Any = None) -> Any:
        self.known.add(key)
        value = self.data.get(key)
        return default if value is None else value

    def refused(self, key: str, wanted: str) -> ConfigError:
        return refusal(self.source, key, wanted, self.data.get(key))

    def present(self, *keys: str) -> str | None:
        """The first of the keys that the file has."""
        self.known.update(keys)
        return next((key for key in keys if self.data.get(key) is not None), None)

    def integer(self, *keys: str) -> int:
        return self._agreed(
            keys, f"an integer from 0 to {MAX_INTEGER}", lambda value: type(value) is int and 0 <= value <= MAX_INTEGER
        )

    def number(self, *keys: str, default: float | None = None) -> float:
        if default is not None and not self.present(*keys):
            return default
        return float(self._agreed(keys, "a number", lambda value: type(value) in (int, float) and abs(value) < 1e30))

    def _agreed(self, keys: tuple[str, ...], wanted: str, is_valid: Callable[[Any], bool]) -> Any:
        """The value of a key or of its other names; where a file has several they must agree."""
        values = {key: self.get(key) for key in keys if self.get(key) is not None}
        if not values:
            raise ConfigError(f"{self.source}: {keys[0]}: missing, wanted {wanted}")
        first = next(iter(values))
        for key, value in values.items():
            if not is_valid(value):
                raise self.refused(key, wanted)
            if value != values[first]:
                raise self.refused(key, f"the value of {first} ({values[first]})")
        return values[first]

    def integers(self, key: str) -> list[int]:
        value = self.get(key)
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= MAX_INTEGER for n in value):
            raise self.refused(key, f"a list of integers from 0 to {MAX_INTEGER}")
        return value

    def check_all_known(self) -> None:
        unknown = sorted(str(key) for key in self.data.keys() - self.known if not str(key).startswith("_"))
        if unknown:
            raise ConfigError(f"{self.source}: {', '.join(map(shown, unknown[:8]))}: unknown key")


def values_of(data: Any, source: str) -> dict[str, Any]:
    """The fields of ZayaConfig that a parsed config.json gives, of any style.

    Raises:
        ConfigError: A key is missing, unknown, of a wrong type or of a value that changes the mathematics.
    """
    if not isinstance(data, dict):
        raise refusal(source, "config", "an object", data)
    keys = Keys(data, source)
    _check_fixed(keys)
    native, legacy = keys.present(*NATIVE_KEYS), keys.present(*LEGACY_KEYS)
    if native and legacy:  # num_hidden_layers would be ambiguous by a factor of two
        raise ConfigError(f"{source}: {native}, {legacy}: wanted the keys of one style, got both")
    values = _common(keys) | (_legacy(keys) if legacy else _native(keys))
    keys.check_all_known()
    return values


def _check_fixed(keys: Keys) -> None:
    if keys.get("model_type") != "zaya":
        raise keys.refused("model_type", "'zaya'")
    architectures = keys.get("architectures", ["ZayaForCausalLM"])
    if not isinstance(architectures, list) or "ZayaForCausalLM" not in architectures:
        raise keys.refused("architectures", "['ZayaForCausalLM']")
    for key, wanted in FIXED.items():
        value = keys.get(key, wanted)
        if type(value) is not type(wanted) or value != wanted:  # 1 is not True
            raise keys.refused(key, ascii(wanted))


def _common(keys: Keys) -> dict[str, Any]:
    eos = keys.get("eos_token_id", [])
    mask = [keys.integer(key) for key in MASK_KEYS if keys.present(key)]
    values = {
        "vocab_size": keys.integer("vocab_size"),
        "hidden_size": keys.integer("hidden_size"),
        "rms_norm_eps": keys.number("rms_norm_eps", "norm_epsilon", default=1e-5),
        "max_position_embeddings": keys.integer("max_position_embeddings"),
        "bos_token_id": keys.get("bos_token_id"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_token_id": keys.get("pad_token_id"),
        "mask_token_id": mask[0] if mask else None,
        "quantized_experts": _quantized_experts(keys),
    }
    return values | {key: keys.get(key) for key in DRAFT_KEYS if keys.present(key)}


def quantization_config(experts: str) -> dict[str, Any]:
    """Of a model with experts of a format, in the style of compressed-tensors."""
    stored = EXPERT_FORMATS[experts]
    group = {"targets": QUANTIZED_TARGETS, "weights": dict(stored.weights), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": stored.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _quantized_experts(keys: Keys) -> str | None:
    """None or one of EXPERT_FORMATS. Whatever else a file may say of quantization would give other weights."""
    if keys.get("quantization_config") is None:
        return None
    for experts in EXPERT_FORMATS:
        if keys.get("quantization_config") == quantization_config(experts):
            return experts
    raise keys.refused("quantization_config", "that of `blockdraft quantize`, or null")


def _native(keys: Keys) -> dict[str, Any]:
    layers = keys.integer("num_hidden_layers")
    types = keys.get("layer_types", ["hybrid"] * min(layers, MAX_HALF_LAYERS))
    if not isinstance(types, list):
        raise keys.refused("layer_types", "a list")
    values = {
        key: keys.integer(key)
        for key in ("num_attention_heads", "num_key_value_heads", "num_experts", "moe_intermediate_size")
    }
    return values | {
        "num_hidden_layers": layers,
        "head_dim": keys.integer("head_dim", "kv_channels"),
        "router_hidden_size": keys.integer("router_hidden_size"),
        "layer_types": tuple(types),
        "sliding_window": keys.get("sliding_window"),
        "rope_parameters": _rope(keys, types),
    }


def _legacy(keys: Keys) -> dict[str, Any]:
    halves, experts = _half_layers(keys)
    types, window = _windows(keys, halves)
    inner = _per_half(keys, halves, 1, "ffn_hidden_size_list", "ffn_hidden_size")  # rows of gate and up together
    if inner % 2:
        raise refusal(keys.source, "ffn_hidden_size", "an even number of rows", inner)
    return {
        "num_hidden_layers": halves // 2,
        "num_attention_heads": _per_half(keys, halves, 0, "cca_num_q_heads", "num_attention_heads"),
        "num_key_value_heads": _per_half(
            keys, halves, 0, "num_query_groups_list", "num_query_groups", "num_key_value_heads"
        ),
        "head_dim": _head_dim(keys),
        "num_experts": experts,
        "moe_intermediate_size": inner // 2,
        "router_hidden_size": _per_half(keys, halves, 1, "zaya_mlp_expansion", "zaya_mlp_expansion"),
        "layer_types": types,
        "sliding_window": window,
        "rope_parameters": _rope(keys, types),
    }


def _half_layers(keys: Keys) -> tuple[int, int]:
    """How many half-layers there are, and the number of experts."""
    entries = keys.get("zaya_layers")
    if entries is None:
        halves, experts = keys.integer("num_hidden_layers"), keys.integer("num_experts")
    else:
        keys.present("num_hidden_layers", "num_experts")  # known, and stale: ZAYA1-base says 120 layers and has 80
        if not isinstance(entries, list) or entries[:1] != ["a"] or entries != ["a", entries[-1]] * (len(entries) // 2):
            raise keys.refused("zaya_layers", "'a' and the number of experts in turn")
        halves, experts = len(entries), entries[-1]
    if halves % 2 or not 0 < halves <= MAX_HALF_LAYERS:
        raise refusal(keys.source, "num_hidden_layers", f"an even number up to {MAX_HALF_LAYERS}", halves)
    return halves, experts


def _per_half(keys: Keys, halves: int, odd: int, key: str, *scalars: str) -> int:
    """The value of a list with an entry per half-layer, MoE (odd = 1) or attention, or without a list of scalars."""
    if keys.get(key) is None or (key in scalars and not isinstance(keys.get(key), list)):
        return keys.integer(*scalars)
    keys.known.update(scalars)
    entries = keys.integers(key)[:halves]  # a known file pads its lists
    if len(entries) < halves or any(entries[1 - odd :: 2]) or len(set(entries[odd::2])) != 1:
        place = "MoE" if odd else "attention"
        raise keys.refused(key, f"one value at the {place} entries of {halves} half-layers and 0 elsewhere")
    return entries[odd]


def _head_dim(keys: Keys) -> int:
    if keys.present("head_dim", "kv_channels") or not keys.present("cca_num_q_heads"):
        return keys.integer("head_dim", "kv_channels")
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")  # here of the uncompressed queries
    if heads == 0 or hidden % heads:
        raise keys.refused("num_attention_heads", f"a divisor of hidden_size ({hidden})")
    return hidden // heads


def _windows(keys: Keys, halves: int) -> tuple[tuple[str, ...], int | None]:
    """Layer types and window. The older styles count the previous tokens only, hence + 1."""
    if not keys.present("swa_layers"):
        if keys.get("sliding_window") is not None:
            raise keys.refused("sliding_window", "null, because swa_layers is absent")
        return ("hybrid",) * (halves // 2), None
    entries = keys.integers("swa_layers")
    if len(entries) == halves:
        attention, moe = entries[::2], entries[1::2]
        if any(m not in (0, a) for a, m in zip(attention, moe, strict=True)):
            raise keys.refused("swa_layers", "the windows at the attention half-layers")
        entries = attention
    windows = set(entries) - {0}
    if len(entries) != halves // 2 or len(windows) > 1:
        raise keys.refused("swa_layers", f"{halves} or {halves // 2} entries: 0 or one window")
    window = windows.pop() + 1 if windows else None
    if keys.get("sliding_window", window) != window:
        raise keys.refused("sliding_window", f"null or swa_layers + 1 ({window})")
    return tuple("hybrid_sliding" if entry else "hybrid" for entry in entries), window


def _rope(keys: Keys, types: list[str] | tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """RoPE by layer type, from the nested entries, one flat entry or the keys at the top, whichever there are."""
    if keys.get("rope_scaling", False) not in (False, {"rope_type": "default"}, {"type": "default"}):
        raise keys.refused("rope_scaling", "no RoPE scaling")
    nested = keys.get("rope_parameters")
    if nested is None:
        return _rope_from_top(keys, "hybrid_sliding" in types)
    if not isinstance(nested, dict):
        raise keys.refused("rope_parameters", "an object")
    keys.known.update(("rope_theta", "swa_rotary_base", "partial_rotary_factor"))
    if not nested.keys() & set(LAYER_TYPES):
        nested = {"hybrid": nested}
    # The released 8B file has a stray "rope_type" beside the nested entries.
    if nested.get("rope_type", "default") != "default":
        raise refusal(keys.source, "rope_parameters.rope_type", "'default' (no RoPE scaling)", nested["rope_type"])
    return {name: _rope_entry(keys, name, entry) for name, entry in nested.items() if name != "rope_type"}


def _rope_from_top(keys: Keys, sliding: bool) -> dict[str, dict[str, Any]]:
    factor = keys.number("partial_rotary_factor", default=0.5)
    thetas = {"hybrid": keys.number("rope_theta")}
    if sliding or keys.present("swa_rotary_base"):
        thetas["hybrid_sliding"] = keys.number("swa_rotary_base")
    return {
        name: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
        for name, theta in thetas.items()
    }


def _rope_entry(keys: Keys, layer_type: str, entry: Any) -> dict[str, Any]:
    """Completes an entry from the keys at the top, which must not contradict it. ZayaConfig checks the rest."""
    if not isinstance(entry, dict):
        raise refusal(keys.source, f"rope_parameters.{layer_type}", "an object", entry)
    names = {"partial_rotary_factor": "partial_rotary_factor"}
    names["rope_theta"] = "rope_theta" if layer_type == "hybrid" else "swa_rotary_base"
    result = {"rope_type": "default"} | entry
    for name, top in names.items():
        outer = keys.get(top)
        if outer is not None and result.setdefault(name, outer) != outer:
            raise keys.refused(top, f"the value of rope_parameters.{layer_type}.{name} ({result[name]})")
    return result
