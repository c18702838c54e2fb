import torch
from torch import Tensor


def lm_head_choose(
    hidden_states: Tensor,
    packed_weight: Tensor,
    vocab_size: int,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """LM head and the choice of one token per row, without a logits tensor.

    Greedy where temperature is 0, otherwise Gumbel-max: ``argmax(logits / temperature + g)`` over the kept ids. The
    noise g is a function of (seed, sample, position, token id) alone (Philox4x32-10), so rows that decide the same
    position of the same sample meet the same noise in whatever step or batch: drafting and verifying share it (arXiv
    2408.07978). Kept are the top_k largest, then the smallest set of probability >= top_p, then probability >= min_p of
    the largest; ids whose logit equals a limit are all kept.

    Args:
        hidden_states: ``[T, H]``, float32 or bfloat16, after the final norm.
        packed_weight: ``pack_weight`` of ``[vocab_size, H]`` in the dtype of hidden_states.
        vocab_size: V.
        temperature: ``[T]``, float32, 0 or at least 1e-6; 0 is greedy (the lowest id of equals) and ignores the rest.
        top_k: ``[T]``, int32; 0 is off.
        top_p: ``[T]``, float32 in (0, 1]; 1 is off.
        min_p: ``[T]``, float32 in [0, 1]; 0 is off.
        seeds: ``[T]``, int64.
        samples: ``[T]``, int32, index of the sample within a request.
        positions: ``[T]``, int32, the position that the token is for.

    Returns:
        ``tokens [T]`` int32 and ``logprobs [T]`` float32: log-probability of the token under the model's plain law
        (softmax of the logits at temperature 1).

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device, or (on the CPU) a value without a law.
    """
    return torch.ops.blockdraft.lm_head_choose(
        hidden_states, packed_weight, vocab_size, temperature, top_k, top_p, min_p, seeds, samples, positions
    )


@torch.library.register_fake("blockdraft::lm_head_choose")
def _(hidden_states: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    T = hidden_states.shape[0]
    return hidden_states.new_empty([T], dtype=torch.int32), hidden_states.new_empty([T], dtype=torch.float32)
