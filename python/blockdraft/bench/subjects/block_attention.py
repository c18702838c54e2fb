from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdraft import ops, reference
from blockdraft.bench.subject import BLOCK, Case, Copies, Setting, Subject, nbytes, spread


class BlockAttention(Case):
    """One sequence: a block of causal rows behind the context, then mask groups, each behind some row of the block.

    PyTorch gets keys and values gathered beforehand into one tensor, without pages and with those of the rows in place,
    and the query heads of a key head as further rows, which is faster than enable_gqa.
    """

    op = "block_attention"

    def __init__(self, setting: Setting, pages: Copies, plain: Copies, context: int, rows: int) -> None:
        s = setting.shapes
        self.pages, self.plain, self.scale = pages, plain, s.head_dim**-0.5
        self.causal, self.keys, self.depth = min(rows, BLOCK), context + rows, context + rows + s.head_dim
        self.q = setting.normal(rows, s.heads, s.head_dim)
        # Row t has the key that the plain cache has at context + t.
        self.k, self.v = (x[0, :, context : self.keys].transpose(0, 1).contiguous() for x in plain[0])
        self.per_row, self.visible = visibility(rows, context)
        mask = torch.zeros(rows, self.keys, dtype=setting.dtype).masked_fill_(~self.visible, -torch.inf)
        self.mask = None if rows == 1 else mask.repeat(s.heads // s.kv_heads, 1)
        self.page_table = torch.arange(pages[0][0].shape[0], dtype=torch.int32)[None]
        self.cu_rows = torch.tensor([0, rows], dtype=torch.int32)
        self.cold_bytes = 2 * (context + self.causal) * s.kv_heads * s.head_dim * setting.dtype.itemsize
        self.touched_bytes = self.cold_bytes + 2 * nbytes(self.q) + nbytes(self.k, self.v)
        self.note = f"causal rows: {self.causal}" + (f", mask rows: {rows - BLOCK}" if rows > BLOCK else "")

    def arguments(self, turn: int) -> tuple[Any, ...]:
        places = (self.page_table, self.cu_rows, *self.per_row)
        return self.q, self.k, self.v, *self.pages[turn], *places, self.scale

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        k, v = self.plain[turn]
        return self.q, k[:, :, : self.keys], v[:, :, : self.keys], self.mask

    @staticmethod
    def pytorch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        (T, Hq, D), Hkv = q.shape, k.shape[1]
        folded = q.view(T, Hkv, -1, D).permute(1, 2, 0, 3).reshape(1, Hkv, -1, D)  # [1, Hkv, G * T, D]
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
        return out.view(Hkv, -1, T, D).permute(2, 0, 1, 3).reshape(T, Hq, D)

    def first(self) -> tuple[Any, ...]:
        cu_rows = torch.tensor([0, 1], dtype=torch.int32)
        per_row = (t[:1] for t in self.per_row)
        return self.q[:1], self.k[:1], self.v[:1], *self.pages[0], self.page_table, cu_rows, *per_row, self.scale

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        wide = (self.q.double(), self.k.double(), self.v.double())
        result = []
        for t in spread(len(self.q), 4).tolist():  # the reference takes some tenths of a second a row
            one = torch.tensor([t, t + 1], dtype=torch.int32)
            exact = reference.block_attention(*wide, *self.pages[0], self.page_table, one, *self.per_row, self.scale)
            result.append((outputs[0][t], exact[t]))
        return result


def visibility(rows: int, context: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """``row_positions, row_prefix, row_group_begin, row_group_end``, and what they say as ``[rows, keys]`` bool."""
    positions, prefix, begins, ends = [], [], [], []
    visible = torch.zeros(rows, context + rows, dtype=torch.bool)
    for t in range(rows):
        group = t - t % BLOCK
        begin, end = (group, min(group + BLOCK, rows)) if group else (0, 0)
        prefix.append(context + (1 + 5 * (group // BLOCK) % BLOCK if group else t + 1))
        positions.append(prefix[-1] + t - group if group else context + t)
        begins.append(begin)
        ends.append(end)
        visible[t, : prefix[-1]] = True
        visible[t, context + begin : context + end] = True
    return tuple(torch.tensor(x, dtype=torch.int32) for x in (positions, prefix, begins, ends)), visible


def paged(keys: Tensor, page_size: int, as_values: bool) -> Tensor:
    """Pages of keys ``[1, Hkv, tokens, D]``, whose tokens are a multiple of page_size."""
    tiles = keys[0].unflatten(1, (-1, page_size // 32, 32)).transpose(0, 1)  # [N, Hkv, page_size / 32, 32, D]
    matrices = (tiles.transpose(-1, -2) if as_values else tiles).flatten(0, 2).contiguous()
    return ops.pack_weight(matrices).view(*tiles.shape[:3], -1)


def subjects(setting: Setting) -> Iterator[Subject]:
    s = setting.shapes
    for context in s.contexts:
        length = context + max(setting.most_rows, BLOCK)
        length += -length % s.page_size
        k, v = (setting.normal(1, s.kv_heads, length, s.head_dim) for _ in "kv")
        used = context + BLOCK
        used += -used % s.page_size
        pages = (paged(x[:, :, :used], s.page_size, x is v) for x in (k, v))
        yield Subject(
            f"block_attention context {context}",
            partial(BlockAttention, setting, setting.copies(*pages), setting.copies(k, v), context),
        )
