import torch
from torch import Tensor

from blockdraft.reference.pack_weight import unpack_weight


def packed_linear(x: Tensor, packed_weight: Tensor, out_features: int, out_float32: bool = False) -> Tensor:
    """`blockdraft.ops.packed_linear`; sums in float32, or float64 for float64 arguments."""
    weight = unpack_weight(packed_weight, out_features, x.shape[1])  # [N, K]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(wide) @ weight.to(wide).T  # [T, N]
    return out if out_float32 else out.to(x.dtype)
