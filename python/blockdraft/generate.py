"""The decoding loop: prefill, draft, verify, commit, for a batch of sequences each in its own phase.

A sequence with a decided token that is not in the cache yet (its anchor) takes part in a forward in one of four ways:

    prefill  rows of the prompt; the last chunk also carries a group of mask rows
    draft    the anchor and a group of mask rows: commits the anchor, decides the next one, and guesses what follows
    verify   the anchor and its drafts, causal: commits the anchor and every draft that equals the model's choice
    ar       the anchor alone

All sequences share each forward, whatever their phase. Drafts come from mask rows (arXiv 2511.08923) or a callable;
either way the tokens are those of plain decoding, because verified rows are plain causal rows with the same bits and
the noise of a position does not depend on the step (arXiv 2408.07978).
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockdraft import ops
from blockdraft.cache import Cache, CachedSequence
from blockdraft.errors import ConfigError, RequestError
from blockdraft.sampler import Draw, SamplingParams, choose
from blockdraft.steps import AR, DRAFT, PREFILL, VERIFY, Block, make_step
from blockdraft.text import TextStream

if TYPE_CHECKING:
    from blockdraft.model.zaya import ZayaForCausalLM

PREFILL_ROWS = 512  # prompt rows of one forward, over all sequences


@dataclass
class GenerationStats:
    """What a sample cost.

    Attributes:
        prefill_forwards, draft_forwards, verify_forwards, ar_forwards: Forwards it took part in, by kind.
        drafted, accepted: Drafts verified and accepted; the anchor is neither.
        committed: Tokens that its decode forwards decided and the output kept.
        acceptance_histogram: Verify forwards by number of accepted drafts.
        seconds: From the sample's first forward to its last.
        tokens: Emitted tokens.
    """

    prefill_forwards: int = 0
    draft_forwards: int = 0
    verify_forwards: int = 0
    ar_forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    committed: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    @property
    def decode_forwards(self) -> int:
        return self.draft_forwards + self.verify_forwards + self.ar_forwards

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens per decode forward; prefill is excluded. 0 where there was none."""
        return self.committed / self.decode_forwards if self.decode_forwards else 0.0

    @property
    def tokens_per_verify(self) -> float:
        """Mean of 1 + accepted drafts over the verify forwards. 0 where there was none."""
        return 1 + self.accepted / self.verify_forwards if self.verify_forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class GenerationOutput:
    """One sample of one prompt.

    Attributes:
        prompt_token_ids: As the model saw them.
        token_ids: Generated tokens, with the eos or stop token that ended them.
        text: Their text without special tokens, cut before a stop string. None without a tokenizer.
        finish_reason: "eos", "stop", "length" (max_tokens) or "context" (the model's or the cache's room is used up).
        logprobs: Log-probability of each token under the model's plain law, where asked for.
        seed: Of the noise; given or drawn.
        request, sample: Index of the prompt and of the sample.
        stats: `GenerationStats`.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: str
    logprobs: list[float] | None
    seed: int
    request: int
    sample: int
    stats: GenerationStats


@dataclass(frozen=True)
class StreamEvent:
    """What one forward brought one sample.

    Attributes:
        request, sample: Whose it is.
        kind: "prefill", "draft", "verify" or "ar".
        drafted: Drafts that the forward verified; the first `accepted` of them hold.
        token_ids: Tokens that are now final, in order; they include the accepted drafts.
        text: Text that is now final (characters and stop strings that are still open are held back).
        provisional: Drafts that wait for the next verification, after all final tokens.
        finish_reason, output: Of the sample's last event.
    """

    request: int
    sample: int
    kind: str
    drafted: tuple[int, ...]
    accepted: int
    token_ids: tuple[int, ...]
    text: str
    provisional: tuple[int, ...]
    finish_reason: str | None = None
    output: GenerationOutput | None = None


class Sample:
    """A sample in flight: its tokens, its drafts, its place in the cache."""

    def __init__(self, prompt: list[int], params: SamplingParams, request: int, index: int, text: TextStream) -> None:
        self.prompt, self.params, self.request, self.index, self.text = prompt, params, request, index, text
        self.tokens: list[int] = []  # decided; the last one is the anchor, not yet in the cache
        self.logprobs: list[float] = []
        self.drafts: list[int] = []
        self.cached: CachedSequence | None = None
        self.stats = GenerationStats()
        self.finish_reason: str | None = None
        self.started = 0.0

    @property
    def remaining(self) -> int:
        return self.params.max_tokens - len(self.tokens)

    @property
    def known(self) -> list[int]:
        """Prompt and decided tokens."""
        return self.prompt + self.tokens

    def draw(self, position: int) -> Draw:
        return Draw(self.params, self.index, position)


@dataclass
class Part:
    """A sample's share of one forward."""

    sample: Sample
    kind: str
    block: Block
    forced: int  # causal rows known to be right: their successors are not decided here
    first: int = 0  # its first row

    @property
    def causal(self) -> int:
        return len(self.block.token_ids)

    def decisions(self) -> list[tuple[int, Draw]]:
        """(row, draw) of each token this part decides: after causal rows, then at mask rows from the second on."""
        start, causal = self.block.length, self.causal
        after = [(self.first + i, self.sample.draw(start + i + 1)) for i in range(self.forced, causal)]
        at = [(self.first + causal + j, self.sample.draw(start + causal + j)) for j in range(1, self.block.masks)]
        return after + at


class Engine:
    """Runs requests of one model to their end; see the module's text.

    Args:
        model: Weights, configuration, limits.
    """

    def __init__(self, model: "ZayaForCausalLM") -> None:
        self.model, self.config = model, model.config
        self.context = min(model.config.max_position_embeddings, model.kv_cache_tokens)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[StreamEvent]:
        """Checks everything, then decodes; events come as forwards end."""
        waiting: deque[Sample] = deque()
        for request, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            self._check(prompt, p)
            p = p.with_seed()
            waiting.extend(Sample(prompt, p, request, i, self._text(p)) for i in range(p.n))
        return self._loop(waiting)

    def _text(self, params: SamplingParams) -> TextStream:
        return TextStream(self.model.tokenizer, params.stop_strings)

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        if len(prompt) >= self.context:
            raise RequestError(
                f"the prompt must leave room for a token in {self.context} (context and kv_cache_tokens), "
                f"got {len(prompt)} tokens"
            )
        if params.stop_strings and self.model.tokenizer is None:
            raise RequestError("stop strings need a tokenizer.json beside the weights; use token ids")
        if params.drafts and params.drafter == "mask":
            self._check_mask_drafting()

    def _check_mask_drafting(self) -> None:
        if self.config.mask_token_id is None:
            raise ConfigError(
                "mask_token_id: the checkpoint's config.json names none (tidar_mask_token_id, "
                "parallel_drafting_mask_token_id, draft_mask_token_id, bidirectional_mask_token_id, mask_token_id); "
                "pass mask_token_id=, or sampler='ar', or a drafter that needs no mask rows"
            )
        if self.config.draft_layout != "extra_first_mask":
            raise ConfigError(f"draft_layout must be 'extra_first_mask' to draft, got {self.config.draft_layout!r}")

    def _room(self, sample: Sample) -> int:
        return min(len(sample.prompt) + sample.params.max_tokens, self.context)

    def _loop(self, waiting: deque[Sample]) -> Iterator[StreamEvent]:
        slots = min(self.model.max_batch_size, len(waiting))
        tokens = min(self.model.kv_cache_tokens, sum(self._room(s) for s in waiting))
        cache = self.model.new_cache(tokens, slots) if waiting else None
        active: list[Sample] = []
        while waiting or active:
            while waiting and cache.can_allocate(self._room(waiting[0])):
                sample = waiting.popleft()
                sample.cached = cache.allocate(self._room(sample))
                active.append(sample)
            yield from self._step(cache, active)
            for sample in [s for s in active if s.finish_reason]:
                cache.release(sample.cached)
                active.remove(sample)

    def _block_length(self, sample: Sample) -> int:
        return sample.params.block_length or self.config.block_length

    def _masks(self, sample: Sample, decided: int) -> int:
        """Mask rows after a forward that decides `decided` tokens: none where at most one is left to decide."""
        wanted = sample.params.drafts and sample.params.drafter == "mask"
        return self._block_length(sample) if wanted and self._left(sample) > decided + 1 else 0

    def _left(self, sample: Sample) -> int:
        """Tokens still to decide, by max_tokens and by room."""
        return min(sample.remaining, self.context - len(sample.known))

    def _part(self, sample: Sample, prefill_rows: int) -> Part | None:
        """What a sample does in this forward; None where prompt rows are used up."""
        cached, prompt = sample.cached, sample.prompt
        if cached.length < len(prompt):
            rows = min(prefill_rows, len(prompt) - cached.length)
            if rows == 0:
                return None
            last = cached.length + rows == len(prompt)
            tokens, kind, forced = prompt[cached.length : cached.length + rows], PREFILL, rows - 1 if last else rows
            masks = self._masks(sample, 1) if last else 0
        else:
            self._ask_drafter(sample)
            drafts = sample.drafts[: self._left(sample) - 1]
            tokens, forced = [sample.tokens[-1], *drafts], 0
            masks = 0 if drafts else self._masks(sample, 1)
            kind = VERIFY if drafts else DRAFT if masks else AR
        return Part(sample, kind, Block(cached.length, cached.slot, cached.pages, tokens, masks), forced)

    def _ask_drafter(self, sample: Sample) -> None:
        params, count = sample.params, min(self._block_length(sample), self._left(sample)) - 1
        if not params.drafts or not callable(params.drafter) or count < 1:
            return
        drafts = [int(token) for token in params.drafter(sample.known, count)][:count]
        for token in drafts:
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(f"drafter must return token ids in [0, {self.config.vocab_size - 1}], got {token}")
        sample.drafts = drafts

    def _parts(self, active: list[Sample]) -> list[Part]:
        parts, prefill_rows, first = [], PREFILL_ROWS, 0
        for sample in active:
            part = self._part(sample, prefill_rows)
            if part is None:
                continue
            part.first = first
            first += part.block.rows
            prefill_rows -= part.causal if part.kind == PREFILL else 0
            parts.append(part)
        return parts

    @torch.inference_mode()
    def _forward(self, cache: Cache, parts: list[Part]) -> tuple[Tensor, ...]:
        """One step of the model: its choices per row, and what verification committed."""
        config, device = self.config, self.model.device
        step = make_step([part.block for part in parts], cache.page_size, config.mask_token_id, config.mask_parent)
        step = step.to(device)
        transaction = cache.begin(step, [part.sample.cached for part in parts])
        hidden_states = self.model.decoder(transaction)

        decisions = [decision for part in parts for decision in part.decisions()]
        chosen = step.token_ids.roll(-1)  # a row before a known token "decides" that token
        logprobs = torch.zeros(len(chosen), device=device)
        if decisions:
            rows = torch.tensor([row for row, _ in decisions], device=device)
            head = self.model.decoder.lm_head
            draws = [draw for _, draw in decisions]
            tokens, values = choose(hidden_states[rows], head.weight, head.out_features, draws)
            chosen[rows], logprobs[rows] = tokens, values

        lengths = torch.tensor([part.causal for part in parts], dtype=torch.int32, device=device)
        limits = torch.tensor([self._limit(part) for part in parts], dtype=torch.int32, device=device)
        accepted, committed, commit_rows, _ = ops.verify_tokens(step.token_ids, chosen, step.cu_rows, lengths, limits)
        transaction.commit(committed.tolist(), commit_rows)
        return chosen.cpu(), logprobs.cpu(), accepted.cpu(), committed.cpu()

    def _limit(self, part: Part) -> int:
        return part.causal if part.kind == PREFILL else min(part.causal, self._left(part.sample))

    def _step(self, cache: Cache, active: list[Sample]) -> Iterator[StreamEvent]:
        parts = self._parts(active)
        started = time.perf_counter()
        chosen, logprobs, accepted, committed = (x.tolist() for x in self._forward(cache, parts))
        for part, a, n in zip(parts, accepted, committed, strict=True):
            rows = slice(part.first + part.forced, part.first + n)
            part.sample.started = part.sample.started or started
            yield self._finish_part(part, chosen[rows], logprobs[rows], min(a, n - 1), self._drafts_of(part, chosen))

    def _drafts_of(self, part: Part, chosen: list[int]) -> list[int]:
        group = part.first + part.causal
        return chosen[group + 1 : group + part.block.masks]

    def _finish_part(
        self, part: Part, decided: list[int], logprobs: list[float], accepted: int, drafts: list[int]
    ) -> StreamEvent:
        sample = part.sample
        before = len(sample.tokens)
        text = self._append(sample, decided, logprobs)
        new = tuple(sample.tokens[before:])
        self._count(part, accepted, len(new))
        sample.drafts = [] if sample.finish_reason else drafts
        output = self._output(sample) if sample.finish_reason else None
        return StreamEvent(
            request=sample.request,
            sample=sample.index,
            kind=part.kind,
            drafted=tuple(part.block.token_ids[1:]) if part.kind == VERIFY else (),
            accepted=accepted if part.kind == VERIFY else 0,
            token_ids=new,
            text=text,
            provisional=tuple(sample.drafts),
            finish_reason=sample.finish_reason,
            output=output,
        )

    def _append(self, sample: Sample, decided: list[int], logprobs: list[float]) -> str:
        """Takes tokens up to the first that ends the sample; returns the text that became final."""
        text, params = "", sample.params
        for token, logprob in zip(decided, logprobs, strict=True):
            sample.tokens.append(token)
            sample.logprobs.append(logprob)
            text += sample.text.append(token)
            if token in self.config.eos_token_ids and not params.ignore_eos:
                sample.finish_reason = "eos"
            elif token in params.stop_token_ids or sample.text.stopped:
                sample.finish_reason = "stop"
            elif sample.remaining == 0:
                sample.finish_reason = "length"
            elif len(sample.known) >= self.context:
                sample.finish_reason = "context"
            if sample.finish_reason:
                return text + sample.text.flush()
        return text

    def _count(self, part: Part, accepted: int, tokens: int) -> None:
        stats = part.sample.stats
        name = f"{part.kind}_forwards"
        setattr(stats, name, getattr(stats, name) + 1)
        stats.tokens += tokens
        if part.kind != PREFILL:
            stats.committed += tokens
        if part.kind == VERIFY:
            stats.drafted += part.causal - 1
            stats.accepted += accepted
            missing = accepted + 1 - len(stats.acceptance_histogram)
            stats.acceptance_histogram += [0] * missing
            stats.acceptance_histogram[accepted] += 1
        stats.seconds = time.perf_counter() - part.sample.started

    def _output(self, sample: Sample) -> GenerationOutput:
        return GenerationOutput(
            prompt_token_ids=sample.prompt,
            token_ids=sample.tokens,
            text=sample.text.text,
            finish_reason=sample.finish_reason,
            logprobs=sample.logprobs if sample.params.logprobs is not None else None,
            seed=sample.params.seed,
            request=sample.request,
            sample=sample.index,
            stats=sample.stats,
        )
