import torch
from torch import Tensor
from torch.nn.functional import gelu

from blockdraft.reference.pack_weight import unpack_weight


def moe_router(
    x: Tensor,
    router_states: Tensor | None,
    router_states_scale: Tensor | None,
    down_proj: Tensor,
    down_proj_bias: Tensor,
    norm_weight: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    out_proj: Tensor,
    balancing_biases: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`blockdraft.ops.moe_router` in the dtype of norm_weight."""
    wide, R, classes = norm_weight.dtype, norm_weight.shape[0], balancing_biases.shape[0]

    def linear(h: Tensor, packed: Tensor, outputs: int) -> Tensor:
        return h @ unpack_weight(packed, outputs, h.shape[1]).to(wide).T

    z = linear(x.to(wide), down_proj, R) + down_proj_bias  # [T, R]
    if router_states is not None:
        z = z + router_states * router_states_scale
    h = z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * norm_weight
    h = gelu(linear(h, fc1, R) + fc1_bias)
    h = gelu(linear(h, fc2, R) + fc2_bias)
    probs = linear(h, out_proj, classes).softmax(-1)  # [T, E + 1]
    topk_ids = (probs + balancing_biases).argmax(-1)
    return topk_ids.to(torch.int32), probs.gather(1, topk_ids[:, None])[:, 0], z
