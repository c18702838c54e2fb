from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdraft import ops, reference
from blockdraft.bench.subject import Case, Copies, Setting, Subject, nbytes, spread
from blockdraft.model.expert_formats import EXPERT_FORMATS
from blockdraft.ops.pack_weight import pack_scales
from blockdraft.quantize import quantized
from blockdraft.reference.pack_weight import mx_values


class MoeExperts(Case):
    """Uniform routing without the skip class. The touched experts move on with every turn, so that they are cold."""

    op = "moe_experts"
    inner_roundings = 1

    def __init__(self, setting: Setting, packed: Copies, scales: tuple[Tensor, ...], plain: Copies, rows: int) -> None:
        s = setting.shapes
        self.packed, self.plain, self.experts, self.inner = packed, plain, s.experts, s.intermediate_size
        self.scales = scales
        self.depth = s.hidden_size + s.intermediate_size
        self.x = setting.normal(rows, s.hidden_size)
        self.ids = uniform_ids(rows, s.experts)
        self.touched = self.ids.unique().numel()
        self.topk_weights = torch.rand(rows)
        self.cold_bytes = (packed.bytes + (nbytes(*scales) if is_mx(scales) else 0)) // s.experts * self.touched
        self.touched_bytes = self.cold_bytes + 2 * nbytes(self.x)
        self.note = f"experts touched: {self.touched} of {s.experts}"
        if scales:
            self.note += f"; PyTorch with weights of {str(setting.dtype).removeprefix('torch.')}"

    def routing(self, turn: int) -> Tensor:
        return (self.ids + turn * self.touched) % self.experts

    def arguments(self, turn: int) -> tuple[Any, ...]:
        return self.x, self.routing(turn), self.topk_weights, *self.packed[turn], self.inner, False, *self.scales

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        return self.x, self.routing(turn).long(), self.topk_weights, *self.plain[turn]

    @staticmethod
    def pytorch(x: Tensor, ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        order = ids.argsort(stable=True)
        counts = ids.bincount(minlength=len(down_proj)).tolist()
        parts = []
        for e, part in enumerate(x.index_select(0, order).split(counts)):
            if len(part):
                gate, up = F.linear(part, gate_up_proj[e]).chunk(2, -1)
                parts.append(F.linear(F.silu(gate) * up, down_proj[e]))
        out = torch.empty_like(x)
        out[order] = torch.cat(parts)
        return out * weights[:, None].to(x.dtype)

    def first(self) -> tuple[Any, ...]:
        return self.x[:1], self.routing(0)[:1], self.topk_weights[:1], *self.arguments(0)[3:]

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        rows = spread(len(self.x), 8)
        experts, ids = self.routing(0)[rows].unique(return_inverse=True)
        # Of these rows alone: the reference copies them.
        weights, scales = ([stack[experts.long()] for stack in stacks] for stacks in (self.packed[0], self.scales))
        own = self.x[rows], ids, self.topk_weights[rows].double()
        exact = reference.moe_experts(*own, *weights, self.inner, False, *scales)
        return [(outputs[0][rows], exact)]


def is_mx(scales: tuple[Tensor, ...]) -> bool:
    return bool(scales) and scales[0].dtype == torch.uint8


def of_format(setting: Setting, experts: str, gate_up: Tensor, down: Tensor) -> Callable[[int], MoeExperts]:
    (up_values, up_scales), (down_values, down_scales) = quantized(gate_up, experts), quantized(down, experts)
    packed = setting.packed_copies(ops.pack_weight(up_values, halves=2), ops.pack_weight(down_values))
    scales = pack_scales(up_scales, halves=2), pack_scales(down_scales)
    wide = widened(up_values, up_scales, setting.dtype), widened(down_values, down_scales, setting.dtype)
    plain = setting.copies(*wide)
    return partial(MoeExperts, setting, packed, scales, plain)


def widened(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    def of_expert(values: Tensor, scales: Tensor) -> Tensor:
        return mx_values(values, scales) if scales.dtype == torch.uint8 else values.float() * scales

    return torch.stack([of_expert(v, s).to(dtype) for v, s in zip(values, scales, strict=True)])


def uniform_ids(rows: int, experts: int) -> Tensor:
    """Expert of each row, drawn independently until as many differ as do on average; those are 0, 1, ..."""
    wanted = round(experts * (1 - (1 - 1 / experts) ** rows))
    while True:
        different, ids = torch.randint(experts, (rows,)).unique(return_inverse=True)
        if len(different) == wanted:
            return ids.to(torch.int32)


def subjects(setting: Setting) -> Iterator[Subject]:
    E, H, inner = setting.shapes.experts, setting.shapes.hidden_size, setting.shapes.intermediate_size
    gate_up = setting.normal(E, 2 * inner, H, scale=H**-0.5)
    down = setting.normal(E, H, inner, scale=inner**-0.5)
    packed = setting.packed_copies(ops.pack_weight(gate_up, halves=2), ops.pack_weight(down))
    yield Subject("moe_experts", partial(MoeExperts, setting, packed, (), setting.copies(gate_up, down)))
    for experts, stored in EXPERT_FORMATS.items():
        if not stored.block or H % stored.block == 0 == inner % stored.block:
            yield Subject(f"moe_experts, {experts}", of_format(setting, experts, gate_up, down))
