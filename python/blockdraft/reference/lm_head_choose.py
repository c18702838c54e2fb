import torch
from torch import Tensor

from blockdraft.reference.packed_linear import packed_linear

WORD = 0xFFFFFFFF


def philox(seeds: Tensor, samples: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """First word of Philox4x32-10 (Salmon et al., SC 2011) for every row and token id, ``[T, V]`` int64.

    Key: the seed; counter: (token id, position, sample, 0).
    """
    c = [torch.arange(vocab_size)[None], positions[:, None].long() & WORD, samples[:, None].long() & WORD]
    c0, c1, c2, c3 = torch.broadcast_tensors(*c, torch.zeros(1, 1, dtype=torch.int64))
    k0, k1 = seeds[:, None] & WORD, (seeds[:, None] >> 32) & WORD

    def multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:  # high and low word, without leaving int64
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        middle = high + (low >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

    for i in range(10):
        (h0, l0), (h1, l1) = multiply(c0, 0xD2511F53), multiply(c2, 0xCD9E8D57)
        key0, key1 = (k0 + i * 0x9E3779B9) & WORD, (k1 + i * 0xBB67AE85) & WORD
        c0, c1, c2, c3 = h1 ^ c1 ^ key0, l1, h0 ^ c3 ^ key1, l0
    return c0


def gumbel(seeds: Tensor, samples: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise ``[T, V]`` in float64: -log(-log(1 - v)), v = (bits + 1/2) / 2^32."""
    v = (philox(seeds, samples, positions, vocab_size).double() + 0.5) * 2.0**-32
    return -(-torch.log1p(-v.clamp_max(1 - 2.0**-24))).log()


def keep(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which ids the truncations leave, ``[T, V]`` bool."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    for t in range(logits.shape[0]):
        if temperature[t] == 0:
            continue
        z = logits[t]
        if 0 < top_k[t] < z.numel():
            kept[t] &= z >= z.topk(int(top_k[t])).values[-1]
        if top_p[t] < 1:
            probs = (z / temperature[t]).masked_fill(~kept[t], -torch.inf).softmax(-1)
            ordered, order = probs.sort(descending=True)
            needed = int((ordered.cumsum(-1) < top_p[t]).sum())  # ids before the set is complete
            kept[t] &= z >= z[order[min(needed, z.numel() - 1)]]
        if min_p[t] > 0:
            kept[t] &= z >= z.max() + temperature[t] * min_p[t].log()
    return kept


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
    """`blockdraft.ops.lm_head_choose` with the whole logits tensor."""
    logits = packed_linear(hidden_states, packed_weight, vocab_size, out_float32=True)  # [T, V]
    greedy = (temperature == 0)[:, None]
    scores = logits.double() / temperature[:, None].where(~greedy, torch.ones(())) + gumbel(
        seeds, samples, positions, vocab_size
    )
    scores = scores.masked_fill(~keep(logits, temperature, top_k, top_p, min_p), -torch.inf)
    tokens = torch.where(greedy[:, 0], logits.argmax(-1), scores.argmax(-1))
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.to(torch.int32), logprobs.float()
