"""What each sample does in the next forward: rows of its prompt, a draft, a block to verify, or one token."""

import sys
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockdraft.errors import RequestError
from blockdraft.plan import (
    MAX_BLOCK,
    PLAIN,
    REPLAN_STEPS,
    Acceptance,
    Kind,
    Likeness,
    Offer,
    Option,
    Plan,
    Start,
    Watch,
    is_news,
    ngram_chances,
    spread_levels,
)
from blockdraft.sample import Part, Sample
from blockdraft.steps import AR, DENOISE, DRAFT, PREFILL, VERIFY, Block, Group

if TYPE_CHECKING:
    from blockdraft.model.zaya import ZayaForCausalLM

PREFILL_ROWS = 512  # prompt rows of one forward, over all sequences
NEVER = sys.maxsize
PLAIN_PLAN, UNPAID = Plan(), Plan(reason="drafts are not expected to pay")


class Scheduler:
    """Plans the forwards of one run.

    Args:
        model: Its configuration, its limits, and the planner that all runs share.
    """

    def __init__(self, model: "ZayaForCausalLM") -> None:
        self.model, self.config = model, model.config
        self.context = min(model.config.max_position_embeddings, model.kv_cache_tokens)
        self.steps = 0
        self.planned_for, self.verified = 0, 0  # samples of the last plans, and blocks that these had verified
        self.watch: Watch | None = None  # of the samples that n-grams may draft for
        self.may_try = False  # whether a sample may draft in this forward against the prediction: one at a time
        self.resting = False  # whether no sample that is planned for drafts until the next plans, but to try it

    def new_batch(self) -> None:
        """A sample came in: plans are made anew."""
        self.steps = 0

    def parts(self, active: list[Sample], waiting: bool) -> list[Part]:
        """One part of the next forward for each sample, but those whose prompt has to wait for room in it.

        Args:
            active: Samples with a place in the cache.
            waiting: Whether more wait for one.
        """
        self.may_try = self.model.planner.may_try
        if self.steps % REPLAN_STEPS == 0:
            planned = [s for s in active if s.params.drafts and s.params.groups is None]
            self._replan(planned, waiting)
            self.resting = all(self._rests(s) and not s.follows for s in planned)
        self.resting = self.resting and not self.may_try
        parts, prefill_rows, first = [], PREFILL_ROWS, 0
        for sample in active:
            part = self._part(sample, prefill_rows)
            if part is None:
                continue
            part.first = first
            first += part.block.rows
            prefill_rows -= part.causal if part.kind == PREFILL else 0
            parts.append(part)
        self.steps += 1
        return parts

    def block_length(self, sample: Sample) -> int:
        return sample.params.block_length or self.config.block_length

    def _uses_masks(self, sample: Sample) -> bool:
        return sample.params.drafts and sample.params.drafter in ("mask", "auto")

    def _masks(self, sample: Sample) -> int:
        """Rows of a mask group."""
        return self.block_length(sample) if self._uses_masks(sample) else 0

    def _weighs_ngrams(self, sample: Sample) -> bool:
        """Whether the planner decides at each step if n-gram drafts are verified."""
        return sample.ngram is not None and sample.params.groups is None

    def _replan(self, samples: list[Sample], waiting: bool) -> None:
        """Options, where there is something new to know, and prices for the samples that the planner plans for."""
        if all(s.option is not None and s.left <= 2 for s in samples):  # their ends are no time to learn anything
            return
        verified = sum(s.acceptance[s.main_source].verified for s in samples)
        if self.steps == 0 or len(samples) != self.planned_for or is_news(verified, self.verified):
            self.planned_for, self.verified = len(samples), verified
            for sample, option in zip(samples, self._options_of(samples), strict=True):
                sample.option = option
        elif self.steps % (4 * REPLAN_STEPS):
            return
        prices = self.model.planner.prices([s.option for s in samples], waiting)
        for sample, price in zip(samples, prices, strict=True):
            sample.price, sample.offers = price, {}
        self._follow([s for s in samples if s.ngram is not None])

    def _follow(self, samples: list[Sample]) -> None:
        """Whether texts are followed until the next plans, and after which matches blocks are thought of."""
        kinds = {s.kind("ngram") for s in samples}
        self.watch = self.model.planner.watches[frozenset(kinds), len(samples)]
        follows = self.watch.next_period()
        for kind in kinds:
            alike = [s for s in samples if s.kind("ngram") == kind]
            hopeless = NEVER
            if follows:  # one sample finds out with the blocks that it thinks of, fewer than a search does
                hopeless = self._hopeless(kind, alike[0]) if len(alike) > 1 else 0
            for sample in alike:
                sample.hopeless = hopeless
                sample.follow(follows)

    def book(self, parts: list[Part], tokens: list[int]) -> None:
        """Books what a decode forward took, and what n-grams gained in it; it brought each sample so many tokens."""
        rows, verifying = sum(part.block.rows for part in parts), sum(part.kind == VERIFY for part in parts)
        self.model.planner.account(rows, len(parts), verifying)
        if self.watch is not None and not self.watch.rests:
            self._watch(parts, tokens)

    def book_plain(self, parts: list[Part]) -> None:
        """As `book`, of a forward that is plain decoding for all."""
        self.model.planner.account(len(parts), len(parts))
        if self.watch is not None and not self.watch.rests:
            self.watch.followed += len(parts)

    def _watch(self, parts: list[Part], tokens: list[int]) -> None:
        self.watch.followed += len(parts)
        for part, new in zip(parts, tokens, strict=True):
            if part.source == "ngram" and part.sample.price is not None:
                self.watch.gained += part.sample.price.gained(part.block.rows, new)

    def _hopeless(self, kind: Kind, sample: Sample) -> int:
        """Matched tokens after which n-grams are not worth a block, as samples go, and were it this one.

        Found once between plans: to think of each match that comes up took a batch of eight 35 us a forward.
        """
        masks, count = self._masks(sample), self.block_length(sample) - 1
        rates = self.model.planner.ngram_rates(kind, Acceptance())

        def worth(matched: int) -> bool:
            chances = ngram_chances(rates, matched, count)
            return sample.price.best_block(chances, sample.option.levels, masks).gain > 0

        return bisect_left(range(1, MAX_BLOCK), True, key=worth)

    def _options_of(self, samples: list[Sample]) -> list[Option]:
        """The best; where nothing is known of any sample yet, what was the best for others like them."""
        planner = self.model.planner
        alike = {None if s.acceptance[s.main_source].verified else self._likeness(s) for s in samples}
        if len(alike) > 1 or None in alike:
            return planner.choose(self._choices(samples))
        (like,) = alike
        learned, start = planner.verified(like[0]), planner.starts.get((like, len(samples)))
        if start is None or is_news(learned, start.learned):
            start = Start(learned, planner.choose(self._choices(samples))[0])
            planner.starts[like, len(samples)] = start
        return [start.option] * len(samples)

    def _likeness(self, sample: Sample) -> Likeness:
        return sample.kind(), self._masks(sample), self.block_length(sample)

    def _choices(self, samples: list[Sample]) -> list[list[Option]]:
        """Options of each; samples that nothing is known of yet share theirs, 22 us each."""
        new: dict[Likeness, list[Option]] = {}
        choices = []
        for sample in samples:
            if sample.acceptance[sample.main_source].verified:
                choices.append(self._options(sample))
                continue
            like = self._likeness(sample)
            choices.append(new.get(like) or new.setdefault(like, self._options(sample)))
        return choices

    def _options(self, sample: Sample) -> list[Option]:
        masks, planner = self._masks(sample), self.model.planner
        if sample.ngram is not None and not masks:
            return [PLAIN]
        rates = planner.rates(sample.kind(), sample.acceptance[sample.main_source])
        counted = planner.unguessed(sample.kind()) if sample.ngram is not None else 1.0
        options = planner.options(rates, masks, self.block_length(sample), masks == 0, counted)
        alone = self.config.draft_layout == "anchor_in_block" and masks > 0  # such a block cannot stand beside others
        return [option for option in options if not (alone and option.levels)]

    def _plan(self, sample: Sample, left: int) -> Plan:
        """For a sample with an anchor, its drafts, and `left` tokens to decide."""
        option, drafts = sample.option, len(sample.drafts)
        masks = self._uses_masks(sample) and left > 2  # a draft is for the token after the next
        if option is None:
            return self._pinned(sample, drafts, masks)
        if option.rows > 1:
            rows = min(drafts + 1, option.rows)
            reason = f"{option.tokens:.2f} tokens expected of a forward of {option.mean_rows:.0f} rows"
            levels = self._useful(sample, option.levels, rows) if drafts else (0,)
            return Plan(rows, levels if masks else (), reason)
        nothing = not masks and sample.ngram is not None  # to try: n-grams have had their say
        if nothing or not (self._is_tried(sample) or self.may_try):
            return UNPAID
        self.may_try = False
        rows = min(drafts + 1, 8)
        return Plan(rows, (0,) if masks and rows == 1 else (), "a trial: whether drafts pay is not known well")

    def _is_tried(self, sample: Sample) -> bool:
        """Drafts wait that a forward was spent on: only their verification says what they are worth."""
        return sample.source == "mask" and len(sample.drafts) > 0 and sample.option.rows == 1

    def _pinned(self, sample: Sample, drafts: int, masks: bool) -> Plan:
        if not drafts:
            return Plan(1, (0,) if masks else ())
        groups = sample.params.groups
        levels = spread_levels(groups, self.block_length(sample)) if isinstance(groups, int) else tuple(groups)
        return Plan(drafts + 1, self._useful(sample, levels, drafts + 1) if masks else ())

    def _useful(self, sample: Sample, levels: Sequence[int], rows: int) -> tuple[int, ...]:
        """Accept lengths that can be reached and leave room for a draft."""
        return tuple(level for level in sorted(levels) if level < min(rows, sample.left - 2))

    def _wants_drafts(self, sample: Sample) -> bool:
        """Whether the end of the prompt carries a mask group."""
        wanted = self._uses_masks(sample) and sample.left > 2 and self.config.draft_layout != "anchor_in_block"
        if not wanted or sample.params.groups is not None or sample.option.rows > 1:
            return wanted
        if not self.may_try:
            return False
        self.may_try = False
        self.model.planner.account_prompt(self.block_length(sample))
        return True

    def _group(self, sample: Sample, after: int) -> Group:
        B, mask, layout = self.block_length(sample), self.config.mask_token_id, self.config.draft_layout
        if layout == "masks_after_anchor":
            return Group(after, [mask] * (B - 1), skip=1)
        return Group(after, [mask] * B)

    def _part(self, sample: Sample, prefill_rows: int) -> Part | None:
        """What a sample does in this forward; None where prompt rows are used up."""
        if sample.cached.length < len(sample.prompt):
            return self._prefill(sample, prefill_rows)
        if sample.params.sampler == "denoise":
            return self._denoise(sample, sample.known[sample.cached.length :])
        return self._decode(sample)

    def _prefill(self, sample: Sample, prefill_rows: int) -> Part | None:
        cached, prompt = sample.cached, sample.prompt
        rows = min(prefill_rows, len(prompt) - cached.length)
        if rows == 0:
            return None
        tokens, last = prompt[cached.length : cached.length + rows], cached.length + rows == len(prompt)
        if last and sample.params.sampler == "denoise":
            return self._denoise(sample, tokens, PREFILL)
        groups = [self._group(sample, rows - 1)] if last and self._wants_drafts(sample) else []
        block = Block(cached.length, cached.slot, cached.pages, tokens, groups)
        return Part(sample, PREFILL, block, rows - 1 if last else rows, Plan(rows, reason="prompt"))

    def _denoise(self, sample: Sample, tokens: list[int], kind: str = DENOISE) -> Part:
        """Commits tokens that are decided, and looks at the block that comes after them."""
        cached = sample.cached
        length = min(self.block_length(sample), sample.left)
        canvas = sample.canvas.row_tokens(length, self.config.mask_token_id)
        block = Block(cached.length, cached.slot, cached.pages, tokens, [Group(len(tokens) - 1, canvas)])
        return Part(sample, kind, block, len(tokens), Plan(len(canvas), reason="denoising"))

    def _decode(self, sample: Sample) -> Part:
        plan = PLAIN_PLAN
        if sample.params.drafts:
            rests = (self.resting and sample.option is PLAIN) or self._rests(sample)
            plan = UNPAID if rests else self._decode_plan(sample, sample.left)
        cached, anchor = sample.cached, sample.tokens[-1]
        if plan.rows == 1 and not plan.levels:
            return Part(sample, AR, Block(cached.length, cached.slot, cached.pages, [anchor]), 0, plan)
        drafts = sample.drafts[: plan.rows - 1]
        if not drafts and self.config.draft_layout == "anchor_in_block":
            mask = [self.config.mask_token_id] * (self.block_length(sample) - 1)
            block = Block(cached.length, cached.slot, cached.pages, [], [Group(-1, [anchor, *mask])])
            return Part(sample, DRAFT, block, 0, plan)
        groups = [self._group(sample, level) for level in plan.levels]
        block = Block(cached.length, cached.slot, cached.pages, [anchor, *drafts], groups)
        if not drafts:
            return Part(sample, DRAFT, block, 0, plan)
        logprobs = tuple(sample.draft_logprobs[: len(drafts)])
        return Part(sample, VERIFY, block, 0, plan, source=sample.source, draft_logprobs=logprobs)

    def _rests(self, sample: Sample) -> bool:
        """Whether there is nothing to plan, told before anything is looked up."""
        return (
            sample.option is PLAIN
            and not (sample.drafts or self.may_try)
            and (sample.ngram is None or sample.ngram.matched <= sample.hopeless)
        )

    def _decode_plan(self, sample: Sample, left: int) -> Plan:
        """For a sample that may draft, and its drafts as they are to be verified."""
        count = min(self.block_length(sample), left) - 1
        if not self._weighs_ngrams(sample):
            self._ask_drafter(sample, count)
            sample.drafts = sample.drafts[: left - 1]
            return self._plan(sample, left)
        sample.drafts = sample.drafts[: left - 1]
        if sample.ngram.matched <= sample.hopeless:
            return self._plan(sample, left)
        return self._plan_ngrams(sample, count) or self._plan(sample, left)

    def _plan_ngrams(self, sample: Sample, count: int) -> Plan | None:
        """Verifies up to `count` n-gram drafts where that is worth more than what else there is to do.

        What the waiting drafts of mask rows are has no say in whether they give way: the rejection rule takes those
        that it tests for draws of their law.
        """
        if self._is_tried(sample):
            return None
        masks, drafts = self._masks(sample), sample.ngram.draft(count)
        if self._offer(sample, count, masks).gain <= 0:  # nor are fewer drafts, or after a shorter match
            sample.hopeless = sample.ngram.matched
            return None
        gain, rows, levels = self._offer(sample, len(drafts), masks)
        if gain <= (sample.price.drafts(masks) if sample.drafts else 0.0):
            return None
        sample.set_drafts("ngram", drafts[: rows - 1])
        reason = f"{gain:.2f} tokens more expected of n-gram drafts than of what else the time allows"
        return Plan(rows, self._useful(sample, levels, rows), reason)

    def _offer(self, sample: Sample, drafts: int, masks: int) -> Offer:
        """The best block of `drafts` n-gram drafts, thought of once between plans."""
        key = min(sample.ngram.matched, MAX_BLOCK), drafts
        if key not in sample.offers:
            if not sample.offers:
                sample.ngram_rates = self.model.planner.ngram_rates(sample.kind("ngram"), sample.acceptance["ngram"])
            chances = ngram_chances(sample.ngram_rates, *key)
            sample.offers[key] = sample.price.best_block(chances, sample.option.levels, masks)
        return sample.offers[key]

    def _ask_drafter(self, sample: Sample, count: int) -> None:
        params = sample.params
        if self._uses_masks(sample) or count < 1:
            return
        sample.set_drafts()
        if params.groups is None and sample.option.rows == 1 and not self.may_try:
            return
        found = params.drafter(sample.known, count) if callable(params.drafter) else sample.ngram.draft(count)
        drafts = [int(token) for token in found][:count]
        for token in drafts:
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(f"drafter must return token ids in [0, {self.config.vocab_size - 1}], got {token}")
        sample.set_drafts(sample.main_source, drafts)
