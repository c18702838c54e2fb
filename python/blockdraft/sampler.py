"""Which token a row decides: sampling parameters, their checks, and the call that applies them to rows."""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockdraft import ops
from blockdraft.errors import RequestError

Drafter = Callable[[list[int], int], Sequence[int]]
"""drafter(token_ids, count): up to `count` guesses of what follows token_ids (prompt and decided tokens)."""


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
        logprobs: 0 reports the log-probability of each emitted token under the model's plain (AR) law; None does not.
        sampler: "lossless" drafts blocks and verifies them, "ar" decodes one token a forward. The tokens are the same.
        verification: "gumbel": drafts and verification share their noise.
        drafter: "mask" (the model's own mask rows), "none", or a callable (`Drafter`).
        mix: Must be 0: logit mixing is not lossless and not offered.
        block_length: Rows of a verified block, anchor included, 2 to 32; None takes the checkpoint's.
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
    drafter: str | Drafter = "mask"
    mix: float = 0.0
    block_length: int | None = None

    def __post_init__(self) -> None:
        self._number("max_tokens", self.max_tokens, 1, 2**31 - 1, int)
        self._number("temperature", self.temperature, 0, 1e6)
        if 0 < self.temperature < 1e-6:  # logits divided by it could leave float32
            raise RequestError(f"temperature must be 0 or at least 1e-6, got {self.temperature!r}")
        if self.top_k is not None:
            self._number("top_k", self.top_k, 1, 2**31 - 1, int)
        self._number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise RequestError("top_p must be greater than 0, got 0")
        self._number("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            self._number("seed", self.seed, 0, 2**63 - 1, int)
        self._number("n", self.n, 1, 2**20, int)
        self._number("mix", self.mix, 0, 0)
        if self.block_length is not None:
            self._number("block_length", self.block_length, 2, 32, int)
        if self.logprobs is not None:
            self._number("logprobs", self.logprobs, 0, 0, int)
        self._one_of("sampler", self.sampler, "lossless", "ar")
        self._one_of("verification", self.verification, "gumbel")
        if not callable(self.drafter):
            self._one_of("drafter", self.drafter, "mask", "none")
        for stop in [self.stop] if isinstance(self.stop, str) else self.stop:
            if stop == "" or isinstance(stop, bool) or not isinstance(stop, str | int):
                raise RequestError(f"stop must be non-empty strings or token ids, got {stop!r}")

    @staticmethod
    def _number(name: str, value: Any, low: float, high: float, kind: type = float) -> None:
        allowed = int if kind is int else (int, float)
        ok = isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or not low <= value <= high:
            wanted = str(low) if low == high else f"{'an integer' if kind is int else 'a number'} in [{low}, {high}]"
            raise RequestError(f"{name} must be {wanted}, got {value!r}")

    @staticmethod
    def _one_of(name: str, value: object, *choices: str) -> None:
        if value not in choices:
            raise RequestError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        return tuple(stop for stop in stops if isinstance(stop, str))

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return frozenset(stop for stop in self.stop if isinstance(stop, int))

    @property
    def drafts(self) -> bool:
        """Whether blocks are drafted at all."""
        return self.sampler == "lossless" and self.drafter != "none"

    def with_seed(self) -> "SamplingParams":
        """The same with a seed drawn where there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))


@dataclass(frozen=True)
class Draw:
    """One row's choice: whose law, which sample's noise, and for which position."""

    params: SamplingParams
    sample: int
    position: int


def choose(hidden_states: Tensor, head: Tensor, vocab_size: int, draws: list[Draw]) -> tuple[Tensor, Tensor]:
    """Tokens ``[T]`` and their log-probabilities for rows ``hidden_states [T, H]``; one draw per row."""
    device = hidden_states.device

    def column(dtype: torch.dtype, values: list) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    params = [draw.params for draw in draws]
    return ops.lm_head_choose(
        hidden_states,
        head,
        vocab_size,
        column(torch.float32, [p.temperature for p in params]),
        column(torch.int32, [p.top_k or 0 for p in params]),
        column(torch.float32, [p.top_p for p in params]),
        column(torch.float32, [p.min_p for p in params]),
        column(torch.int64, [p.seed for p in params]),
        column(torch.int32, [draw.sample for draw in draws]),
        column(torch.int32, [draw.position for draw in draws]),
    )
