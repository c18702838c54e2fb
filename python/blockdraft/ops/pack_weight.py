import torch
from torch import Tensor


def pack_weight(weight: Tensor, halves: int = 1) -> Tensor:
    """Reorders a weight matrix into the order in which the kernels stream it.

    Panels of 32 rows, two neighbouring columns at a time, ``[panels, ceil(K / 2), 64]``; the inner order is ``[32][2]``
    in bfloat16 and int8, ``[2][32]`` in float32. Missing rows and an odd last column are zeros. All devices have the
    same layout, so packed tensors may move between them. It may change between versions: pack at load time, do not
    store.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, float32, bfloat16 or int8.
        halves: 2 for two matrices stacked along N (gate above up) whose panels are to alternate, else 1.

    Returns:
        ``[panels, ceil(K / 2), 64]`` or ``[E, panels, ceil(K / 2), 64]`` with
        ``panels = halves * ceil(N / halves / 32)``.

    Raises:
        RuntimeError: weight has a wrong rank, dtype or layout, or N is not divisible by halves.
    """
    return torch.ops.blockdraft.pack_weight(weight, halves)


@torch.library.register_fake("blockdraft::pack_weight")
def _(weight: Tensor, halves: int) -> Tensor:
    *stack, N, K = weight.shape
    return weight.new_empty([*stack, halves * ((N // halves + 31) // 32), (K + 1) // 2, 64])
