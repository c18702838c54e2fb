"""Pages of keys and values as plain tensors.

A page holds 32-key tiles of each key-value head in the packed order of `pack_weight`: keys as the rows of the matrix
for k, head dimensions as its rows for v.
"""

import torch
from torch import Tensor

from blockdraft.reference.pack_weight import pack_weight, unpack_weight

TILE = 32


def read_keys(k_pages: Tensor, v_pages: Tensor, pages: Tensor, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """k and v ``[length, Hkv, D]`` of a sequence with these pages."""
    page_size = k_pages.shape[2] * TILE
    index = pages[: (length + page_size - 1) // page_size].long()
    D, panels = head_dim, (head_dim + 31) // 32
    tiles_k = k_pages[index].transpose(1, 2).flatten(0, 1)  # [tiles, Hkv, 32 * D]
    tiles_v = v_pages[index].transpose(1, 2).flatten(0, 1)
    k = unpack_weight(tiles_k.unflatten(-1, (1, D // 2, 64)), TILE, D)  # [tiles, Hkv, 32, D]
    v = unpack_weight(tiles_v.unflatten(-1, (panels, TILE // 2, 64)), D, TILE).transpose(-1, -2)
    k, v = (x.transpose(1, 2).flatten(0, 1)[:length] for x in (k, v))
    return k, v


def write_keys(k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Writes k and v ``[T, Hkv, D]`` to key slots ``page * page_size + offset``; a slot of -1 is passed over."""
    D, panels, page_size = k.shape[2], (k.shape[2] + 31) // 32, k_pages.shape[2] * TILE
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, tile, offset = slot // page_size, slot % page_size // TILE, slot % TILE
        tile_k = unpack_weight(k_pages[page, :, tile].unflatten(-1, (1, D // 2, 64)), TILE, D)  # [Hkv, 32, D]
        tile_v = unpack_weight(v_pages[page, :, tile].unflatten(-1, (panels, TILE // 2, 64)), D, TILE)
        tile_k[:, offset], tile_v[:, :, offset] = k[t], v[t]
        k_pages[page, :, tile] = pack_weight(tile_k).flatten(1)
        v_pages[page, :, tile] = pack_weight(tile_v).flatten(1)


def empty_pages(
    num_pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Zeroed pages of one layer."""
    shape = (num_pages, kv_heads, page_size // TILE)
    k = torch.zeros(*shape, TILE * head_dim, dtype=dtype)
    return k, torch.zeros(*shape, TILE * ((head_dim + 31) // 32) * 32, dtype=dtype)
