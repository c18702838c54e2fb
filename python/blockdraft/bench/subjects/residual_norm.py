from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdraft import reference
from blockdraft.bench.subject import Case, Copies, Setting, Subject, nbytes

EPS = 1e-5


class ResidualNorm(Case):
    op = "residual_norm"
    roundings = 2  # the stream that the norm reads, and the result

    def __init__(self, setting: Setting, vectors: Copies, plain: Copies, rows: int) -> None:
        self.vectors, self.plain, self.depth = vectors, plain, setting.shapes.hidden_size
        self.hidden_states = setting.normal(rows, setting.shapes.hidden_size)
        self.residual = torch.randn(rows, setting.shapes.hidden_size)
        self.cold_bytes = vectors.bytes
        self.touched_bytes = vectors.bytes + 2 * nbytes(self.hidden_states, self.residual)

    def arguments(self, turn: int) -> tuple[Any, ...]:
        return self.hidden_states, self.residual, *self.vectors[turn], EPS

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        return self.hidden_states, self.residual, *self.plain[turn]

    @staticmethod
    def pytorch(
        hidden_states: Tensor,
        residual: Tensor,
        scale: Tensor,
        bias: Tensor,
        residual_scale: Tensor,
        residual_bias: Tensor,
        norm_weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        merged = (hidden_states.float() + bias) * scale + (residual + residual_bias) * residual_scale
        return F.rms_norm(merged.to(hidden_states.dtype), norm_weight.shape, norm_weight, EPS), merged

    def first(self) -> tuple[Any, ...]:
        return self.hidden_states[:1], self.residual[:1], *self.vectors[0], EPS

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        vectors = (vector.double() for vector in self.vectors[0])
        exact = reference.residual_norm(self.hidden_states, self.residual.double(), *vectors, eps=EPS)
        return list(zip(outputs, exact, strict=True))


def subjects(setting: Setting) -> Iterator[Subject]:
    vectors = torch.randn(5, setting.shapes.hidden_size).unbind()
    plain = setting.copies(*vectors[:4], vectors[4].to(setting.dtype))
    yield Subject("residual_norm", partial(ResidualNorm, setting, setting.copies(*vectors), plain))
