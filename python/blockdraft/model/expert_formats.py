"""How experts may be stored, if not as floats: dtypes, shapes and bytes, and what config.json says of it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ExpertFormat:
    """Values and scales of a matrix ``[E, N, K]``.

    Attributes:
        values: dtype of the values, as safetensors names it.
        scales: dtypes that the scales may have; the first one is what `blockdraft quantize` writes.
        values_per_byte: Neighbouring values of a row, the first one in the low bits.
        block: Values of a row that share a scale; None for all of them.
        about_scales: The same in words.
        format: And in those of compressed-tensors.
        weights: Its description of them.
    """

    values: str
    scales: tuple[str, ...] = ("F32", "BF16", "F16")
    values_per_byte: int = 1
    block: int | None = None
    about_scales: str = "a float32 scale for each row"
    format: str
    weights: dict[str, Any]

    @property
    def weight_bytes(self) -> float:
        """Of a weight; a row's one scale is not counted."""
        return 1 / self.values_per_byte + (1 / self.block if self.block else 0)

    def values_shape(self, E: int, N: int, K: int) -> tuple[int, int, int]:
        return E, N, K // self.values_per_byte

    def scales_shape(self, E: int, N: int, K: int) -> tuple[int, int, int]:
        return E, N, K // self.block if self.block else 1


INT8 = ExpertFormat(
    values="I8",
    format="int-quantized",
    weights={"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
)
FP8 = ExpertFormat(
    values="F8_E4M3",
    format="float-quantized",
    weights={"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
)
MXFP4 = ExpertFormat(
    values="U8",
    scales=("U8",),
    values_per_byte=2,
    block=32,
    about_scales="a power of two for each 32 weights of a row",
    format="mxfp4-pack-quantized",
    weights={
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
        "dynamic": False,
    },
)
EXPERT_FORMATS = {"int8": INT8, "mxfp4": MXFP4, "fp8": FP8}


def expert_bytes(experts: str | None, itemsize: int) -> float:
    """Bytes of an expert's weight: of a format, or of floats of `itemsize` bytes."""
    return EXPERT_FORMATS[experts].weight_bytes if experts else itemsize
