import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_weight(weight: Tensor, halves: int = 1) -> Tensor:
    """`blockdraft.ops.pack_weight`."""
    *stack, N, K = weight.shape
    w = weight.reshape(-1, halves, N // halves, K)  # [E, halves, N / halves, K]
    w = pad(w, (0, K % 2, 0, -(N // halves) % 32))
    E, _, rows, columns = w.shape
    w = w.reshape(E, halves, rows // 32, 32, columns // 2, 2)
    inner = (3, 5) if weight.dtype in (torch.bfloat16, torch.int8) else (5, 3)  # [32][2] or [2][32]
    return w.permute(0, 2, 1, 4, *inner).reshape(*stack, halves * rows // 32, columns // 2, 64).contiguous()


def unpack_weight(packed: Tensor, N: int, K: int, halves: int = 1) -> Tensor:
    """The matrix that `pack_weight` packed."""
    *stack, panels, pairs, _ = packed.shape
    w = packed.reshape(-1, panels // halves, halves, pairs, 32, 2)
    if packed.dtype not in (torch.bfloat16, torch.int8):
        w = packed.reshape(-1, panels // halves, halves, pairs, 2, 32).transpose(-1, -2)
    w = w.permute(0, 2, 1, 4, 3, 5).reshape(-1, halves, panels // halves * 32, 2 * pairs)
    return w[:, :, : N // halves, :K].reshape(*stack, N, K).contiguous()
