"""The decoding loop: prefill, draft, verify, commit, for a batch of sequences each in its own phase.

A sequence with a decided token that is not in the cache yet (its anchor) takes part in a forward in one of these ways:

    prefill  rows of the prompt; the last chunk also carries a group of mask rows
    draft    the anchor and a group of mask rows: commits the anchor, decides the next one, and guesses what follows
    verify   the anchor and its drafts, causal: commits the anchor and every draft that holds; mask groups beside it
             prepare the next block for the accept lengths that they follow
    ar       the anchor alone
    denoise  a block of mask rows, in which some tokens may stand already (`blockdraft.denoise`)

All sequences share each forward, whatever their phase. Drafts come from mask rows (arXiv 2511.08923) or the text so
far, by the planner's choice at each step if need be, or from a callable; the tokens of the lossless rules are those of
plain decoding (see `blockdraft.decide`), because verified rows are plain causal rows with the same bits and the noise
of a position does not depend on the step.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockdraft import ops
from blockdraft.cache import Cache
from blockdraft.decide import Ask, Decided, Laws, columns_of, decide, measure_mixing, needs_no_logits
from blockdraft.errors import ConfigError, RequestError
from blockdraft.outputs import GenerationOutput, StreamEvent
from blockdraft.plan import REPLAN_STEPS
from blockdraft.processors import Processors
from blockdraft.runner import Inputs, Late, LateInputs
from blockdraft.sample import Part, Sample
from blockdraft.sampler import SamplingParams
from blockdraft.schedule import Scheduler
from blockdraft.steps import AR, DRAFT, PREFILL, VERIFY, Step, make_step

if TYPE_CHECKING:
    from blockdraft.model.zaya import ZayaForCausalLM

# Hidden states of a step; what was decided for each part, drafts under True; drafts accepted and rows committed.
Ran = tuple[Tensor, list[dict[bool, Decided]], list[int], list[int]]


class Engine:
    """Runs requests of one model to their end; see the module's text.

    Args:
        model: Weights, configuration, limits, and the planner that its requests share.
    """

    def __init__(self, model: "ZayaForCausalLM") -> None:
        self.model, self.config = model, model.config
        self.scheduler = Scheduler(model)
        self.context = self.scheduler.context
        self.laws = Laws()
        self.watched = True

    def run(
        self, prompts: list[list[int]], params: list[SamplingParams], watched: bool = True
    ) -> Iterator[StreamEvent]:
        """Checks everything, then decodes; events come as forwards end, only those with an output if not watched.

        For eight sequences, events and text that nobody reads were 8% of a small model's step.
        """
        self.watched = watched
        waiting: deque[Sample] = deque()
        for request, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            p = self._settled(p)
            self._check(prompt, p)
            waiting.extend(self._samples(prompt, p.with_seed(), request))
        return self._loop(waiting)

    def _samples(self, prompt: list[int], params: SamplingParams, request: int) -> Iterator[Sample]:
        processors = self._processors(params)
        ends = params.stop_token_ids | (frozenset() if params.ignore_eos else frozenset(self.config.eos_token_ids))
        for index in range(params.n):
            tokenizer, room = self.model.tokenizer, self._room(prompt, params)
            yield Sample(prompt, params, request, index, tokenizer, processors, ends, room, self.watched)

    def _processors(self, params: SamplingParams) -> Processors:
        """With bad words that are strings as token ids."""
        processors, tokenizer = params.processors, self.model.tokenizer
        if not params.bad_strings:
            return processors
        if tokenizer is None:
            raise RequestError("bad_words that are strings need a tokenizer.json beside the weights; use token ids")
        # A word has other tokens after a space than at the start of a text.
        spellings = [s for word in params.bad_strings for s in dict.fromkeys((word, " " + word.lstrip()))]
        words = [tokenizer.encode(s, add_special_tokens=False).ids for s in spellings]
        return replace(processors, bad_words=(*processors.bad_words, *words))

    # Requests

    def _settled(self, params: SamplingParams) -> SamplingParams:
        """With the one drafter that "auto" leaves where there is nothing to weigh."""
        if params.drafter != "auto" or params.sampler == "denoise":
            return params
        pinned, mixes, masks = params.groups is not None, params.mix > 0, self.config.mask_token_id is not None
        if masks and not pinned and not mixes:
            return params
        return replace(params, drafter="mask" if masks or mixes else "ngram")

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        if len(prompt) >= self.context:
            raise RequestError(
                f"the prompt must leave room for a token in {self.context} (context and kv_cache_tokens), "
                f"got {len(prompt)} tokens"
            )
        params.processors.check(self.config.vocab_size)
        if params.stop_strings and self.model.tokenizer is None:
            raise RequestError("stop strings need a tokenizer.json beside the weights; use token ids")
        if params.sampler == "denoise" or (params.drafts and params.drafter in ("auto", "mask")):
            self._check_masks(params)

    def _check_masks(self, params: SamplingParams) -> None:
        layout = self.config.draft_layout
        if self.config.mask_token_id is None:
            raise ConfigError(
                "mask_token_id: the checkpoint's config.json names none (tidar_mask_token_id, "
                "parallel_drafting_mask_token_id, draft_mask_token_id, bidirectional_mask_token_id, mask_token_id); "
                "pass mask_token_id=, or sampler='ar', or a drafter that needs no mask rows"
            )
        if layout != "extra_first_mask" and (params.sampler == "denoise" or params.mix_source == "fresh"):
            what = "sampler='denoise'" if params.sampler == "denoise" else "mix_source='fresh'"
            raise RequestError(f"{what} needs a mask row for the next position: draft_layout is {layout!r}")
        if layout == "anchor_in_block" and params.groups not in (None, 0, ()):
            raise RequestError(f"groups must be 0 with draft_layout 'anchor_in_block', got {params.groups!r}")

    def _room(self, prompt: list[int], params: SamplingParams) -> int:
        return min(len(prompt) + params.max_tokens, self.context)

    def _loop(self, waiting: deque[Sample]) -> Iterator[StreamEvent]:
        slots = min(self.model.max_batch_size, len(waiting))
        tokens = min(self.model.kv_cache_tokens, sum(s.room for s in waiting))
        if not waiting:
            return
        cache = self.model.runner.open(tokens, slots)
        active: list[Sample] = []
        try:
            while waiting or active:
                while waiting and len(active) < slots and cache.can_allocate(waiting[0].room):
                    sample = waiting.popleft()
                    sample.cached = cache.allocate(sample.room)
                    active.append(sample)
                    self.scheduler.new_batch()
                yield from self._step(cache, active, bool(waiting))
                for sample in [s for s in active if s.finish_reason]:
                    cache.release(sample.cached)
                    active.remove(sample)
        finally:  # also where the caller wants no more events
            for sample in active:
                cache.release(sample.cached)
            self.model.runner.close(cache)

    # The forward and what it decides

    def _asks(self, part: Part) -> list[Ask]:
        """The rows after which a token is decided, and draft rows that are needed whatever is decided."""
        asks = []
        if part.forced < part.causal:
            rows = range(part.first + part.forced, part.first + part.causal)
            position = part.block.length + part.forced + 1
            states = part.sample.draft_states
            states = states[: len(part.drafts)] if states is not None and part.drafts else None
            asks.append(Ask(part.sample, rows, position, part.drafts, states))
        if self._drafts_at_once(part):
            asks.append(self._draft_ask(part, part.causal))
        return asks

    def _partners(self, part: Part, ask: Ask, hidden_states: Tensor) -> list[Tensor | None]:
        p = part.sample.params
        if p.mix == 0:
            return []
        if p.mix_source == "draft":
            return [] if ask.states is None else list(ask.states)
        groups = {group.after: hidden_states[part.group_rows(group)[0]] for group in part.block.groups}
        return [groups.get(part.forced + i) for i in range(len(ask.rows))]

    def _drafts_at_once(self, part: Part) -> bool:
        """Whether the drafts depend on nothing that this forward decides, so that one head call serves both."""
        certain = part.kind in (PREFILL, DRAFT) and len(part.block.groups) == 1
        denoising = part.sample.params.sampler == "denoise"
        return certain and not denoising and not self.model.heads.is_separate and not part.sample.processors.active

    def _draft_ask(self, part: Part, committed: int) -> Ask:
        rows, position = part.draft_rows(committed)
        return Ask(part.sample, rows, position, drafting=True)

    def _limit(self, part: Part, decided: int | None) -> int:
        """Rows to commit at most, where so many tokens are decided; None: it is known what follows them."""
        if decided is None or part.kind == PREFILL:
            return part.causal
        return min(decided, part.sample.left)

    def _step(self, cache: Cache, active: list[Sample], waiting: bool) -> list[StreamEvent]:
        with torch.inference_mode():  # as a decorator it costs 10 us
            return self._decode(cache, active, waiting)

    def _decode(self, cache: Cache, active: list[Sample], waiting: bool) -> list[StreamEvent]:
        started = time.perf_counter()
        parts = self.scheduler.parts(active, waiting)
        step = make_step([part.block for part in parts], cache.page_size, self.config.mask_parent)
        asks = [self._asks(part) for part in parts]
        on_device = all(needs_no_logits(self.model.heads, ask) for own in asks for ask in own)
        run = self._run_on_device if on_device else self._run
        hidden_states, decided, accepted, committed = run(cache, step, parts, asks)

        texts = [
            self._take(part, asks[i], decided[i].get(False), accepted[i], committed[i], hidden_states)
            for i, part in enumerate(parts)
        ]
        self._draft(parts, decided, committed, hidden_states)
        seconds = time.perf_counter() - started
        self._account(parts, texts)
        for part in parts:
            sample = part.sample
            sample.started = sample.started or started
            sample.stats.seconds = started + seconds - sample.started
        return [
            self._event(part, text, new, a, seconds)
            for part, (text, new, a) in zip(parts, texts, strict=True)
            if self.watched or part.sample.finish_reason
        ]

    def _run_on_device(self, cache: Cache, step: Step, parts: list[Part], asks: list[list[Ask]]) -> Ran:
        """Forward, choice, verification and commit, of which the host sees the end only."""
        flat = [ask for own in asks for ask in own]
        rows: list[int] = []
        verified: list[tuple[int, int]] = []
        for ask in flat:
            if not ask.drafting:
                verified += zip(ask.rows, range(len(rows), len(rows) + len(ask.rows)), strict=True)
            rows += ask.rows
        decides = [next((len(ask.rows) for ask in own if not ask.drafting), None) for own in asks]
        limits = [self._limit(part, count) for part, count in zip(parts, decides, strict=True)]
        lengths = [part.causal for part in parts]
        laws = self.laws.columns(flat, torch.device("cpu"))
        inputs = Inputs.of(step, rows, laws, verified, lengths, limits)
        late = self._late(parts) if self.model.runner.late else []
        if late:
            inputs = self._with_late(inputs, parts, late)
        hidden_states, tokens, logprobs, accepted, committed, drafts = self.model.runner.decode(cache, inputs)
        for part, count in zip(parts, committed, strict=True):
            part.sample.cached.length += count
        chosen = iter(zip(tokens, logprobs, strict=True))
        decided = [{ask.drafting: _decided(islice(chosen, len(ask.rows))) for ask in own} for own in asks]
        for i, (draft_tokens, draft_logprobs) in zip(late, drafts, strict=True):
            count = len(parts[i].draft_rows(committed[i])[0])
            if count:
                decided[i][True] = Decided(draft_tokens[:count], draft_logprobs[:count])
        return hidden_states, decided, accepted, committed

    def _late(self, parts: list[Part]) -> list[int]:
        """Parts of which a group drafts that follows from how many rows hold, and by no logits."""
        verifying = [i for i, part in enumerate(parts) if part.kind == VERIFY and part.block.groups]
        return [i for i in verifying if needs_no_logits(self.model.heads, self._draft_ask(parts[i], 1))]

    @staticmethod
    def _with_late(inputs: Inputs, parts: list[Part], late: list[int]) -> LateInputs:
        groups = [group for i in late for group in parts[i].block.groups]
        most = max(1, *(len(group.token_ids) - max(0, 1 - group.skip) for group in groups))
        asks = [Ask(parts[i].sample, range(most), 0, drafting=True) for i in late]
        own = [Late(i, parts[i].first_draft_rows(), parts[i].block.length + 1) for i in late]
        return LateInputs.adding(inputs, own, columns_of(asks, torch.device("cpu")))

    def _run(self, cache: Cache, step: Step, parts: list[Part], asks: list[list[Ask]]) -> Ran:
        """The forward, and a choice that looks at logits or mixes hidden states."""
        hidden_states, transaction = self.model.runner.forward(cache, step, [part.sample.cached for part in parts])
        for part, own in zip(parts, asks, strict=True):
            for ask in own:
                ask.partners = [] if ask.drafting else self._partners(part, ask, hidden_states)
        flat = iter(decide(self.model.heads, hidden_states, [ask for own in asks for ask in own]))
        decided = [{ask.drafting: next(flat) for ask in own} for own in asks]
        accepted, committed, commit_rows = self._verify(transaction.step, parts, decided)
        transaction.commit(committed, commit_rows)
        return hidden_states, decided, accepted, committed

    def _verify(
        self, step: Step, parts: list[Part], decided: list[dict[bool, Decided]]
    ) -> tuple[list[int], list[int], Tensor]:
        chosen = step.token_ids.roll(-1).cpu()  # a row before a known token "decides" that token
        for part, own in zip(parts, decided, strict=True):
            if False in own:
                first, tokens = part.first + part.forced, own[False].tokens
                chosen[first : first + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        device = step.token_ids.device
        lengths = torch.tensor([part.causal for part in parts], dtype=torch.int32, device=device)
        counts = [len(own[False].tokens) if False in own else None for own in decided]
        room = [self._limit(part, count) for part, count in zip(parts, counts, strict=True)]
        limits = torch.tensor(room, dtype=torch.int32, device=device)
        accepted, committed, commit_rows, _ = ops.verify_tokens(
            step.token_ids, chosen.to(device), step.cu_rows, lengths, limits
        )
        return accepted.tolist(), committed.tolist(), commit_rows

    def _take(
        self, part: Part, asks: list[Ask], decided: Decided | None, accepted: int, committed: int, hidden_states: Tensor
    ) -> tuple[str, tuple[int, ...], int]:
        """Gives the sample what was decided: its final text, its tokens, and how many drafts held."""
        sample, before = part.sample, len(part.sample.tokens)
        if part.block.groups and sample.params.sampler == "denoise":
            decided = self._reveal(part, hidden_states)
            committed = part.forced + len(decided.tokens)
        text = self._append(sample, decided, committed - part.forced) if decided is not None else ""
        new = tuple(sample.tokens[before:])
        accepted = min(accepted, committed - 1) if part.kind == VERIFY else 0
        self._learn(part, accepted, len(new))
        self._count(part, accepted, len(new))
        if asks and asks[0].mixes:
            for kl, distance in measure_mixing(self.model.heads, hidden_states, asks[0], len(new)):
                sample.stats.count_mixed(kl, distance)
        return text, new, accepted

    def _reveal(self, part: Part, hidden_states: Tensor) -> Decided:
        """One pass over the block of a denoising sample; its tokens once all stand."""
        (group,) = part.block.groups
        rows = part.group_rows(group)
        position = part.block.length + part.causal
        ask = Ask(part.sample, rows, position, drafting=True)
        return part.sample.canvas.reveal(self.model.heads, hidden_states[rows.start : rows.stop], ask)

    def _draft(
        self, parts: list[Part], decided: list[dict[bool, Decided]], committed: list[int], hidden_states: Tensor
    ) -> None:
        """New drafts for every sample that goes on: decided with the forward already, or now that its end is known."""
        late = []
        for part, own, n in zip(parts, decided, committed, strict=True):
            sample = part.sample
            sample.set_drafts()
            if sample.finish_reason or not part.block.groups or sample.params.sampler == "denoise":
                continue
            ask = self._draft_ask(part, n)
            if True in own:
                self._keep(ask, own[True], hidden_states)
            elif len(ask.rows):
                late.append(ask)
            else:
                sample.stats.missed_groups += 1
        if late:
            for ask, result in zip(late, decide(self.model.heads, hidden_states, late), strict=True):
                self._keep(ask, result, hidden_states)

    def _keep(self, ask: Ask, drafts: Decided, hidden_states: Tensor) -> None:
        params = ask.params
        ask.sample.set_drafts("mask", drafts.tokens)
        ask.sample.draft_logprobs = drafts.logprobs
        if params.rejects or (params.mix > 0 and params.mix_source == "draft"):
            ask.sample.draft_states = hidden_states[torch.tensor(ask.rows, device=hidden_states.device)]

    # Bookkeeping

    def _append(self, sample: Sample, decided: Decided, count: int) -> str:
        """Takes tokens up to the first that ends the sample; returns the text that became final."""
        text, kept = "", sample.decided
        for i in range(count):
            token = decided.tokens[i]
            if token < 0:
                raise RequestError(
                    f"request {sample.request}: the model gave no usable logits (NaN, or nothing allowed)"
                )
            text += sample.append(token)
            kept.logprobs.append(decided.logprobs[i])
            kept.drawn += decided.drawn[i : i + 1]
            kept.top += decided.top[i : i + 1]
            if token in sample.end_token_ids or sample.text.stopped or sample.left == 0:
                sample.finish_reason = self._why_finished(sample, token)
                return text + sample.text.flush()
        return text

    def _why_finished(self, sample: Sample, token: int) -> str:
        params = sample.params
        if token in self.config.eos_token_ids and not params.ignore_eos:
            return "eos"
        if token in sample.end_token_ids or sample.text.stopped:
            return "stop"
        return "length" if len(sample.tokens) == params.max_tokens else "context"

    def _count(self, part: Part, accepted: int, tokens: int) -> None:
        stats = part.sample.stats
        name = f"{part.kind}_forwards"
        setattr(stats, name, getattr(stats, name) + 1)
        stats.tokens += tokens
        if part.kind == PREFILL:
            return
        stats.committed += tokens
        plan = part.kind if part.kind != VERIFY else part.plan.name
        stats.plan[plan] = stats.plan.get(plan, 0) + 1
        stats.plan_reason = part.plan.reason
        if part.kind == VERIFY:
            stats.count_verified(part.source, part.causal - 1, accepted)

    def _learn(self, part: Part, accepted: int, tokens: int) -> None:
        """Tells the planner which drafts held: those verified, and what n-grams would have drafted."""
        sample, planner = part.sample, self.model.planner
        if part.kind == VERIFY and part.source != "ngram":
            newest = sample.guesses[len(sample.guesses) - tokens :] if sample.follows else []
            part.guessed = sum(held for _, held in newest[:accepted])
            own = sample.acceptance[part.source]
            planner.count(sample.kind(part.source), own, part.causal - 1, accepted, part.guessed)
        if len(sample.guesses) >= REPLAN_STEPS or sample.finish_reason:
            planner.count_guesses(sample.kind("ngram"), sample.acceptance["ngram"], sample.guesses)
            sample.guesses = []

    def _account(self, parts: list[Part], taken: list[tuple[str, tuple[int, ...], int]]) -> None:
        """Tells the planner what a decode forward brought; forwards with prompts in them say nothing about drafts.

        Only what is tried is held against plain decoding: n-gram drafts are known from what they would have brought.
        """
        kinds = {part.kind for part in parts}
        if not kinds <= {AR, DRAFT, VERIFY}:
            return
        if kinds == {AR}:
            self.scheduler.book_plain(parts)
            return
        planner = self.model.planner
        self.scheduler.book(parts, [len(new) for _, new, _ in taken])
        if any(part.kind != AR and part.source != "ngram" for part in parts):
            pairs = list(zip(parts, (len(new) for _, new, _ in taken), strict=True))
            rows = sum(1 if part.source == "ngram" else part.block.rows for part in parts)
            tokens = sum(1 if part.source == "ngram" else new - part.guessed for part, new in pairs)
            verifying = sum(part.kind == VERIFY and part.source != "ngram" for part in parts)
            planner.account_drafts(rows, len(parts), tokens, verifying)

    def _event(self, part: Part, text: str, new: tuple[int, ...], accepted: int, seconds: float) -> StreamEvent:
        sample = part.sample
        return StreamEvent(
            request=sample.request,
            sample=sample.index,
            kind=part.kind,
            drafted=tuple(part.drafts),
            accepted=accepted,
            token_ids=new,
            text=text,
            provisional=sample.canvas.shown() or tuple(sample.drafts),
            finish_reason=sample.finish_reason,
            output=self._output(sample) if sample.finish_reason else None,
            plan=(part.causal, part.plan.levels),
            logprobs=tuple(sample.decided.logprobs[len(sample.decided.logprobs) - len(new) :]),
            draft_logprobs=part.draft_logprobs,
            drafter=part.source,
            seconds=seconds,
        )

    def _output(self, sample: Sample) -> GenerationOutput:
        reported = sample.params.logprobs is not None
        return GenerationOutput(
            prompt_token_ids=sample.prompt,
            token_ids=sample.tokens,
            text=sample.text.text,
            finish_reason=sample.finish_reason,
            logprobs=sample.decided.logprobs if reported else None,
            seed=sample.params.seed,
            request=sample.request,
            sample=sample.index,
            stats=sample.stats,
            drawn_logprobs=sample.decided.drawn if reported else None,
            top_logprobs=sample.decided.top if reported else None,
        )


def _decided(chosen: Iterable[tuple[int, float]]) -> Decided:
    tokens, logprobs = [], []
    for token, logprob in chosen:
        tokens.append(token)
        logprobs.append(logprob)
    return Decided(tokens, logprobs)
