import torch
from torch import Tensor

from blockdraft.reference.lm_head_choose import gumbel, keep


def log_law(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """log p of every id, ``[T, V]`` float64: 0 and -inf where temperature is 0, NaN in rows without a law."""
    z = logits.double()
    bad = (z.amax(-1).isinf() | z.isnan().any(-1))[:, None]
    kept = keep(z, temperature, top_k, top_p, min_p)
    greedy = (temperature == 0)[:, None]
    scaled = ((z - z.amax(-1, keepdim=True)) / temperature[:, None].where(~greedy, 1.0)).masked_fill(~kept, -torch.inf)
    point = torch.full_like(z, -torch.inf).scatter(1, z.argmax(-1, keepdim=True), 0.0)
    return torch.where(greedy, point, scaled.log_softmax(-1)).masked_fill(bad, torch.nan)


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
    """`blockdraft.ops.choose_tokens` in float64, by log p + noise instead of logits / temperature + noise."""
    log_p = log_law(logits, temperature, top_k, top_p, min_p)
    bad = log_p.isnan().any(-1)
    tokens = (log_p + gumbel(seeds, samples, positions, logits.shape[1])).argmax(-1)
    logprobs = log_p.gather(1, tokens[:, None])[:, 0]
    return tokens.masked_fill(bad, -1).to(torch.int32), logprobs.masked_fill(bad, torch.nan).float()
