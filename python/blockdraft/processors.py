"""Changes to a request's logits that depend on its text so far: forbidden tokens, biases, penalties.

The row that decides a token sees the text before that token, drafts included. A row after drafts that hold is thus the
row of plain decoding, bit by bit, and the tokens do not depend on the drafts.
"""

import math
import reprlib
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor

from blockdraft.errors import RequestError

AllowedTokens = Callable[[list[int]], Iterable[int] | Tensor]
"""allowed_tokens(token_ids): what may follow token_ids (prompt and output): ids, or a bool tensor ``[V]``."""


class TokenCounts:
    """The text of one sample, and how often each token is in its output: kept up to date, never counted anew.

    Memory: about 0.1 KB for each different token, 8 bytes for each token.

    Args:
        prompt: Its tokens, which count as seen and not as output.

    Attributes:
        tokens: Prompt and output.
        prompt_length: Tokens of the prompt.
    """

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self.tokens, self.prompt_length = list(prompt), len(prompt)
        self._columns: dict[int, int] = {}  # token -> its place in the two below
        self._ids, self._outputs = array("q"), array("f")
        for token in prompt:
            self._column(token)

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> None:
        """Adds a decided token."""
        self.tokens.append(token)
        self._outputs[self._column(token)] += 1

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds decided tokens."""
        for token in tokens:
            self.append(token)

    def _column(self, token: int) -> int:
        column = self._columns.setdefault(token, len(self._ids))
        if column == len(self._ids):
            self._ids.append(token)
            self._outputs.append(0)
        return column

    def before_rows(self, drafts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What row i of a block has before it, the text and ``drafts[:i]``; the counts themselves do not change.

        Returns:
            The different tokens int64 ``[K]``, how often each is in the output before row i, float32 ``[n, K]`` with
            n = len(drafts) + 1, and whether it is in prompt or output before row i, bool ``[n, K]``.
        """
        known, new = len(self._ids), [token for token in dict.fromkeys(drafts) if token not in self._columns]
        places = {token: known + i for i, token in enumerate(new)}
        columns = [self._columns.get(token, places.get(token)) for token in drafts]

        ids = torch.cat([torch.from_numpy(numpy.array(self._ids)), torch.tensor(new, dtype=torch.int64)])  # [K]
        outputs = torch.zeros(len(drafts) + 1, len(ids))
        outputs[:, :known] = torch.from_numpy(numpy.array(self._outputs))
        earlier = torch.ones(len(drafts) + 1, len(drafts)).tril(-1)  # [n, drafts]: row i counts drafts before i
        outputs.index_add_(1, torch.tensor(columns, dtype=torch.int64), earlier)
        seen = (outputs > 0) | (torch.arange(len(ids)) < known)
        return ids, outputs, seen


@dataclass(frozen=True)
class Processors:
    """What is done to a row of logits, before temperature and truncation.

    In this order, vLLM's: first tokens are forbidden (allowed_tokens, bad_words, min_tokens), then logit_bias is added,
    then come repetition, frequency and presence penalty. A forbidden token is at -inf, and nothing later brings it
    back. The bias is a part of the logit that the repetition penalty scales, since that depends on its sign, and
    what is subtracted is not scaled. All of it works element by element, so a row's bits do not depend on other rows.

    Attributes:
        repetition_penalty: Of tokens in prompt or output: divides positive logits, multiplies others. In [1e-3, 1e3].
        frequency_penalty: Subtracted for each time that the token is in the output. In [-2, 2].
        presence_penalty: Subtracted if the token is in the output. In [-2, 2].
        logit_bias: Added, by token id: in [-1e9, 1e9], or -inf, which forbids the token.
        bad_words: Token sequences; the last token of one is forbidden where the text ends with the others.
        min_tokens: Tokens that end the text are forbidden before the output has this many.
        allowed_tokens: What may come next, for structured output: `AllowedTokens`. A function of its argument, a list
            of its own, and of nothing else: it is also called with drafts that turn out wrong, in any order. Each draft
            in it was allowed where it stands.

    Raises:
        RequestError: A value that is not that.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[Sequence[int]] = ()
    min_tokens: int = 0
    allowed_tokens: AllowedTokens | None = None

    def __post_init__(self) -> None:
        # The bounds keep (logit + bias) / penalty / temperature far inside float32: 1e9 / 1e-3 / 1e-6 = 1e18.
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("min_tokens", self.min_tokens, 0, 2**31 - 1, int)
        if self.allowed_tokens is not None and not callable(self.allowed_tokens):
            raise RequestError(f"allowed_tokens must be callable, got {self.allowed_tokens!r}")
        # Copies: what was checked must not change while the request runs.
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        object.__setattr__(self, "bad_words", _checked_words(self.bad_words))

    @property
    def active(self) -> bool:
        """Whether anything is done at all."""
        return self._forbids or self._penalizes or bool(self.logit_bias)

    def check(self, vocab_size: int) -> None:
        """Raises RequestError for token ids that a vocabulary of this size does not have."""
        for name, largest in self._largest_ids.items():
            if largest >= vocab_size:
                raise RequestError(f"{name} must have token ids in [0, {vocab_size - 1}], got {largest}")

    def apply(
        self, logits: Tensor, context: Sequence[int], prompt_length: int, end_token_ids: Collection[int] = ()
    ) -> Tensor:
        """One row, in place: the plain form of `apply_block`, which counts all of the text.

        Args:
            logits: float32 ``[V]``, changed in place.
            context: All tokens before the one that the row decides: prompt, output, drafts.
            prompt_length: Tokens of `context` that are the prompt.
            end_token_ids: As in `apply_block`.

        Returns:
            logits.
        """
        counts = TokenCounts(context[:prompt_length])
        counts.extend(context[prompt_length:])
        self.apply_block(logits[None], counts, (), end_token_ids)
        return logits

    def apply_block(
        self, logits: Tensor, counts: TokenCounts, drafts: Sequence[int], end_token_ids: Collection[int] = ()
    ) -> int:
        """The rows of a block, in place: row i as `apply` does it with ``drafts[:i]`` behind the text of `counts`.

        A row is done only if plain decoding could come to it. After a draft that its row forbids, or that ends the
        text, no row is done. A row after drafts for which allowed_tokens fails is not done either, nor are those that
        follow: if the drafts hold, the next block begins with that row, and raises what plain decoding would.

        Args:
            logits: float32 ``[n, V]``, n = len(drafts) + 1, on any device, changed in place.
            counts: Prompt and decided tokens; not changed.
            drafts: Tokens at the rows from the second on.
            end_token_ids: Tokens that end the text here: stop tokens, and eos tokens unless they are ignored.

        Returns:
            Rows done, from the first, at least 1: at most so many tokens may be decided by this block.

        Raises:
            RequestError: allowed_tokens returns what is neither ids in the vocabulary nor a bool tensor ``[V]``, or
                nothing; no token is left. Whatever allowed_tokens raises. Both for the first row only, see above.
        """
        if logits.dtype != torch.float32 or logits.dim() != 2 or len(logits) != len(drafts) + 1:
            wanted = f"float32 [n={len(drafts) + 1}, V]"
            raise RequestError(f"logits must be {wanted}, got {logits.dtype} {list(logits.shape)}")
        self.check(logits.shape[1])
        rows = self._forbid(logits, counts, drafts, end_token_ids) if self._forbids else len(logits)
        if self.logit_bias:
            ids, values = (x.to(logits.device) for x in self._bias)
            logits[:rows, ids] += values
        if self._penalizes:
            self._penalize(logits[:rows], counts, drafts[: rows - 1])
        return rows

    @cached_property
    def _forbids(self) -> bool:
        return bool(self._banned or self.bad_words or self.min_tokens or self.allowed_tokens)

    @cached_property
    def _penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @cached_property
    def _largest_ids(self) -> dict[str, int]:
        words = (token for word in self.bad_words for token in word)
        return {"logit_bias": max(self.logit_bias or (), default=0), "bad_words": max(words, default=0)}

    @cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(list(self.logit_bias)), torch.tensor(list(self.logit_bias.values()), dtype=torch.float32)

    @cached_property
    def _banned(self) -> frozenset[int]:
        return frozenset(token for token, bias in (self.logit_bias or {}).items() if bias == -math.inf)

    @cached_property
    def _last_tokens(self) -> dict[tuple[int, ...], set[int]]:
        """Of the bad words, by the tokens before the last."""
        table: dict[tuple[int, ...], set[int]] = {}
        for *first, last in self.bad_words:
            table.setdefault(tuple(first), set()).add(last)
        return table

    def _forbid(
        self, logits: Tensor, counts: TokenCounts, drafts: Sequence[int], end_token_ids: Collection[int]
    ) -> int:
        """Sets forbidden tokens to -inf; returns the rows done."""
        ends = {token for token in end_token_ids if 0 <= token < logits.shape[1]}
        for i, row in enumerate(logits):
            try:
                permitted = self._permitted(counts, drafts[:i], ends, len(row))
            except Exception:
                if i == 0:
                    raise
                return i  # these drafts may be wrong: only plain decoding's text may fail a request
            if permitted is not None:
                row.masked_fill_(~permitted.to(row.device), -math.inf)
            if i < len(drafts) and (drafts[i] in ends or not (permitted is None or permitted[drafts[i]])):
                return i + 1
        return len(logits)

    def _permitted(self, counts: TokenCounts, drafts: Sequence[int], ends: set[int], vocab_size: int) -> Tensor | None:
        """The tokens that may follow: bool ``[V]`` on the CPU; None for all."""
        forbidden = self._banned | self._completing(counts.tokens, drafts)
        if counts.output_length + len(drafts) < self.min_tokens:
            forbidden |= ends
        if self.allowed_tokens is not None:
            permitted = self._allowed([*counts.tokens, *drafts], vocab_size)
        elif forbidden:
            permitted = torch.ones(vocab_size, dtype=torch.bool)
        else:
            return None
        permitted[torch.tensor(list(forbidden), dtype=torch.int64)] = False
        if not permitted.any():
            raise RequestError(
                "allowed_tokens, bad_words, min_tokens and logit_bias must leave a token that may come, "
                f"got none after {len(counts.tokens) + len(drafts)} tokens"
            )
        return permitted

    def _completing(self, tokens: list[int], drafts: Sequence[int]) -> set[int]:
        """Tokens that would complete a bad word."""
        lengths = {len(first) for first in self._last_tokens}
        ending = [*tokens[max(len(tokens) - max(lengths, default=0), 0) :], *drafts]
        found = (self._last_tokens.get(tuple(ending[max(len(ending) - n, 0) :])) for n in lengths)
        return set().union(*(last for last in found if last))

    def _allowed(self, tokens: list[int], vocab_size: int) -> Tensor:
        wanted = f"allowed_tokens must return token ids in [0, {vocab_size - 1}] or a bool tensor [V={vocab_size}]"
        length, answer = len(tokens), self.allowed_tokens(tokens)
        try:
            ids = answer if isinstance(answer, Tensor) else torch.tensor(list(answer))
        except (TypeError, ValueError, RuntimeError) as error:
            raise RequestError(f"{wanted}, got {reprlib.repr(answer)}") from error
        if ids.dtype == torch.bool and ids.shape == (vocab_size,):
            permitted = ids.to("cpu", copy=True)
        else:
            permitted = torch.zeros(vocab_size, dtype=torch.bool)
            permitted[_checked_ids(ids, vocab_size, wanted)] = True
        if not permitted.any():
            raise RequestError(f"allowed_tokens must allow a token, got none after {length} tokens")
        return permitted

    def _penalize(self, logits: Tensor, counts: TokenCounts, drafts: Sequence[int]) -> None:
        ids, outputs, seen = (x.to(logits.device) for x in counts.before_rows(drafts))
        z = logits[:, ids]  # [n, K]
        scaled = torch.where(z > 0, z / self.repetition_penalty, z * self.repetition_penalty)
        z = torch.where(seen, scaled, z)
        z = z - self.frequency_penalty * outputs
        logits[:, ids] = z - self.presence_penalty * (outputs > 0)


def _number(name: str, value: Any, low: float, high: float, kind: type = float) -> None:
    if not _is_number(value, kind) or not low <= value <= high:
        wanted = "an integer" if kind is int else "a number"
        raise RequestError(f"{name} must be {wanted} in [{low}, {high}], got {value!r}")


def _is_number(value: Any, kind: type = float) -> bool:
    return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return _is_number(value, int) and 0 <= value < 2**31


def _checked_bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    wanted = "logit_bias must map token ids to numbers in [-1e9, 1e9] or -inf"
    if not isinstance(bias, Mapping):
        raise RequestError(f"{wanted}, got {bias!r}")
    for token, value in bias.items():
        if not _is_token(token) or not _is_number(value) or not (abs(value) <= 1e9 or value == -math.inf):
            raise RequestError(f"{wanted}, got {token!r}: {value!r}")
    return dict(bias)


def _checked_words(words: Any) -> tuple[tuple[int, ...], ...]:
    wanted = "bad_words must be non-empty sequences of token ids"
    if not isinstance(words, Sequence):
        raise RequestError(f"{wanted}, got {words!r}")
    for word in words:
        if not isinstance(word, Sequence) or not word or not all(map(_is_token, word)):
            raise RequestError(f"{wanted}, got {word!r}")
    return tuple(map(tuple, words))


def _checked_ids(ids: Tensor, vocab_size: int, wanted: str) -> Tensor:
    """What allowed_tokens returned, as int64 on the CPU."""
    if ids.numel() and (ids.dim() != 1 or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex()):
        raise RequestError(f"{wanted}, got {ids.dtype} {list(ids.shape)}")
    ids = ids.flatten().to("cpu", torch.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise RequestError(f"{wanted}, got {outside[0]}")
    return ids
