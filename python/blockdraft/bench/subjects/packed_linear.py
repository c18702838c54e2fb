from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from blockdraft import ops, reference
from blockdraft.bench.subject import Case, Copies, Setting, Subject, nbytes


class PackedLinear(Case):
    op = "packed_linear"
    pytorch = staticmethod(F.linear)

    def __init__(self, setting: Setting, packed: Copies, plain: Copies, rows: int) -> None:
        self.packed, self.plain = packed, plain
        self.outputs, self.depth = plain[0][0].shape
        self.x = setting.normal(rows, self.depth)
        self.cold_bytes = packed.bytes
        self.touched_bytes = packed.bytes + nbytes(self.x) + rows * self.outputs * setting.dtype.itemsize

    def arguments(self, turn: int) -> tuple[Any, ...]:
        return self.x, *self.packed[turn], self.outputs

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        return self.x, *self.plain[turn]

    def first(self) -> tuple[Any, ...]:
        return self.x[:1], *self.packed[0], self.outputs

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        return [(outputs[0], reference.packed_linear(self.x.double(), *self.packed[0], self.outputs))]


def subjects(setting: Setting) -> Iterator[Subject]:
    s = setting.shapes
    for name, inputs, outputs in (("qkv", s.hidden_size, s.qkv_width), ("o", s.heads * s.head_dim, s.hidden_size)):
        weight = setting.normal(outputs, inputs, scale=inputs**-0.5)
        packed = setting.packed_copies(ops.pack_weight(weight))
        yield Subject(
            f"packed_linear {name} {inputs}->{outputs}",
            partial(PackedLinear, setting, packed, setting.copies(weight)),
        )
