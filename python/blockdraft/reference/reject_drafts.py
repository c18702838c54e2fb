import torch
from torch import Tensor

from blockdraft.reference.choose_tokens import log_law


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
    """`blockdraft.ops.reject_drafts` in float64."""
    law, d = (temperature, top_k, top_p, min_p), drafts[:, None].long()
    log_p = log_law(logits, *law)
    p = log_p.exp()
    q = torch.zeros_like(p).scatter(1, d, 1.0)
    drawn = (draft_rows >= 0) & (temperature > 0)
    q[drawn] = log_law(draft_logits[draft_rows[drawn].long()], *(x[drawn] for x in law)).exp()

    accepted = accept_uniforms * q.gather(1, d)[:, 0] < lenience * p.gather(1, d)[:, 0]
    residual = (p - q).clamp_min(0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    running = residual.cumsum(-1)
    drawn_ids = (running <= residual_uniforms[:, None] * running[:, -1:]).sum(-1)
    tokens = torch.where(temperature == 0, p.argmax(-1), torch.where(accepted, drafts, drawn_ids))

    bad = p.isnan().any(-1) | q.isnan().any(-1)
    tokens = tokens.masked_fill(bad, 0)
    logprobs = log_p.gather(1, tokens[:, None])[:, 0].masked_fill(bad, torch.nan)
    return tokens.masked_fill(bad, -1).to(torch.int32), logprobs.float()
