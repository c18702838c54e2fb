from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdraft import ops, reference
from blockdraft.bench.subject import Case, Copies, Setting, Subject, nbytes
from blockdraft.reference.pages import empty_pages, read_keys

POSITION = 1000  # of the first row


class CcaMix(Case):
    """Rows of one sequence, each the parent of the next."""

    op = "cca_mix"

    def __init__(self, setting: Setting, weights: Copies, plain: Copies, rows: int) -> None:
        s, dtype = setting.shapes, setting.dtype
        self.weights, self.plain, self.head_dim, self.depth = weights, plain, s.head_dim, 4 * s.head_dim
        self.qkv = setting.normal(rows, s.qkv_width)
        row = torch.arange(rows, dtype=torch.int32)
        self.per_row = (row - 1, row + POSITION, torch.zeros_like(row), row.long())
        self.conv_states = setting.normal(1, 2, s.channels)
        self.recurrent_states = setting.normal(1, s.kv_heads * s.head_dim // 2)
        self.inverse_frequencies = 5e6 ** -(torch.arange(s.half_rotary) / s.half_rotary)
        num_pages = -(-rows // s.page_size)
        self.pages = empty_pages(num_pages, s.kv_heads, s.page_size, s.head_dim, dtype)
        self.page_table = torch.arange(num_pages, dtype=torch.int32)
        angle = (row + POSITION)[:, None, None] * self.inverse_frequencies
        self.cos, self.sin = (f(angle).to(dtype) for f in (torch.cos, torch.sin))  # once per step, as transformers does
        self.cache = tuple(torch.zeros(rows, s.kv_heads, s.head_dim, dtype=dtype) for _ in "kv")
        self.cold_bytes = weights.bytes
        # Twice: q, k and v are as wide as the projection; k and v once more for the pages.
        self.touched_bytes = weights.bytes + 2 * nbytes(self.qkv) + nbytes(*self.cache)

    def arguments(self, turn: int) -> tuple[Any, ...]:
        states = (self.conv_states, self.recurrent_states)
        return self.qkv, *self.per_row, *states, *self.weights[turn], self.inverse_frequencies, *self.pages

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        states = (self.conv_states.transpose(1, 2), self.recurrent_states)
        return self.qkv, *states, *self.plain[turn], self.cos, self.sin, *self.cache, self.per_row[3]

    @staticmethod
    def pytorch(
        qkv: Tensor,
        conv_state: Tensor,
        recurrent_state: Tensor,
        depthwise: Tensor,
        depthwise_bias: Tensor,
        grouped: Tensor,
        grouped_bias: Tensor,
        temp: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, C, D, Hkv = len(qkv), depthwise.shape[0], grouped.shape[1], temp.shape[0]
        heads, half = C // D, Hkv * D // 2
        u = torch.cat([conv_state, qkv[None, :, :C].transpose(1, 2)], -1)  # [1, C, 2 + T]
        m = F.conv1d(u, depthwise, depthwise_bias, groups=C)
        y = F.conv1d(m, grouped, grouped_bias, groups=heads)[0].T.reshape(T, heads, D)
        q = qkv[:, : C - Hkv * D].view(T, Hkv, -1, D)
        mean = (q + qkv[:, C - Hkv * D : C].view(T, Hkv, 1, D)) * 0.5  # [T, Hkv, G, D]
        Q = F.normalize((y[:, : heads - Hkv] + mean.flatten(1, 2)).float(), dim=-1) * D**0.5
        K = F.normalize((y[:, heads - Hkv :] + mean.mean(2)).float(), dim=-1) * D**0.5 * temp[:, None]
        Q, K = (rotate(x.to(qkv.dtype), cos, sin) for x in (Q, K))
        delayed = torch.cat([recurrent_state, qkv[:-1, C + half :]])
        V = torch.cat([qkv[:, C : C + half], delayed], -1).view(T, Hkv, D)
        k_cache[slots] = K
        v_cache[slots] = V
        return Q, K, V

    def first(self) -> tuple[Any, ...]:
        qkv, *rest = self.arguments(0)
        return qkv[:1], *(t[:1] for t in rest[:4]), *rest[4:]

    def run(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return self.with_pages(ops.cca_mix, arguments)

    def with_pages(self, operator: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """What the operator returns, and the keys and values that it wrote."""
        pages = [torch.zeros_like(page) for page in arguments[-2:]]
        outputs = operator(*arguments[:-2], *pages)
        return *outputs, *read_keys(*pages, self.page_table, len(arguments[0]), self.head_dim)

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        *head, depthwise, depthwise_bias, grouped, grouped_bias, temp, frequencies, k_pages, v_pages = self.arguments(0)
        wide = (depthwise.double(), depthwise_bias.double(), grouped, grouped_bias.double(), temp.double())
        exact = self.with_pages(reference.cca_mix, (*head, *wide, frequencies, k_pages, v_pages))
        return list(zip(outputs, exact, strict=True))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    low, high, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1)


def subjects(setting: Setting) -> Iterator[Subject]:
    s, D, C = setting.shapes, setting.shapes.head_dim, setting.shapes.channels
    depthwise, depthwise_bias = setting.normal(2, C), setting.normal(C, scale=0.1)
    grouped = setting.normal(C // D, D, 2 * D, scale=(2 * D) ** -0.5)  # [heads, out, tap * in]
    grouped_bias, temp = setting.normal(C, scale=0.1), 1 + torch.rand(s.kv_heads)
    vectors = (depthwise.float(), depthwise_bias.float(), grouped_bias.float())
    weights = setting.copies(*vectors[:2], ops.pack_weight(grouped), vectors[2], temp)
    taps = grouped.view(C, 2, D).transpose(1, 2).contiguous()  # conv1d: [C, in, tap]
    plain = setting.copies(depthwise.T[:, None].contiguous(), depthwise_bias, taps, grouped_bias, temp)
    yield Subject("cca_mix", partial(CcaMix, setting, weights, plain))
