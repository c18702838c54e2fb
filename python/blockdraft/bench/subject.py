"""What is measured: an operator on some rows at the shapes of a ZAYA1-8B layer, and the same in ordinary PyTorch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from blockdraft import ops
from blockdraft.model.memory import new_stack

BLOCK = 16  # rows of a verified block, and of a mask group
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # largest relative error of one rounding


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model; by default ZAYA1-8B."""

    hidden_size: int = 2048
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    half_rotary: int = 32
    experts: int = 16
    intermediate_size: int = 2048
    router_hidden_size: int = 256
    vocab_size: int = 262272
    layers: int = 40
    contexts: tuple[int, ...] = (512, 8192)
    page_size: int = 32

    @property
    def channels(self) -> int:
        return (self.heads + self.kv_heads) * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.channels + self.kv_heads * self.head_dim


ZAYA1_8B = Shapes()
TINY = Shapes(
    hidden_size=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    half_rotary=4,
    experts=4,
    intermediate_size=64,
    router_hidden_size=24,
    vocab_size=1000,
    layers=3,
    contexts=(40, 70),
)


@dataclass(frozen=True)
class Setting:
    """What all subjects of a run share.

    Attributes:
        cold_bytes: At least so much memory is touched before an operator meets the same copy of its weights again.
        most_rows: The largest number of rows that a case will be asked for.
    """

    shapes: Shapes
    dtype: torch.dtype
    cold_bytes: int
    most_rows: int

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=self.dtype).normal_(0, scale)

    def copies(self, *tensors: Tensor) -> "Copies":
        return Copies(tensors, self.cold_bytes)

    def packed_copies(self, *tensors: Tensor) -> "Copies":
        """In memory like that of a model's packed weights."""
        return Copies(tensors, self.cold_bytes, packed=True)


class Copies:
    """Copies of a layer's weights; call number `turn` reads one that went longest without being read."""

    def __init__(self, tensors: Sequence[Tensor], cold_bytes: int, packed: bool = False) -> None:
        self.bytes = nbytes(*tensors)
        self.count = max(1, math.ceil(cold_bytes / self.bytes))
        self.stacks = [new_stack(t, self.count).copy_(t) if packed else self._stack(t) for t in tensors]

    def _stack(self, t: Tensor) -> Tensor:
        return t.expand(self.count, *t.shape).contiguous()  # no copying where count is 1

    def __getitem__(self, turn: int) -> tuple[Tensor, ...]:
        return tuple(stack[turn % self.count] for stack in self.stacks)


@dataclass(frozen=True)
class Match:
    """The largest error of all elements; error and tolerance of the element that came nearest to its tolerance."""

    max_error: float
    worst_error: float
    worst_tolerance: float
    ok: bool


class Case(ABC):
    """One operator on a number of rows. What a call reads is made before it, so that a timed call is the call alone.

    Attributes:
        op: Name in `blockdraft.ops`.
        depth: Length of the longest chain of float32 operations, for the tolerance.
        roundings: How often a result may have been rounded to its dtype, for the tolerance.
        inner_roundings: Of intermediate values, for the tolerance.
        cold_bytes: Read from the weights (or the cache) of the call's turn.
        touched_bytes: All the call reads and writes, each byte once. Computed from the shapes.
        note: What else a reader must know, such as how many experts are touched.
    """

    op: ClassVar[str]
    depth: int = 0
    roundings: ClassVar[int] = 1
    inner_roundings: ClassVar[int] = 0
    cold_bytes: int
    touched_bytes: int
    note: str = ""

    @abstractmethod
    def arguments(self, turn: int) -> tuple[Any, ...]:
        """Of the operator."""

    @abstractmethod
    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        """Of `pytorch`; the same values from memory of their own."""

    pytorch: Callable[..., Any]
    """The same in ordinary PyTorch: plain weights of the same dtype, nothing that only a reference would do."""

    @abstractmethod
    def first(self) -> tuple[Any, ...]:
        """`arguments(0)` with the first row (or sequence) alone."""

    @abstractmethod
    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """What `outputs` of `arguments(0)` are, and what they should be in float64 or float32."""

    def run(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """One call; its results, and what it wrote in place, with the rows (or sequences) in dimension 0."""
        return as_tuple(getattr(ops, self.op)(*arguments))

    def match(self) -> Match:
        return compare(self.pairs(self.run(self.arguments(0))), self.depth, self.roundings, self.inner_roundings)

    def same_bits(self) -> bool:
        """Whether the first row gets the same bits alone and beside the others."""
        together, alone = self.run(self.arguments(0)), self.run(self.first())
        return all(torch.equal(a[:1], b[:1]) for a, b in zip(together, alone, strict=True))


@dataclass(frozen=True)
class Subject:
    """An operator with weights in place.

    Attributes:
        label: Name in the table.
        case: Makes the case of a number of rows.
    """

    label: str
    case: Callable[[int], Case]


def compare(pairs: Sequence[tuple[Tensor, Tensor]], depth: int, roundings: int, inner_roundings: int = 0) -> Match:
    """Element by element: two units of the dtype per rounding (the reference rounds too), the float32 chain and the
    inner roundings relative to the largest value."""
    max_error, worst_share, worst = 0.0, -1.0, (0.0, 0.0)
    for got, exact in pairs:
        unit = UNIT.get(got.dtype, 2.0**-24)
        inner = depth * 2.0**-24 + inner_roundings * unit
        wanted = exact.double()
        tolerance = 2 * roundings * unit * wanted.abs() + inner * wanted.abs().max()
        error = (got.double() - wanted).abs().nan_to_num(torch.inf, torch.inf)
        share = torch.where(error > 0, error / tolerance, 0.0).nan_to_num(torch.inf, torch.inf)
        i = int(share.argmax())
        max_error = max(max_error, float(error.max()))
        if float(share.flatten()[i]) > worst_share:
            worst_share = float(share.flatten()[i])
            worst = float(error.flatten()[i]), float(tolerance.flatten()[i])
    return Match(max_error, *worst, worst_share <= 1)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def spread(rows: int, count: int) -> Tensor:
    """At most `count` different rows, the first and the last among them."""
    return torch.linspace(0, rows - 1, min(rows, count)).round().long()


def pick(values: Tensor, ids: Tensor) -> Tensor:
    """``values[t, ids[t]]``, NaN for an id out of range."""
    inside = (ids >= 0) & (ids < values.shape[1])
    index = ids.long().where(inside, torch.zeros((), dtype=torch.int64))
    return values.gather(1, index[:, None])[:, 0].where(inside, torch.full((), torch.nan, dtype=values.dtype))


def block_starts(rows: int) -> Tensor:
    """``cu_rows`` of sequences of one block each; the last may be shorter."""
    return torch.tensor([*range(0, rows, BLOCK), rows], dtype=torch.int32)
