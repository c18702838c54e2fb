"""Text of a growing token sequence: stop strings, and characters that span several tokens."""

from tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what decoding shows for bytes that are not a whole character yet
CONTEXT = 16  # tokens decoded again with those after them; few, for linear time: byte-level ones need no context


class TextStream:
    """Decodes tokens as they come.

    Args:
        tokenizer: None for no text at all.
        stops: Strings that end the text.
        watched: Somebody reads the text as it grows; else it is decoded when so much has come that it would be
            anyway, and at the end: one call of the tokenizer in 17 tokens, and the same text.

    Attributes:
        text: All final text; None without a tokenizer.
        stopped: A stop string was met; text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: tuple[str, ...], watched: bool = True) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.at_once = watched or len(stops) > 0
        self.text = None if tokenizer is None else ""
        self.stopped = False
        self._tokens: list[int] = []  # not all of their text is final
        self._base = ""  # text of self._tokens that is final

    def append(self, token: int) -> str:
        """Adds a token; returns the text that became final."""
        if self.tokenizer is None or self.stopped:
            return ""
        self._tokens.append(token)
        if not self.at_once and len(self._tokens) <= CONTEXT:
            return ""
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
        if self._base == decoded and len(self._tokens) > CONTEXT:
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
