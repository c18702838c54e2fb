"""From hidden states to tokens: which law each row decides by, and how a drafted token is tested against it.

Rows whose law needs no logits tensor (greedy, temperature, truncations; mixing happens in the hidden states, since the
head is linear) go through one `ops.lm_head_choose`. Rows with processors, log-probabilities or the rejection rule get
their logits, all in one head call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockdraft import ops
from blockdraft.pieces import moved
from blockdraft.reference.lm_head_choose import philox
from blockdraft.sampler import SamplingParams
from blockdraft.steps import as_tensors

if TYPE_CHECKING:
    from blockdraft.model.heads import Heads
    from blockdraft.sample import Sample

# Noise streams of a sample: what it decides, what it drafts, and the coins of the rejection rule. They share a counter
# word with the sample's index, which stays below 2^20.
TARGET, DRAFT, COIN = 0, 1 << 24, 2 << 24


@dataclass
class Ask:
    """Rows of one sample that decide tokens at consecutive positions.

    Attributes:
        sample: Whose.
        rows: Rows of the forward's hidden states.
        position: What the first of them decides.
        drafts: Tokens to test: row i decides whether drafts[i] holds. There may be fewer than rows.
        states: ``[len(drafts), H]``, hidden states that the drafts were drawn from; None: they are point masses.
        partners: For each row the hidden state to mix with, or None.
        drafting: The rows draft: they test nothing and do not know what the ones before them draw.
    """

    sample: "Sample"
    rows: Sequence[int]
    position: int
    drafts: Sequence[int] = ()
    states: Tensor | None = None
    partners: Sequence[Tensor | None] = ()
    drafting: bool = False

    @property
    def params(self) -> SamplingParams:
        return self.sample.params

    @property
    def stream(self) -> int:
        return DRAFT if self.drafting and self.params.verification != "gumbel" else TARGET

    @property
    def needs_logits(self) -> bool:
        p = self.params
        tests = p.rejects and len(self.drafts) > 0
        return tests or self.sample.processors.active or (p.logprobs is not None and not self.drafting)

    @property
    def mixes(self) -> bool:
        return self.params.mix > 0 and any(partner is not None for partner in self.partners)


@dataclass
class Decided:
    """One entry per row: token, log-probability by the plain and by the drawn law, most probable tokens.

    There may be fewer than rows, where processors end a block early.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)


def decide(heads: "Heads", hidden_states: Tensor, asks: list[Ask]) -> list[Decided]:
    """Decides every row of every ask; hidden_states ``[T, H]`` are those of the whole forward."""
    results = [Decided() for _ in asks]
    rows = torch.tensor([row for ask in asks for row in ask.rows], device=hidden_states.device, dtype=torch.int64)
    own = hidden_states[rows].split([len(ask.rows) for ask in asks])  # one gather: one an ask was 5% of a small step
    states = [_mixed(heads, ask, x) for ask, x in zip(asks, own, strict=True)]
    direct = [i for i, ask in enumerate(asks) if not _goes_by_logits(heads, ask)]
    for i, result in zip(direct, _choose(heads, [asks[i] for i in direct], [states[i] for i in direct]), strict=True):
        results[i] = result
    others = [i for i in range(len(asks)) if i not in direct]
    logits = _shared_logits(heads, [asks[i] for i in others], [states[i] for i in others], hidden_states)
    for i, own in zip(others, logits, strict=True):
        if asks[i].drafting:
            results[i] = _draft_by_logits(heads, asks[i], own)
        else:
            results[i] = _decide_by_logits(heads, asks[i], own, hidden_states)
    return results


def needs_no_logits(heads: "Heads", ask: Ask) -> bool:
    """Whether the ask's rows are decided by `ops.lm_head_choose` on hidden states as they are."""
    return ask.params.mix == 0 and not _goes_by_logits(heads, ask)


def _goes_by_logits(heads: "Heads", ask: Ask) -> bool:
    separate = heads.is_separate and (ask.drafting or ask.mixes)
    return ask.needs_logits or separate


def columns_of(asks: list[Ask], device: torch.device) -> list[Tensor]:
    """temperature, top_k, top_p, min_p, seeds, samples, positions of all rows, as the operators take them."""
    return Laws().columns(asks, device)


class Laws:
    """Columns of the rows that decide, kept while the same samples decide by as many rows: they move on together."""

    def __init__(self) -> None:
        self.asked: list[tuple[Sample, bool, int]] = []
        self.kept: list[Tensor] = []

    def columns(self, asks: list[Ask], device: torch.device) -> list[Tensor]:
        """See `columns_of`."""
        asked = [(ask.sample, ask.drafting, len(ask.rows)) for ask in asks]
        if asked != self.asked or not asked:
            self.asked, self.kept = asked, self._kept(asks)
        positions = [ask.position + i for ask in asks for i in range(len(ask.rows))]
        return moved([*self.kept, torch.tensor(positions, dtype=torch.int32)], device)

    @staticmethod
    def _kept(asks: list[Ask]) -> list[Tensor]:
        rows = [(ask.params, ask.sample.index | ask.stream) for ask in asks for _ in ask.rows]
        params = [p for p, _ in rows]
        floats = [p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]
        ints = [p.top_k or 0 for p in params], [sample for _, sample in rows]
        temperature, top_p, min_p = as_tensors(floats, torch.float32)
        top_k, samples = as_tensors(ints, torch.int32)
        seeds = torch.tensor([p.seed for p in params], dtype=torch.int64)
        return [temperature, top_k, top_p, min_p, seeds, samples]


def _choose(heads: "Heads", asks: list[Ask], states: list[Tensor]) -> list[Decided]:
    if not asks:
        return []
    head = heads.target
    rows = torch.cat(states)
    tokens, logprobs = ops.lm_head_choose(rows, head.weight, head.out_features, *columns_of(asks, rows.device))
    sizes = [len(ask.rows) for ask in asks]
    split = zip(tokens.cpu().split(sizes), logprobs.cpu().split(sizes), strict=True)
    return [Decided(t.tolist(), values.tolist()) for t, values in split]


# Mixing


def _mixed(heads: "Heads", ask: Ask, states: Tensor) -> Tensor:
    """Hidden states with those of the drafts mixed in, where one head gives both kinds of logits."""
    if not ask.mixes or heads.is_separate:
        return states
    weights, partners = mix_weights(heads, ask, states), _partners(ask, states)
    blend = torch.lerp(states.float(), partners.float(), weights[:, None]).to(states.dtype)
    return torch.where(weights[:, None] > 0, blend, states)


def _partners(ask: Ask, states: Tensor) -> Tensor:
    rows = [*ask.partners, *[None] * (len(ask.rows) - len(ask.partners))]
    return torch.stack([state if partner is None else partner for state, partner in zip(states, rows, strict=True)])


def mix_weights(heads: "Heads", ask: Ask, states: Tensor) -> Tensor:
    """Weight of the draft's logits for each row ``[n]``: mix, or 0 where there is no partner or a gate is shut."""
    p = ask.params
    has = [partner is not None for partner in ask.partners] + [False] * (len(ask.rows) - len(ask.partners))
    weights = torch.tensor([p.mix if x else 0.0 for x in has], device=states.device)
    if p.mix_max_kl is None and p.mix_max_entropy is None:
        return weights
    target, draft = heads.target_logits(states), heads.draft_logits(_partners(ask, states), ask)
    if p.mix_max_entropy is not None:
        weights = weights * (entropy(log_law(draft, p.temperature)) <= p.mix_max_entropy)
    if p.mix_max_kl is not None:
        mixed = log_law(torch.lerp(target, draft, p.mix), p.temperature)
        weights = weights * (divergence(mixed, log_law(target, p.temperature)) <= p.mix_max_kl)
    return weights


def log_law(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at the temperature, 1 for greedy; float64."""
    return (logits.double() / (temperature or 1.0)).log_softmax(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, nats."""
    return (log_p.exp() * (log_p - log_q)).nan_to_num(0.0).sum(-1).clamp_min(0)


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)


def measure_mixing(heads: "Heads", hidden_states: Tensor, ask: Ask, emitted: int) -> list[tuple[float, float]]:
    """(KL(mixed || AR), total variation) of each of the first `emitted` rows that was mixed."""
    if not ask.mixes:
        return []
    states = _rows_of(ask, hidden_states)
    rows = (mix_weights(heads, ask, states)[:emitted] > 0).nonzero()[:, 0]
    if len(rows) == 0:
        return []
    mixed = _mixed_logits(heads, ask, states)[rows]
    log_p = log_law(heads.target_logits(states[rows]), ask.params.temperature)
    log_m = log_law(mixed, ask.params.temperature)
    distance = (log_m.exp() - log_p.exp()).abs().sum(-1) / 2
    return list(zip(divergence(log_m, log_p).tolist(), distance.tolist(), strict=True))


def _mixed_logits(heads: "Heads", ask: Ask, states: Tensor) -> Tensor:
    if not heads.is_separate:
        return heads.target_logits(_mixed(heads, ask, states))
    logits = heads.target_logits(states)
    if not ask.mixes:
        return logits
    weights = mix_weights(heads, ask, states)[:, None]
    blend = torch.lerp(logits, heads.draft_logits(_partners(ask, states), ask), weights)
    return torch.where(weights > 0, blend, logits)


# Rows that need their logits


def _shared_logits(heads: "Heads", asks: list[Ask], states: list[Tensor], hidden_states: Tensor) -> list[Tensor]:
    """Unmixed logits of each ask, of the draft head for drafts: a head reads its weights once, whatever the asks."""
    found: dict[int, Tensor] = {}
    for drafting, head in ((False, heads.target_logits), (True, heads.base_draft_logits)):
        own = [i for i, ask in enumerate(asks) if ask.drafting == drafting]
        if not own:
            continue
        rows = [states[i] if drafting else _rows_of(asks[i], hidden_states) for i in own]
        found |= zip(own, head(torch.cat(rows)).split([len(r) for r in rows]), strict=True)
    return [found[i] for i in range(len(asks))]


def _rows_of(ask: Ask, hidden_states: Tensor) -> Tensor:
    return hidden_states[torch.tensor(ask.rows, device=hidden_states.device)]


def _decide_by_logits(heads: "Heads", ask: Ask, plain: Tensor, hidden_states: Tensor) -> Decided:
    logits = _mixed_logits(heads, ask, _rows_of(ask, hidden_states)) if ask.mixes else plain.clone()
    rows = ask.sample.process(logits, ask.drafts)
    tokens, drawn = _draw(heads, ask, logits[:rows])
    return _report(ask, plain[:rows], tokens, drawn)


def _draw(heads: "Heads", ask: Ask, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities by the law of the processed logits; drafts are tested where they are to be."""
    columns = [column[: len(logits)] for column in columns_of([ask], logits.device)]
    tested = min(len(ask.drafts), len(logits)) if ask.params.rejects else 0
    if tested == 0:
        return ops.choose_tokens(logits, *columns)
    rejected = _reject(heads, ask, logits[:tested], columns)
    chosen = ops.choose_tokens(logits[tested:].contiguous(), *[column[tested:] for column in columns])
    return torch.cat([rejected[0], chosen[0]]), torch.cat([rejected[1], chosen[1]])


def _reject(heads: "Heads", ask: Ask, logits: Tensor, columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    n, device = len(logits), logits.device
    temperature, top_k, top_p, min_p, seeds, samples, positions = (column[:n] for column in columns)
    coins = uniforms(seeds.cpu(), samples.cpu() | COIN, positions.cpu()).to(device)
    if ask.states is None:
        draft_logits, draft_rows = logits[:0], torch.full((n,), -1, dtype=torch.int32, device=device)
    else:
        draft_logits = heads.draft_logits(ask.states[:n], ask)
        for row in draft_logits:  # as they were when the drafts were drawn: by the text before the block
            ask.sample.process(row[None], ())
        draft_rows = torch.arange(n, dtype=torch.int32, device=device)
    return ops.reject_drafts(
        logits.contiguous(),
        draft_logits,
        draft_rows,
        torch.tensor(ask.drafts[:n], dtype=torch.int32, device=device),
        temperature,
        top_k,
        top_p,
        min_p,
        torch.full((n,), ask.params.lenience, device=device),
        coins[:, 0].contiguous(),
        coins[:, 1].contiguous(),
    )


def uniforms(seeds: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """Two numbers in [0, 1) for each row, ``[T, 2]`` float32: multiples of 2^-24, all equally likely."""
    return (philox(seeds, samples, positions, 2) >> 8).float() * 2.0**-24


def _draft_by_logits(heads: "Heads", ask: Ask, base: Tensor) -> Decided:
    """Drafts one row after the other, since a Markov head wants the token before; processors see the known text."""
    tokens: list[int] = []
    logprobs: list[float] = []
    columns = columns_of([ask], base.device)
    for i in range(len(base)):
        previous = tokens[-1] if tokens else ask.sample.last
        logits = heads.add_markov(base[i : i + 1].clone(), [previous], [ask.position + i])
        plain = logits.log_softmax(-1)
        ask.sample.process(logits, ())
        token, _ = ops.choose_tokens(logits.contiguous(), *[column[i : i + 1] for column in columns])
        tokens.append(int(token))
        logprobs.append(float(plain[0, tokens[-1]]))
    return Decided(tokens, logprobs)


def _report(ask: Ask, plain: Tensor, tokens: Tensor, drawn: Tensor) -> Decided:
    if ask.params.logprobs is None:
        return Decided(tokens.tolist(), [0.0] * len(tokens))
    logprobs = plain.log_softmax(-1)
    own = logprobs.gather(1, tokens.long()[:, None])[:, 0]
    best = logprobs.topk(min(ask.params.logprobs, logprobs.shape[1]), dim=-1)
    top = [list(zip(ids, values, strict=True)) for ids, values in zip(*(x.tolist() for x in best[::-1]), strict=True)]
    return Decided(tokens.tolist(), own.tolist(), drawn.tolist(), top)
