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
    """`blockdraft.ops.residual_norm` in the dtype of the scales; float64 arguments give the exact result."""
    merged = (hidden_states.to(norm_weight.dtype) + hidden_states_bias) * hidden_states_scale  # [T, H]
    if residual is not None:
        merged = merged + (residual + residual_bias) * residual_scale  # [T, H]
    stored = merged.to(hidden_states.dtype).to(merged.dtype)  # [T, H]
    mean_square = stored.square().mean(-1, keepdim=True)  # [T, 1]
    normed = stored * (mean_square + eps).rsqrt() * norm_weight  # [T, H]
    return normed.to(hidden_states.dtype), merged
