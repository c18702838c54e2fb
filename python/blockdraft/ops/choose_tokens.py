import torch
from torch import Tensor


def choose_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """The choice of `lm_head_choose` from logits: one token per row, greedy or with the noise of its position.

    For ``logits = packed_linear(hidden_states, packed_weight, V, out_float32=True)`` the tokens have the bits of
    ``lm_head_choose(hidden_states, packed_weight, V, ...)``; the log-probabilities mean another thing (see below).

    Args:
        logits: ``[T, V]``, float32; an id whose logit is -inf is not allowed and never chosen.
        temperature: ``[T]``, float32, 0 or at least 1e-6; 0 is greedy (the lowest id of equals) and ignores the rest.
        top_k: ``[T]``, int32; 0 is off.
        top_p: ``[T]``, float32 in (0, 1]; 1 is off.
        min_p: ``[T]``, float32 in [0, 1]; 0 is off.
        seeds: ``[T]``, int64.
        samples: ``[T]``, int32, index of the sample within a request.
        positions: ``[T]``, int32, the position that the token is for.

    Returns:
        ``tokens [T]`` int32 and ``logprobs [T]`` float32: log-probability of the token under the law it was drawn from,
        temperature and truncations applied, over the kept ids; 0 where temperature is 0. A row with a NaN, with +inf,
        or with nothing but -inf gets token -1 and log-probability NaN, and no other row sees it; on a GPU, so does one
        with a value without a law.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device, or (on the CPU) a value without a law.
    """
    return torch.ops.blockdraft.choose_tokens(logits, temperature, top_k, top_p, min_p, seeds, samples, positions)


@torch.library.register_fake("blockdraft::choose_tokens")
def _(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    T = logits.shape[0]
    return logits.new_empty([T], dtype=torch.int32), logits.new_empty([T])
