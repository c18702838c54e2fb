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
from blockdraft.model.tensor_names import expected_shapes

UNIFORM, RANDOM = "uniform", "random"
NUMBERS = 4194301  # drawn once; drawing 8.8 billion takes minutes. A prime, so that no row begins like another
CODE = 4.0  # of a token's own channel, where the others have deviation 1
INT8_DEVIATION = 32.0  # a fourth of the largest value
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
        of_int8: The experts have the values that int8 can have; see `widened`.
    """

    config: ZayaConfig
    dtype: torch.dtype
    routing: str = UNIFORM
    of_int8: bool = False
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    numbers: Tensor = field(init=False)  # [2 * NUMBERS], deviation 1, twice the same

    def __post_init__(self) -> None:
        self.shapes = expected_shapes(self.config)
        generator = torch.Generator().manual_seed(0)
        self.numbers = torch.empty(NUMBERS, dtype=self.dtype).normal_(generator=generator).repeat(2)

    def widened(self) -> "RandomWeights":
        """The same values for those who know no experts of int8."""
        quantized = self.config.quantized_experts is not None
        config = replace(self.config, quantized_experts=None)
        return RandomWeights(config, self.dtype, self.routing, of_int8=quantized)

    def read(self, name: str) -> Tensor:
        E, leaf = self.config.num_experts, leaf_of(name)
        if leaf.endswith("balancing_biases"):
            return F.pad(torch.zeros(E), (0, 1), value=-1.0)  # nobody is skipped
        if leaf.startswith("mlp.experts.") and (self.of_int8 or self.config.quantized_experts):
            return self.expert(leaf, self.shapes[name])
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

    def expert(self, leaf: str, shape: tuple[int, ...]) -> Tensor:
        """int8, their scales, or the products of both, which the dtype holds exactly: a scale is a power of two."""
        inputs = {"gate_up_proj": self.config.hidden_size, "down_proj": self.config.moe_intermediate_size}
        scale = 2.0 ** round(math.log2(inputs[leaf.split(".")[2].removesuffix("_scale")] ** -0.5 / INT8_DEVIATION))
        if leaf.endswith("_scale"):
            return torch.full(shape, scale)
        values = self.normal(leaf, shape, INT8_DEVIATION, torch.int8)
        return values.to(self.dtype).mul_(scale) if self.of_int8 else values

    def normal(self, leaf: str, shape: tuple[int, ...], scale: float, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers, from a place of its own for each leaf, as often as the shape needs them; layers are alike."""
        out = torch.empty(shape, dtype=dtype or self.dtype)
        flat = out.view(-1)
        begin = crc32(leaf.encode()) % NUMBERS
        numbers = self.numbers[begin : begin + min(NUMBERS, flat.numel())] * scale
        if dtype == torch.int8:
            numbers = numbers.round_().clamp_(-127, 127).to(dtype)
        for first in range(0, flat.numel(), NUMBERS):
            flat[first : first + NUMBERS] = numbers[: flat.numel() - first]
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


def leaf_of(name: str) -> str:
    """A name without its layer."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name


def deviation(leaf: str, shape: tuple[int, ...]) -> float:
    """Such that a product keeps the size of its input; a convolution sums over all dimensions but the first."""
    if leaf == "model.embed_tokens.weight":
        return 1.0
    return float((shape[1] * shape[2] if "conv_qk" in leaf else shape[-1]) ** -0.5)
