import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_weight(weight: Tensor, halves: int = 1) -> Tensor:
    """Reorders a weight matrix into the order in which the kernels stream it.

    Panels of 32 rows, two neighbouring columns at a time, ``[panels, ceil(K / 2), 64]``; the inner order is ``[32][2]``
    in bfloat16 and in one byte, ``[2][32]`` in float32. Missing rows and an odd last column are zeros. All devices have
    the same layout, so packed tensors may move between them. It may change between versions: pack at load time, do not
    store.

    uint8 are codes of MXFP4, two neighbouring columns in a byte, the first one in the low bits: ``[N, K / 2]``, where K
    is a multiple of 32. Packed they are ``[panels, K / 2, 32]``: of each eight columns ``[32][2]`` words of 16 bits,
    for the even and the odd columns of a row.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, float32, bfloat16, int8, float8_e4m3fn or uint8.
        halves: 2 for two matrices stacked along N (gate above up) whose panels are to alternate, else 1.

    Returns:
        ``[panels, ceil(K / 2), 64]`` or ``[E, panels, ceil(K / 2), 64]`` with
        ``panels = halves * ceil(N / halves / 32)``.

    Raises:
        RuntimeError: weight has a wrong rank, dtype or layout, N is not divisible by halves, or K not by 32 (uint8).
    """
    return torch.ops.blockdraft.pack_weight(weight, halves)


def pack_scales(scales: Tensor, halves: int = 1) -> Tensor:
    """The scales of a stack of weights as `moe_experts` takes them.

    Args:
        scales: ``[E, N, 1]``, float32, of rows; or ``[E, N, K / 32]``, uint8, of blocks (MXFP4).
        halves: As `pack_weight` has it.

    Returns:
        ``[E, N]`` of rows; ``[E, panels, K / 32, 32]`` of blocks, those of missing rows are 2^0.
    """
    E, N, blocks = scales.shape
    if scales.dtype != torch.uint8:
        return scales.squeeze(-1)
    rows = pad(scales.view(E, halves, N // halves, blocks), (0, 0, 0, -(N // halves) % 32), value=127)
    panels = rows.view(E, halves, -1, 32, blocks).transpose(1, 2)  # [E, N / halves / 32, halves, 32, blocks]
    return panels.transpose(3, 4).reshape(E, -1, blocks, 32).contiguous()


@torch.library.register_fake("blockdraft::pack_weight")
def _(weight: Tensor, halves: int) -> Tensor:
    *stack, N, K = weight.shape
    pair = (K, 32) if weight.dtype == torch.uint8 else ((K + 1) // 2, 64)
    return weight.new_empty([*stack, halves * ((N // halves + 31) // 32), *pair])
