"""Iterative denoising: a block of masks becomes text in several forwards, the surest tokens first.

Between blocks everything is cached: a finished block is committed by the forward that first looks at the next one, and
the rows of an unfinished block are a mask group, of which nothing is kept. Rules after LLaDA (arXiv 2502.09992),
Fast-dLLM (arXiv 2505.22618) and the entropy bound of arXiv 2505.24857.
"""

from dataclasses import dataclass, field
from math import exp
from typing import TYPE_CHECKING

from torch import Tensor

from blockdraft import ops
from blockdraft.decide import Ask, Decided, columns_of, entropy, log_law
from blockdraft.sampler import SamplingParams

if TYPE_CHECKING:
    from blockdraft.model.heads import Heads

CONFIDENCE, ENTROPY = 0.9, 0.1


@dataclass
class Canvas:
    """The block that a denoising sample works on.

    Attributes:
        tokens: What stands; None is masked. Empty between blocks.
        passes: Forwards that have looked at it.
    """

    tokens: list[int | None] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    passes: int = 0
    mask: int = -1

    def row_tokens(self, length: int, mask: int) -> list[int]:
        """Tokens of the block's rows for the next forward; starts a block of `length` where there is none."""
        if not self.tokens:
            self.tokens, self.logprobs, self.passes, self.mask = [None] * length, [0.0] * length, 0, mask
        return [mask if token is None else token for token in self.tokens]

    def shown(self) -> tuple[int, ...]:
        return tuple(self.mask if token is None else token for token in self.tokens)

    def reveal(self, heads: "Heads", states: Tensor, ask: Ask) -> Decided:
        """Fills in what the rule allows of the rows' choices; returns the block once all of it stands, then empties."""
        plain = heads.base_draft_logits(states)
        logits = plain.clone()
        for row in logits:  # processors see the text before the block
            ask.sample.process(row[None], ())
        tokens, _ = ops.choose_tokens(logits, *columns_of([ask], logits.device))
        law = log_law(plain, 1.0)
        own = law.gather(1, tokens.long()[:, None])[:, 0].tolist()
        self.passes += 1
        for i in self._revealed(ask.params, own, entropy(law).tolist()):
            self.tokens[i], self.logprobs[i] = int(tokens[i]), own[i]
        if None in self.tokens:
            return Decided()
        done = Decided(self.tokens, self.logprobs)
        if ask.params.logprobs is not None:
            done.drawn, done.top = list(self.logprobs), [[] for _ in self.logprobs]
        self.tokens, self.logprobs = [], []
        return done

    def _revealed(self, params: SamplingParams, logprobs: list[float], entropies: list[float]) -> list[int]:
        masked = [i for i, token in enumerate(self.tokens) if token is None]
        passes = (params.denoising_steps or len(self.tokens)) - self.passes + 1
        least = -(-len(masked) // max(1, passes))  # to be done in time
        if params.reveal == "entropy":
            surest, limit = sorted(masked, key=lambda i: entropies[i]), _threshold(params, ENTROPY)
            total, count = 0.0, 0
            for i in surest:
                total += entropies[i]
                count += total <= limit
            return surest[: max(least, count)]
        surest = sorted(masked, key=lambda i: -logprobs[i])
        if params.reveal == "schedule":
            return surest[:least]
        sure = sum(exp(logprobs[i]) >= _threshold(params, CONFIDENCE) for i in masked)
        return surest[: max(least, sure)]


def _threshold(params: SamplingParams, default: float) -> float:
    return default if params.reveal_threshold is None else params.reveal_threshold
