"""A ZAYA1 of random weights for measurements: bytes and shapes of a real one, and a choice of how it routes.

A random router sends most rows to few experts, so that a step reads less than with a trained, balanced one. UNIFORM
weights choose the experts evenly, by an ordinary router that can tell tokens apart: channel ``id mod E`` of an
embedding is large, no layer writes into those channels, and the router reads nothing else. Token id goes to expert
``(id + layer) mod E``.
"""

import math
from dataclasses import dataclass, field, replace
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdraft.bench.subject import Shapes
from blockdraft.model.config import ZayaConfig
from blockdraft.model.expert_formats import EXPERT_FORMATS
from blockdraft.model.tensor_names import expected_shapes
from blockdraft.model.weights import DTYPES
from blockdraft.quantize import mx_codes
from blockdraft.reference.pack_weight import mx_values

UNIFORM, RANDOM = "uniform", "random"
NUMBERS = 4194301  # drawn once; drawing 8.8 billion takes minutes. A prime, so that no row begins like another
CODE = 4.0  # of a token's own channel, where the others have deviation 1
DEVIATIONS = {"int8": 32.0, "fp8": 112.0, "mxfp4": 1.5}  # of stored values: a fourth of the largest one
LOGIT = 8.0  # of the chosen expert, others 0: probability 0.995 of 17 classes


def config_of(shapes: Shapes, layers: int, vocab_size: int | None = None, experts: str | None = None) -> ZayaConfig:
    """A model of these shapes; a smaller vocabulary where the LM head is not measured."""
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "partial_rotary_factor": 2 * shapes.half_rotary / shapes.head_dim,
    }
    return ZayaConfig(
        vocab_size=vocab_size or shapes.vocab_size,
        hidden_size=shapes.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        num_experts=shapes.experts,
        moe_intermediate_size=shapes.intermediate_size,
        router_hidden_size=shapes.router_hidden_size,
        layer_types=("hybrid",) * layers,
        rope_parameters={"hybrid": rope},
        mask_token_id=4,
        quantized_experts=experts,
    )


@dataclass
class RandomWeights:
    """Tensors by their native names, as a `Checkpoint` gives them, each in memory of its own.

    Attributes:
        config: Whose tensors.
        dtype: Of all but the balancing biases, which are float32.
        routing: UNIFORM or RANDOM; the same weights but for the router's first and last matrix.
        values_of: The experts are floats with the values of this format; see `widened`.
    """

    config: ZayaConfig
    dtype: torch.dtype
    routing: str = UNIFORM
    values_of: str | None = None
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    numbers: Tensor = field(init=False)  # [2 * NUMBERS], deviation 1, twice the same

    def __post_init__(self) -> None:
        self.shapes = expected_shapes(self.config)
        generator = torch.Generator().manual_seed(0)
        self.numbers = torch.empty(NUMBERS, dtype=self.dtype).normal_(generator=generator).repeat(2)

    def widened(self) -> "RandomWeights":
        """The same values for those who know floats only."""
        config = replace(self.config, quantized_experts=None)
        return RandomWeights(config, self.dtype, self.routing, values_of=self.config.quantized_experts)

    def read(self, name: str) -> Tensor:
        E, leaf = self.config.num_experts, leaf_of(name)
        if leaf.endswith("balancing_biases"):
            return F.pad(torch.zeros(E), (0, 1), value=-1.0)  # nobody is skipped
        experts = self.values_of or self.config.quantized_experts
        if leaf.startswith("mlp.experts.") and experts:
            return self.expert(leaf, self.shapes[name], experts)
        value = self.plain(leaf, self.shapes[name])
        if leaf.endswith("residual_scale.hidden_states_scale"):
            value[:E] = 0
        elif leaf == "model.embed_tokens.weight":
            value[:, :E] = CODE * F.one_hot(torch.arange(len(value)) % E, E)
        elif self.routing == UNIFORM and leaf == "mlp.gate.down_proj.weight":
            value[:, E:] = 0
        elif self.routing == UNIFORM and leaf == "mlp.gate.router_mlp.out_proj.weight":
            value[:E] = self.readout().roll(int(name.split(".")[2]), 0)
            value[E] = 0
        return value

    def plain(self, leaf: str, shape: tuple[int, ...]) -> Tensor:
        if leaf.endswith("bias"):
            return torch.zeros(shape, dtype=self.dtype)
        if leaf.endswith(("scale", "temp")) or "norm" in leaf:
            return torch.ones(shape, dtype=self.dtype)
        return self.normal(leaf, shape, deviation(leaf, shape))

    def expert(self, leaf: str, shape: tuple[int, ...], experts: str) -> Tensor:
        """Values, their scales, or the products of both, which the dtype holds exactly: a scale is a power of two."""
        inputs = {"gate_up_proj": self.config.hidden_size, "down_proj": self.config.moe_intermediate_size}
        K = inputs[leaf.split(".")[2].removesuffix("_scale")]
        exponent, stored = round(math.log2(K**-0.5 / DEVIATIONS[experts])), EXPERT_FORMATS[experts]
        if leaf.endswith("_scale"):
            return torch.full(shape, 127 + exponent if stored.block else 2.0**exponent, dtype=DTYPES[stored.scales[0]])
        values = self.stored(leaf, (*shape[:-1], K // stored.values_per_byte), experts)
        if not self.values_of:
            return values
        if stored.block:
            scales = torch.full((values.shape[1], K // stored.block), 127 + exponent)
            return torch.stack([mx_values(expert, scales).to(self.dtype) for expert in values])  # float64 on the way
        return values.to(self.dtype).mul_(2.0**exponent)

    def stored(self, leaf: str, shape: tuple[int, ...], experts: str) -> Tensor:
        """Of the numbers."""
        if experts == "mxfp4":
            codes = mx_codes(self.part(leaf, math.prod(shape)).float() * DEVIATIONS[experts])
            return self.repeated(codes | codes.flip(0) << 4, shape)
        dtype, largest = DTYPES[EXPERT_FORMATS[experts].values], 127 if experts == "int8" else 448
        numbers = (self.part(leaf, math.prod(shape)) * DEVIATIONS[experts]).clamp_(-largest, largest)
        return self.repeated((numbers.round_() if experts == "int8" else numbers).to(dtype), shape)

    def normal(self, leaf: str, shape: tuple[int, ...], scale: float) -> Tensor:
        """The numbers, from a place of its own for each leaf, as often as the shape needs them; layers are alike."""
        return self.repeated(self.part(leaf, math.prod(shape)) * scale, shape)

    def part(self, leaf: str, count: int) -> Tensor:
        """At most all of them."""
        begin = crc32(leaf.encode()) % NUMBERS
        return self.numbers[begin : begin + min(NUMBERS, count)]

    @staticmethod
    def repeated(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(shape, dtype=numbers.dtype)
        flat = out.view(-1)
        for first in range(0, flat.numel(), len(numbers)):
            flat[first : first + len(numbers)] = numbers[: flat.numel() - first]
        return out

    def readout(self) -> Tensor:
        """``[E, R]``: the last router matrix that gives logit LOGIT to expert e for a token of id e, to others 0.

        Router states add up over the layers, but all point the way of the token's column: the norm makes them equal.
        """
        mlp = "model.layers.0.mlp.gate."
        x = self.read(mlp + "down_proj.weight")[:, : self.config.num_experts].float().T
        x = F.rms_norm(x, x.shape[-1:])
        for name in ("fc1", "fc2"):
            x = F.gelu(x @ self.read(f"{mlp}router_mlp.{name}.weight").float().T)
        return (LOGIT * torch.linalg.pinv(x).T).to(self.dtype)


def experts_label(experts: str | None) -> str:
    return f", {experts} experts" if experts else ""


def leaf_of(name: str) -> str:
    """A name without its layer."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name


def deviation(leaf: str, shape: tuple[int, ...]) -> float:
    """Such that a product keeps the size of its input; a convolution sums over all dimensions but the first."""
    if leaf == "model.embed_tokens.weight":
        return 1.0
    return float((shape[1] * shape[2] if "conv_qk" in leaf else shape[-1]) ** -0.5)
