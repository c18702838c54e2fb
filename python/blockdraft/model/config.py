"""What a model is: the numbers of its config.json, checked."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockdraft.errors import ConfigError
from blockdraft.model.config_styles import LAYER_TYPES, refusal, values_of
from blockdraft.model.expert_formats import EXPERT_FORMATS
from blockdraft.model.files import UnusableFile, read_json

MAX_CONFIG_BYTES = 1 << 20
MASK_PARENTS = ("previous", "anchor", "none")
DRAFT_HEADS = ("shared", "separate", "markov")
DRAFT_LAYOUTS = ("extra_first_mask", "masks_after_anchor", "anchor_in_block")
# Far above any model of this class, far below where a product of them would leave 64 bits.
RANGES = {
    "vocab_size": (1, 1 << 22),
    "hidden_size": (1, 1 << 16),
    "num_hidden_layers": (1, 1 << 10),
    "num_attention_heads": (1, 1 << 10),
    "num_key_value_heads": (1, 1 << 10),
    "head_dim": (2, 1 << 10),
    "num_experts": (1, 1 << 10),
    "moe_intermediate_size": (1, 1 << 18),
    "router_hidden_size": (1, 1 << 14),
    "max_position_embeddings": (1, 1 << 30),
    "block_length": (2, 32),
    "markov_rank": (1, 1 << 14),
}


@dataclass(frozen=True, kw_only=True)
class ZayaConfig:
    """A ZAYA1 model. Construction checks every value.

    Attributes:
        num_hidden_layers: Native layers, each attention and MoE.
        num_attention_heads: Heads of the compressed queries.
        num_experts: Without the skip class, which the router has in addition.
        moe_intermediate_size: Rows of the gate, and as many of the up projection, of one expert.
        layer_types: ``hybrid`` or ``hybrid_sliding`` for each layer.
        rope_parameters: For each layer type: ``rope_theta``, ``partial_rotary_factor``, ``rope_type`` (``default``).
        sliding_window: Tokens that a ``hybrid_sliding`` layer sees, the current one included.
        mask_token_id: None when the config names none; drafting then needs it from elsewhere.
        block_length: Rows of a draft block.
        draft_layout: Which rows a draft block has; a property of the training.
        mask_parent: What a mask row follows in the convolutions: ``previous``, the mask before it, ``anchor``, the last
            causal row for all masks of a group, or ``none``, nothing; a property of the training.
        draft_head: Output matrix of the drafts: ``shared``, the LM head; ``separate``, one of their own; ``markov``,
            that and a bias by the previous token, of rank markov_rank.
        quantized_experts: None, or how the experts are stored: ``int8`` and ``fp8`` (E4M3), one byte a weight and a
            float32 scale for each row, or ``mxfp4``, half a byte (E2M1) and a power of two for each 32 weights.

    Raises:
        ConfigError: A value has a wrong type, is out of range or contradicts another.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    moe_intermediate_size: int
    router_hidden_size: int
    layer_types: tuple[str, ...]
    rope_parameters: dict[str, dict[str, Any]]
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = 0
    mask_token_id: int | None = None
    block_length: int = 16
    draft_layout: str = "extra_first_mask"
    mask_parent: str = "previous"
    draft_head: str = "shared"
    markov_rank: int = 64
    quantized_experts: str | None = None

    def __post_init__(self) -> None:
        _check(vars(self), "ZayaConfig")

    @property
    def conv_channels(self) -> int:
        """Channels C of u = [q | k], which the convolutions mix."""
        return (self.num_attention_heads + self.num_key_value_heads) * self.head_dim

    def inverse_frequencies(self, layer: int) -> Tensor:
        """Rotary frequencies ``[rotary / 2]`` of a layer in float32; pairs are (i, i + rotary / 2)."""
        rope = self.rope_parameters[self.layer_types[layer]]
        rotary = round(self.head_dim * rope["partial_rotary_factor"])
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, rotary, 2, dtype=torch.int64).float() / rotary)

    def window(self, layer: int) -> int:
        """Tokens that a layer sees, the current one included; 0 for all."""
        return (self.sliding_window or 0) if self.layer_types[layer] == "hybrid_sliding" else 0

    def with_mask_token_id(self, mask_token_id: int) -> "ZayaConfig":
        """The same with another mask token."""
        return replace(self, mask_token_id=mask_token_id)

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "config.json") -> "ZayaConfig":
        """Reads a parsed config.json of the native or of a legacy style.

        Args:
            data: The parsed file.
            source: The file, for error messages.

        Raises:
            ConfigError: A key is missing, unknown, wrong, or asks for mathematics that this package does not have.
        """
        values: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        values |= values_of(data, source)
        _check(values, source)  # here the message can name the file and not the class
        return cls(**values)

    @classmethod
    def from_folder(cls, folder: Path) -> "ZayaConfig":
        """Reads the config.json of a model folder.

        Raises:
            ConfigError: As for from_dict, or the file is absent, unreadable, outside the folder or not JSON.
        """
        source = str(Path(folder) / "config.json")
        try:
            data = read_json(Path(folder), "config.json", MAX_CONFIG_BYTES)
        except UnusableFile as error:
            raise ConfigError(f"{source}: {error}") from error
        return cls.from_dict(data, source)


def _check(values: dict[str, Any], source: str) -> None:
    for name, (low, high) in RANGES.items():
        _check_integer(source, name, values[name], low, high)
    _check_ids(values, source)
    _check_layers(values, source)
    _check_rope(values, source)
    _check_heads(values, source)
    eps = values["rms_norm_eps"]
    if type(eps) is not float or not 0 < eps <= 0.1:  # also refuses NaN
        raise refusal(source, "rms_norm_eps", "a number in (0, 0.1]", eps)
    if values["draft_layout"] not in DRAFT_LAYOUTS:
        raise refusal(source, "draft_layout", f"one of {', '.join(DRAFT_LAYOUTS)}", values["draft_layout"])
    if values["mask_parent"] not in MASK_PARENTS:
        raise refusal(source, "mask_parent", f"one of {', '.join(MASK_PARENTS)}", values["mask_parent"])
    if values["draft_layout"] == "anchor_in_block" and values["mask_parent"] != "previous":
        raise refusal(source, "mask_parent", "'previous' with draft_layout 'anchor_in_block'", values["mask_parent"])
    if values["draft_head"] not in DRAFT_HEADS:
        raise refusal(source, "draft_head", f"one of {', '.join(DRAFT_HEADS)}", values["draft_head"])
    _check_experts(values, source)


def _check_experts(values: dict[str, Any], source: str) -> None:
    experts = values["quantized_experts"]
    if experts is None:
        return
    if experts not in EXPERT_FORMATS:
        raise refusal(source, "quantized_experts", f"None or one of {', '.join(EXPERT_FORMATS)}", experts)
    block = EXPERT_FORMATS[experts].block
    for name in ("hidden_size", "moe_intermediate_size"):
        if block and values[name] % block:
            raise refusal(source, name, f"a multiple of {block} with experts of {experts}", values[name])


def _check_integer(source: str, name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise refusal(source, name, f"an integer from {low} to {high}", value)


def _check_ids(values: dict[str, Any], source: str) -> None:
    last = values["vocab_size"] - 1
    for name in ("bos_token_id", "pad_token_id", "mask_token_id"):
        if values[name] is not None:
            _check_integer(source, name, values[name], 0, last)
    if not isinstance(values["eos_token_ids"], tuple):
        raise refusal(source, "eos_token_ids", "a tuple of integers", values["eos_token_ids"])
    for value in values["eos_token_ids"]:
        _check_integer(source, "eos_token_id", value, 0, last)


def _check_layers(values: dict[str, Any], source: str) -> None:
    types, layers, window = values["layer_types"], values["num_hidden_layers"], values["sliding_window"]
    if not isinstance(types, tuple) or len(types) != layers or not all(name in LAYER_TYPES for name in types):
        raise refusal(source, "layer_types", f"{layers} entries of {' or '.join(LAYER_TYPES)}", types)
    if window is not None:
        _check_integer(source, "sliding_window", window, 1, 1 << 30)
    elif "hybrid_sliding" in types:
        raise refusal(source, "sliding_window", "an integer, because layer_types has hybrid_sliding", window)


def _check_rope(values: dict[str, Any], source: str) -> None:
    rope, used = values["rope_parameters"], set(values["layer_types"])
    if not isinstance(rope, dict) or not used <= rope.keys() <= set(LAYER_TYPES):
        raise refusal(source, "rope_parameters", f"an entry for each of {', '.join(sorted(used))}", rope)
    for layer_type, entry in rope.items():
        _check_rope_entry(entry, values["head_dim"], source, f"rope_parameters.{layer_type}")


def _check_rope_entry(entry: Any, head_dim: int, source: str, key: str) -> None:
    if not isinstance(entry, dict) or not entry.keys() <= {"rope_theta", "partial_rotary_factor", "rope_type"}:
        raise refusal(source, key, "rope_theta, partial_rotary_factor and rope_type", entry)
    if entry.get("rope_type", "default") != "default":
        raise refusal(source, f"{key}.rope_type", "'default' (no RoPE scaling)", entry["rope_type"])
    theta: Any = entry.get("rope_theta")
    factor: Any = entry.get("partial_rotary_factor")
    if type(theta) not in (int, float) or not 1 <= theta <= 1e12:
        raise refusal(source, f"{key}.rope_theta", "a number from 1 to 1e12", theta)
    if type(factor) not in (int, float) or not 0 < factor <= 1:
        raise refusal(source, f"{key}.partial_rotary_factor", "a number in (0, 1]", factor)
    rotary = factor * head_dim
    if not math.isclose(rotary, round(rotary), abs_tol=1e-6) or round(rotary) % 2 or round(rotary) == 0:
        wanted = f"a factor that rotates an even number of the {head_dim} dims"
        raise refusal(source, f"{key}.partial_rotary_factor", wanted, factor)


def _check_heads(values: dict[str, Any], source: str) -> None:
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % groups:
        raise refusal(source, "num_attention_heads", f"a multiple of num_key_value_heads ({groups})", heads)
    if values["head_dim"] % 2:
        raise refusal(source, "head_dim", "an even integer", values["head_dim"])
