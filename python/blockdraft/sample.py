"""A sample in flight, and its share of a forward."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer
from torch import Tensor

from blockdraft.cache import CachedSequence
from blockdraft.decide import Decided
from blockdraft.denoise import Canvas
from blockdraft.ngram import NgramDrafter
from blockdraft.outputs import GenerationStats
from blockdraft.plan import Acceptance, Offer, Option, Plan, Price
from blockdraft.processors import Processors, TokenCounts
from blockdraft.sampler import SamplingParams
from blockdraft.steps import VERIFY, Block, Group
from blockdraft.text import TextStream


class Sample:
    """A sample in flight: its tokens, its drafts, its place in the cache."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        request: int,
        index: int,
        tokenizer: Tokenizer | None,
        processors: Processors,
        end_token_ids: frozenset[int],
        room: int = sys.maxsize,
        watched: bool = True,
    ) -> None:
        self.prompt, self.params, self.request, self.index = prompt, params, request, index
        self.processors, self.end_token_ids = processors, end_token_ids
        self.room = room  # tokens that it may have, prompt included
        self.text = TextStream(tokenizer, params.stop_strings, watched)
        self.tokens: list[int] = []  # decided; the last one is the anchor, not yet in the cache
        self.decided = Decided()  # what is known of them
        self.drafts: list[int] = []
        self.source = ""  # whose those are: "mask", "ngram" or "callable"
        self.draft_logprobs: list[float] = []  # of those, where mask rows drew them
        self.draft_states: Tensor | None = None  # hidden states that they were drawn from
        self.canvas = Canvas()
        self.cached: CachedSequence | None = None
        self.stats = GenerationStats()
        self.finish_reason: str | None = None
        self.started = 0.0
        self.acceptance: defaultdict[str, Acceptance] = defaultdict(Acceptance)  # by source
        self.option: Option | None = None
        self.price: Price | None = None
        self.offers: dict[tuple[int, int], Offer] = {}  # of n-gram drafts, by how many tokens matched and their number
        self.ngram_rates: list[float] = []  # what those go by
        self.hopeless = 0  # so many matched tokens are not worth a block
        self.counts = TokenCounts(prompt) if self.processors.active else None
        self.follows = False  # the text into the index of n-grams, token by token
        self.followed = 0  # known tokens that are in it
        self.ngram = NgramDrafter() if params.drafts and params.drafter in ("ngram", "auto") else None
        # Of tokens not counted yet: how many before it repeated earlier text, and whether it did as well.
        self.guesses: list[tuple[int, bool]] = []
        if params.groups is not None:  # else the planner says when
            self.follow(True)

    @property
    def left(self) -> int:
        """Tokens still to decide, by max_tokens and by room."""
        return self.room - len(self.prompt) - len(self.tokens)

    @property
    def known(self) -> list[int]:
        """Prompt and decided tokens."""
        return self.prompt + self.tokens

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @cached_property
    def rule(self) -> str:
        """How drafts are tested: acceptances at one temperature say little about another."""
        p = self.params
        return f"{p.verification}, T={p.temperature:.1f}, mix={p.mix:.1f}"

    @property
    def main_source(self) -> str:
        """Whose drafts the planner's options are about."""
        name = self.params.drafter if isinstance(self.params.drafter, str) else "callable"
        return "mask" if name == "auto" else name

    def kind(self, source: str = "") -> tuple[str, str]:
        """Of the drafts of a source, the main one by default."""
        return source or self.main_source, self.rule

    def set_drafts(self, source: str = "", tokens: Sequence[int] = ()) -> None:
        """Drafts that nothing is known of but their tokens."""
        self.source, self.drafts, self.draft_logprobs, self.draft_states = source, list(tokens), [], None

    def append(self, token: int) -> str:
        """Takes a decided token; returns the text that became final."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.extend([token])
        if self.follows:
            self.guesses.append(self.ngram.follow(token))
        return self.text.append(token)

    def follow(self, follows: bool) -> None:
        """Whether n-grams are thought of from here on."""
        if self.ngram is None or follows == self.follows:
            return
        self.follows = follows
        if follows:
            self.ngram.extend(self.known[self.followed :])
        else:
            self.followed = self.length

    def process(self, logits: Tensor, drafts: Sequence[int]) -> int:
        """Logits ``[n, V]`` in place, of which row i comes after the known tokens and drafts[:i]; returns rows done."""
        if self.counts is None:
            return len(logits)
        return self.processors.apply_block(logits, self.counts, drafts, self.end_token_ids)


@dataclass
class Part:
    """A sample's share of one forward."""

    sample: Sample
    kind: str
    block: Block
    forced: int  # causal rows known to be right: their successors are not decided here
    plan: Plan
    first: int = 0  # its first row
    source: str = ""  # whose drafts it verifies
    guessed: int = 0  # accepted ones of mask rows that n-grams would have brought as well
    draft_logprobs: tuple[float, ...] = ()  # of the drafts it verifies

    @property
    def causal(self) -> int:
        return len(self.block.token_ids)

    @property
    def drafts(self) -> list[int]:
        return self.block.token_ids[1:] if self.kind == VERIFY else []

    def group_rows(self, group: Group) -> range:
        at = self.first + self.causal
        for other in self.block.groups:
            if other is group:
                return range(at, at + len(group.token_ids))
            at += len(other.token_ids)
        raise KeyError(group)

    def draft_rows(self, committed: int) -> tuple[range, int]:
        """Rows that draft what follows the next anchor once `committed` rows hold, and the first position they are for.

        They are of the group with the longest accept length that holds. Empty where there is none, or it ends too soon.
        """
        anchor = self.block.length + committed
        fitting = [group for group in self.block.groups if group.after < max(committed, 0)]
        if not fitting:
            return range(0), anchor + 1
        group = max(fitting, key=lambda group: group.after)
        rows = self.group_rows(group)
        start = self.block.length + group.after + 1 + group.skip  # position of the group's first row
        return rows[max(0, anchor + 1 - start) :], anchor + 1

    def first_draft_rows(self) -> list[int]:
        """By the number of committed rows, from none to all: the first of `draft_rows`; any where there are none."""
        firsts, at = [0] * (self.causal + 1), self.first + self.causal
        groups = []
        for group in self.block.groups:
            groups.append((group.after, at, group))
            at += len(group.token_ids)
        groups.sort(key=lambda entry: entry[0])
        ends = [*(after for after, _, _ in groups[1:]), self.causal]
        for (after, first, group), end in zip(groups, ends, strict=False):
            firsts[after + 1 : end + 1] = [first + max(0, n - after - group.skip) for n in range(after + 1, end + 1)]
        return firsts
