"""Several tensors in one piece of memory, for a copy to a GPU costs some 10 us however little it brings."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes

Part = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""


def parts_of(tensors: Sequence[Tensor]) -> list[Part]:
    return [(x.dtype, tuple(x.shape)) for x in tensors]


def room_for(part: Part) -> int:
    """Bytes, up to where the next one may begin."""
    dtype, shape = part
    return -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def views(piece: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """The tensors in a piece of bytes."""
    sizes = [room_for(part) for part in parts]
    return [
        own[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
        for own, (dtype, shape) in zip(piece.split(sizes), parts, strict=True)
    ]


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors on the CPU as one piece of bytes."""
    parts = parts_of(tensors)
    piece = torch.empty(sum(room_for(part) for part in parts), dtype=torch.uint8)
    for place, x in zip(views(piece, parts), tensors, strict=True):
        place.copy_(x)
    return piece


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors on the CPU to a device, by one copy."""
    if device.type == "cpu":
        return list(tensors)
    return views(packed(tensors).to(device), parts_of(tensors))
