import torch
from torch import Tensor


def packed_linear(x: Tensor, packed_weight: Tensor, out_features: int, out_float32: bool = False) -> Tensor:
    """``x @ weight.T`` with a packed weight and float32 sums; no bias.

    A row's bits depend on its own values and the weight alone: not on T, the other rows or the number of threads.

    Args:
        x: ``[T, K]``, float32 or bfloat16.
        packed_weight: ``pack_weight`` of ``[N, K]`` in the dtype of x.
        out_features: N.
        out_float32: Return the float32 sums instead of rounding them to the dtype of x.

    Returns:
        ``[T, N]`` in the dtype of x, or float32.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device.
    """
    return torch.ops.blockdraft.packed_linear(x, packed_weight, out_features, out_float32)


@torch.library.register_fake("blockdraft::packed_linear")
def _(x: Tensor, packed_weight: Tensor, out_features: int, out_float32: bool) -> Tensor:
    return x.new_empty([x.shape[0], out_features], dtype=torch.float32 if out_float32 else x.dtype)
