"""Text of a growing token sequence: stop strings, and characters that span several tokens."""

from tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what decoding shows for bytes that are not a whole character yet


class TextStream:
    """Decodes tokens as they come.

    Args:
        tokenizer: None for no text at all.
        stops: Strings that end the text.

    Attributes:
        text: All final text; None without a tokenizer.
        stopped: A stop string was met; text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: tuple[str, ...]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.text = None if tokenizer is None else ""
        self.stopped = False
        self._tokens: list[int] = []  # not all of their text is final
        self._base = ""  # text of self._tokens that is final

    def append(self, token: int) -> str:
        """Adds a token; returns the text that became final."""
        if self.tokenizer is None or self.stopped:
            return ""
        self._tokens.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """The text that was held back, at the end of the sequence."""
        if self.tokenizer is None or self.stopped:
            return ""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        decoded = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        pending = decoded[len(self._base) :]
        found = [at for at in (pending.find(stop) for stop in self.stops) if at >= 0]
        if found:
            pending, self.stopped = pending[: min(found)], True
        elif not final:
            pending = pending[: len(pending) - self._held_back(pending)]
        self.text += pending
        self._base += pending
        if self._base == decoded and len(self._tokens) > 16:  # keeps decoding linear; byte-level tokens need no context
            self._tokens, self._base = [], ""
        return pending

    def _held_back(self, pending: str) -> int:
        """Characters at the end that may change: an unfinished one, or the start of a stop string."""
        unfinished = len(pending) - len(pending.rstrip(UNFINISHED))
        longest = max((len(stop) for stop in self.stops), default=0)
        for length in range(min(longest - 1, len(pending)), 0, -1):
            if any(stop.startswith(pending[-length:]) for stop in self.stops):
                return max(length, unfinished)
        return unfinished
