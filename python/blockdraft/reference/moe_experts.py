import torch
from torch import Tensor
from torch.nn.functional import silu

from blockdraft.reference.pack_weight import mx_values, unpack_scales, unpack_weight


def moe_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    intermediate_size: int,
    skip_identity: bool = False,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> Tensor:
    """`blockdraft.ops.moe_experts`, expert by expert; float32, or float64 for float64 arguments."""
    H, E = x.shape[1], gate_up_proj.shape[0]
    wide = topk_weights.dtype
    gate_up = unpack_weight(gate_up_proj, 2 * intermediate_size, H, halves=2)  # [E, 2 * I, H]
    down = unpack_weight(down_proj, H, intermediate_size)  # [E, H, I]
    if gate_up_scales is not None and down_scales is not None and gate_up.dtype == torch.uint8:  # of blocks
        gate_up = mx_values(gate_up, unpack_scales(gate_up_scales, 2 * intermediate_size, halves=2))
        down = mx_values(down, unpack_scales(down_scales, H))
        gate_up_scales = down_scales = None
    if gate_up_scales is None or down_scales is None:
        gate_up_scales = down_scales = topk_weights.new_ones(E, 1)
    out = topk_weights[:, None] * x.to(wide) if skip_identity else torch.zeros_like(x, dtype=wide)
    for e in range(E):
        rows = topk_ids == e
        gate, up = (x[rows].to(wide) @ gate_up[e].to(wide).T * gate_up_scales[e]).chunk(2, -1)  # [rows, I]
        hidden = (silu(gate) * up).to(x.dtype).to(wide)
        out[rows] = topk_weights[rows, None] * (hidden @ down[e].to(wide).T * down_scales[e])
    return out.to(x.dtype)
