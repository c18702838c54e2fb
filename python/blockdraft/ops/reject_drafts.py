import torch
from torch import Tensor


def reject_drafts(
    logits: Tensor,
    draft_logits: Tensor,
    draft_rows: Tensor,
    drafts: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    lenience: Tensor,
    accept_uniforms: Tensor,
    residual_uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Speculative rejection sampling: each row keeps its draft or draws another token, so that the token has law p.

    With p the law of a row of logits and q that of the row of draft_logits its draft d was drawn from, both by the
    row's temperature, top_k, top_p and min_p as in `choose_tokens`: token = d where ``accept_uniform * q(d) <
    lenience * p(d)``, otherwise the id at which the running sum of ``max(p - q, 0)``, normalised, passes
    residual_uniform. With lenience 1 that is law p for any q (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
    2302.01318). A draft with p(d) = 0 is never kept. Where p - q leaves nothing but rounding, the draw is from p.

    Args:
        logits: ``[T, V]``, float32; an id whose logit is -inf is not allowed and never given.
        draft_logits: ``[M, V]``, float32; M may be 0.
        draft_rows: ``[T]``, int32, row of draft_logits that the draft was drawn from; -1 for a draft that was not drawn
            (n-gram, greedy): q(d) = 1.
        drafts: ``[T]``, int32 in [0, V).
        temperature: ``[T]``, float32, 0 or at least 1e-6; 0 gives the argmax of the logits (the lowest id of equals),
            whatever the draft.
        top_k: ``[T]``, int32; 0 is off.
        top_p: ``[T]``, float32 in (0, 1]; 1 is off.
        min_p: ``[T]``, float32 in [0, 1]; 0 is off.
        lenience: ``[T]``, float32, finite and at least 1; above 1 more drafts are kept and the law is not p.
        accept_uniforms: ``[T]``, float32 in [0, 1).
        residual_uniforms: ``[T]``, float32 in [0, 1), independent of accept_uniforms.

    Returns:
        ``tokens [T]`` int32 and ``logprobs [T]`` float32, log p(token); 0 where temperature is 0. Where the token is
        the draft, kept or drawn anew, what was computed behind the draft holds. A row with a NaN, with +inf, or with
        nothing but -inf in its logits, or in its draft logits where temperature is not 0, gets token -1 and
        log-probability NaN, and no other row sees it; on a GPU, so does one with a value out of range.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device, or (on the CPU) a value is out of range.
    """
    return torch.ops.blockdraft.reject_drafts(
        logits,
        draft_logits,
        draft_rows,
        drafts,
        temperature,
        top_k,
        top_p,
        min_p,
        lenience,
        accept_uniforms,
        residual_uniforms,
    )


@torch.library.register_fake("blockdraft::reject_drafts")
def _(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    T = logits.shape[0]
    return logits.new_empty([T], dtype=torch.int32), logits.new_empty([T])
