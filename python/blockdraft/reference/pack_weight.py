import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_weight(weight: Tensor, halves: int = 1) -> Tensor:
    """`blockdraft.ops.pack_weight`."""
    *stack, N, K = weight.shape
    if weight.dtype == torch.uint8:  # two codes each
        return _pack_codes(weight, halves)
    w = weight.reshape(-1, halves, N // halves, K)  # [E, halves, N / halves, K]
    w = pad(w, (0, K % 2, 0, -(N // halves) % 32))
    E, _, rows, columns = w.shape
    w = w.reshape(E, halves, rows // 32, 32, columns // 2, 2)
    inner = (3, 5) if weight.dtype.itemsize <= 2 else (5, 3)  # [32][2] or [2][32]
    return w.permute(0, 2, 1, 4, *inner).reshape(*stack, halves * rows // 32, columns // 2, 64).contiguous()


def unpack_weight(packed: Tensor, N: int, K: int, halves: int = 1) -> Tensor:
    """The matrix that `pack_weight` packed."""
    *stack, panels, pairs, _ = packed.shape
    if packed.dtype == torch.uint8:
        return _unpack_codes(packed, N, halves)
    w = packed.reshape(-1, panels // halves, halves, pairs, 32, 2)
    if packed.dtype.itemsize > 2:
        w = packed.reshape(-1, panels // halves, halves, pairs, 2, 32).transpose(-1, -2)
    w = w.permute(0, 2, 1, 4, 3, 5).reshape(-1, halves, panels // halves * 32, 2 * pairs)
    return w[:, :, : N // halves, :K].reshape(*stack, N, K).contiguous()


def unpack_scales(packed: Tensor, N: int, halves: int = 1) -> Tensor:
    """The scales of blocks ``[E, N, K / 32]`` that `pack_scales` packed."""
    E, panels, blocks, _ = packed.shape
    w = packed.reshape(E, panels // halves, halves, blocks, 32).permute(0, 2, 1, 4, 3)
    return w.reshape(E, halves, -1, blocks)[:, :, : N // halves].reshape(E, N, blocks).contiguous()


def mx_values(codes: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 in float32 ``[.., K]``: bytes of two codes ``[.., K / 2]``, exponents of scales ``[.., K / 32]``.

    A code is a sign, two bits of exponent and one of mantissa; exponent 0 is for 0 and 1/2 (OCP Microscaling Formats
    1.0).
    """
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()  # [.., K]
    exponent, mantissa = both >> 1 & 3, both & 1
    size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    signed = torch.where(both < 8, size, -size).unflatten(-1, (-1, 32))
    return (signed.double() * 2.0 ** (scales.double() - 127)[..., None]).float().flatten(-2)


def _pack_codes(weight: Tensor, halves: int) -> Tensor:
    *stack, N, K = weight.shape
    w = pad(weight.reshape(-1, halves, N // halves, K), (0, 0, 0, -(N // halves) % 32))
    E, _, rows, _ = w.shape
    codes = torch.stack([w & 15, w >> 4], -1).reshape(E, halves, rows // 32, 32, K // 4, 4, 2)  # [.., 8 columns]
    codes = codes.permute(0, 2, 1, 4, 3, 6, 5)  # [E, rows / 32, halves, K / 4, 32, 2 columns, 4 pairs]
    packed = codes[..., ::2] | codes[..., 1::2] << 4  # words of 16 bits, the low byte first
    return packed.reshape(*stack, halves * rows // 32, K, 32).contiguous()


def _unpack_codes(packed: Tensor, N: int, halves: int) -> Tensor:
    *stack, panels, K, _ = packed.shape
    w = packed.reshape(-1, panels // halves, halves, K // 4, 32, 2, 2)  # [.., 2 columns, 2 bytes]
    codes = torch.stack([w & 15, w >> 4], -1).flatten(-2)  # [.., 2 columns, 4 pairs]
    codes = codes.permute(0, 2, 1, 4, 3, 6, 5).reshape(-1, halves, panels // halves * 32, K, 2)
    return (codes[..., 0] | codes[..., 1] << 4)[:, :, : N // halves].reshape(*stack, N, K).contiguous()
