import torch
from torch import Tensor


def residual_norm(
    hidden_states: Tensor,
    residual: Tensor | None,
    hidden_states_scale: Tensor,
    hidden_states_bias: Tensor,
    residual_scale: Tensor | None,
    residual_bias: Tensor | None,
    norm_weight: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Merges a layer's output into the float32 residual stream and RMS-normalises the stream.

    ``residual_out = (hidden_states + hidden_states_bias) * hidden_states_scale + (residual + residual_bias) *
    residual_scale`` and ``normed = x / sqrt(mean(x**2) + eps) * norm_weight`` with ``x`` = residual_out rounded to the
    dtype of hidden_states. All in float32; biases come before scales (ZAYA1, transformers ``ZayaResidualScaling``).

    Args:
        hidden_states: ``[T, H]``, float32 or bfloat16, the layer's output (or the embedding).
        residual: ``[T, H]``, float32; None at the start of the stream, then residual_scale and residual_bias are None.
        hidden_states_scale, hidden_states_bias, residual_scale, residual_bias, norm_weight: ``[H]``, float32.
        eps: Added to the mean square.

    Returns:
        ``normed [T, H]`` in the dtype of hidden_states, and ``residual_out [T, H]`` in float32.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device.
    """
    return torch.ops.blockdraft.residual_norm(
        hidden_states,
        residual,
        hidden_states_scale,
        hidden_states_bias,
        residual_scale,
        residual_bias,
        norm_weight,
        eps,
    )


@torch.library.register_fake("blockdraft::residual_norm")
def _(hidden_states: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_states), torch.empty_like(hidden_states, dtype=torch.float32)
