"""Sampling parameters and their checks."""

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from blockdraft.errors import RequestError
from blockdraft.processors import Processors

Drafter = Callable[[list[int], int], Sequence[int]]
"""drafter(token_ids, count): up to `count` guesses of what follows token_ids (prompt and decided tokens)."""

MAX_LOGPROBS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How a request is decoded.

    Attributes:
        max_tokens: Tokens to generate, at least 1.
        temperature: 0 is greedy; otherwise at least 1e-6.
        top_k, top_p, min_p: Truncations of the law, in this order; None, 1 and 0 are off.
        seed: Of the noise, in [0, 2^63); None draws one and reports it in the output.
        stop: Strings, or token ids, that end the text; a string is not part of it.
        ignore_eos: Go on after an end-of-sequence token.
        n: Samples of the prompt, each with noise of its own.
        logprobs: Report log-probabilities of the emitted tokens, under the AR law and under the law they were drawn
            from, and this many of the most probable tokens of each position (0 to 64). None reports nothing.
        sampler: "lossless" drafts blocks and verifies them, "ar" decodes one token a forward; the law is the same.
            "mixed" verifies against a law between the AR and the draft law (`mix`, `lenience`): faster, not lossless.
            "denoise" takes its tokens from mask rows in several passes over a block, for models trained so.
        verification: How drafts are verified (decoding at temperature 0 is the same by all three). "gumbel": drafts and
            verification share their noise, the tokens are those of "ar" with the same seed (arXiv 2408.07978).
            "rejection": accepted with min(1, p / q), else drawn from the residual (arXiv 2211.17192): the law of "ar",
            other tokens. "match": accepted if equal to an independent draw: the tokens of "ar", fewer accepted.
        drafter: "mask" (the model's own mask rows), "ngram" (prompt lookup), "auto" (at each step the one that is worth
            more; only "ngram" without a mask token id, only "mask" with groups given or mix > 0, where there is one),
            "none", or a callable (`Drafter`).
        mix: 0 to 1, weight of the draft's logits in the mixed law. Needs sampler="mixed"; 0 is the lossless path.
        mix_source: "draft": the logits that the tested draft was drawn from. "fresh": those of the first mask row of
            the group after the row that decides, in the same forward; rows without such a group are not mixed.
        mix_max_kl: Mix only where KL(mixed || AR) of the position is at most this, nats, before truncation.
        mix_max_entropy: Mix only where the draft's law has at most this entropy, nats.
        lenience: At least 1; "rejection" accepts with min(1, lenience p / q). Above 1 needs sampler="mixed".
        block_length: Rows of a verified block, anchor included, 2 to 32; None takes the checkpoint's.
        groups: Mask groups that a verifying forward carries so that the next block is drafted at once: a number, or the
            accept lengths they are for; 0 drafts in a forward of its own. None leaves all of it to the planner, which
            also decodes plainly where drafts do not pay.
        repetition_penalty, frequency_penalty, presence_penalty, logit_bias, bad_words, min_tokens, allowed_tokens: See
            `blockdraft.processors.Processors`; bad_words may be strings.
        denoising_steps: Forwards per block at most; None is one per token.
        reveal: What a denoising pass reveals: "confidence", tokens of probability >= reveal_threshold and at least
            enough to be done in denoising_steps; "schedule", the surest of equal shares; "entropy", the surest whose
            entropies sum up to at most reveal_threshold (nats).
        reveal_threshold: See reveal; None is 0.9 for "confidence", 0.1 for "entropy".
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str | int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    sampler: str = "lossless"
    verification: str = "gumbel"
    drafter: str | Drafter = "auto"
    mix: float = 0.0
    mix_source: str = "draft"
    mix_max_kl: float | None = None
    mix_max_entropy: float | None = None
    lenience: float = 1.0
    block_length: int | None = None
    groups: int | Sequence[int] | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    min_tokens: int = 0
    allowed_tokens: Callable[[list[int]], Iterable[int] | Tensor] | None = None
    denoising_steps: int | None = None
    reveal: str = "confidence"
    reveal_threshold: float | None = None

    def __post_init__(self) -> None:
        self._number("max_tokens", self.max_tokens, 1, 2**31 - 1, int)
        self._check_law()
        if self.seed is not None:
            self._number("seed", self.seed, 0, 2**63 - 1, int)
        self._number("n", self.n, 1, 2**20, int)
        if self.block_length is not None:
            self._number("block_length", self.block_length, 2, 32, int)
        if self.logprobs is not None:
            self._number("logprobs", self.logprobs, 0, MAX_LOGPROBS, int)
        self._one_of("sampler", self.sampler, "lossless", "ar", "mixed", "denoise")
        self._one_of("verification", self.verification, "gumbel", "rejection", "match")
        if not callable(self.drafter):
            self._one_of("drafter", self.drafter, "auto", "mask", "ngram", "none")
        for stop in [self.stop] if isinstance(self.stop, str) else self.stop:
            if stop == "" or isinstance(stop, bool) or not isinstance(stop, str | int):
                raise RequestError(f"stop must be non-empty strings or token ids, got {stop!r}")
        self._check_mixing()
        self._check_groups()
        self._check_denoising()
        _ = self.processors  # checks their values

    def _check_law(self) -> None:
        self._number("temperature", self.temperature, 0, 1e6)
        if 0 < self.temperature < 1e-6:  # logits divided by it could leave float32
            raise RequestError(f"temperature must be 0 or at least 1e-6, got {self.temperature!r}")
        if self.top_k is not None:
            self._number("top_k", self.top_k, 1, 2**31 - 1, int)
        self._number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise RequestError("top_p must be greater than 0, got 0")
        self._number("min_p", self.min_p, 0, 1)

    def _check_mixing(self) -> None:
        self._number("mix", self.mix, 0, 1)
        self._number("lenience", self.lenience, 1, 1e6)
        self._one_of("mix_source", self.mix_source, "draft", "fresh")
        for name, value in (("mix_max_kl", self.mix_max_kl), ("mix_max_entropy", self.mix_max_entropy)):
            if value is not None:
                self._number(name, value, 0, 1e6)
        if self.sampler != "mixed" and self.mix > 0:
            raise RequestError(f"mix must be 0 unless sampler='mixed' (it is not lossless), got {self.mix!r}")
        if self.lenience > 1 and (self.sampler != "mixed" or self.verification != "rejection"):
            raise RequestError(
                "lenience must be 1 unless sampler='mixed' and verification='rejection' (it is not lossless), "
                f"got {self.lenience!r}"
            )

    def _check_groups(self) -> None:
        if self.groups is None:
            return
        if isinstance(self.groups, int):
            self._number("groups", self.groups, 0, 32, int)
            return
        for level in self.groups:
            self._number("groups", level, 0, 31, int)
        if len(set(self.groups)) != len(self.groups):
            raise RequestError(f"groups must name each accept length once, got {list(self.groups)!r}")

    def _check_denoising(self) -> None:
        self._one_of("reveal", self.reveal, "confidence", "schedule", "entropy")
        if self.denoising_steps is not None:
            self._number("denoising_steps", self.denoising_steps, 1, 32, int)
        if self.reveal_threshold is not None:
            self._number("reveal_threshold", self.reveal_threshold, 0, 1e6)

    @staticmethod
    def _number(name: str, value: Any, low: float, high: float, kind: type = float) -> None:
        allowed = int if kind is int else (int, float)
        ok = isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or not low <= value <= high:
            wanted = f"{'an integer' if kind is int else 'a number'} in [{low}, {high}]"
            raise RequestError(f"{name} must be {wanted}, got {value!r}")

    @staticmethod
    def _one_of(name: str, value: object, *choices: str) -> None:
        if value not in choices:
            raise RequestError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")

    @cached_property
    def processors(self) -> Processors:
        """With the bad words that are token ids already; strings need a tokenizer (`bad_strings`)."""
        return Processors(
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            bad_words=tuple(tuple(word) for word in self.bad_words if not isinstance(word, str)),
            min_tokens=self.min_tokens,
            allowed_tokens=self.allowed_tokens,
        )

    @property
    def bad_strings(self) -> tuple[str, ...]:
        return tuple(word for word in self.bad_words if isinstance(word, str))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        return tuple(stop for stop in stops if isinstance(stop, str))

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return frozenset(stop for stop in self.stop if isinstance(stop, int))

    @property
    def drafts(self) -> bool:
        """Whether blocks are drafted and verified."""
        return self.sampler in ("lossless", "mixed") and self.drafter != "none"

    @property
    def rejects(self) -> bool:
        """Whether drafts are verified by the rejection rule; a greedy law is a point mass, for which equality is it."""
        return self.verification == "rejection" and self.temperature > 0

    def with_seed(self) -> "SamplingParams":
        """The same with a seed drawn where there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))
