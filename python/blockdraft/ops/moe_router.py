import torch
from torch import Tensor


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
    """The router of a ZAYA1 MoE block in one call: expert, probability, and the state for the next layer.

    ``z = down_proj x + bias (+ router_states * router_states_scale)``; three-layer MLP on ``rms_norm(z)`` with exact
    (erf) GELU; softmax over E experts and the skip class E; ``argmax(p + balancing_biases)``, the lowest id of equals.
    The biases choose only: the weight is the plain probability. float32 between the products.

    Args:
        x: ``[T, H]``, float32 or bfloat16, the normed hidden states.
        router_states: ``[T, R]``, float32, z of the layer before; None in layer 0, then also router_states_scale.
        router_states_scale: ``[R]``, float32.
        down_proj: ``pack_weight`` of ``[R, H]`` in the dtype of x.
        fc1, fc2: ``pack_weight`` of ``[R, R]`` in the dtype of x.
        out_proj: ``pack_weight`` of ``[E + 1, R]`` in the dtype of x.
        down_proj_bias, norm_weight, fc1_bias, fc2_bias: ``[R]``, float32.
        balancing_biases: ``[E + 1]``, float32.
        eps: Of the norm.

    Returns:
        ``topk_ids [T]`` int32 in [0, E], ``topk_weights [T]`` float32, ``router_states_out [T, R]`` float32.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device.
    """
    return torch.ops.blockdraft.moe_router(
        x,
        router_states,
        router_states_scale,
        down_proj,
        down_proj_bias,
        norm_weight,
        fc1,
        fc1_bias,
        fc2,
        fc2_bias,
        out_proj,
        balancing_biases,
        eps,
    )


@torch.library.register_fake("blockdraft::moe_router")
def _(x: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T, R = x.shape[0], arguments[3].shape[0]
    return (
        x.new_empty([T], dtype=torch.int32),
        x.new_empty([T], dtype=torch.float32),
        x.new_empty([T, R], dtype=torch.float32),
    )
