"""Drafts without a model: what followed the last time the text ended like this (arXiv 2304.04487, prompt lookup)."""

from blockdraft._host import NgramIndex
from blockdraft.errors import RequestError


class NgramDrafter(NgramIndex):
    """Guesses that the text goes on as it did after the latest earlier occurrence of its longest repeated ending.

    Holds the text of one sample. A token costs a few look-ups for each length of an ending at most, whatever the length
    of the text: 0.3 to 0.4 us in Python sources (`csrc/host/ngram_index.h`). A draft is a slice.

    Memory: the index has an entry for every different n-gram of `shortest` tokens, and for a longer one only where it
    tells occurrences apart; at most `(longest - shortest + 2) / 2` entries a token, 4 with the defaults. Measured, text
    included: 36 bytes a token in Python sources, 68 in random text that is there twice.

    Args:
        longest, shortest: Tokens of the endings that are looked for, 1 <= shortest <= longest.

    Attributes:
        matched: How much speaks for the drafts: tokens of the ending that was found, or, where it is more, those
            before it that guesses foresaw one after the other, and the ending that they began with. 0: none was found.
        entries, bytes: Size of the index, and of index and text.

    Raises:
        RequestError: Lengths that are not that.
    """

    def __init__(self, longest: int = 8, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise RequestError(f"shortest and longest must be 1 <= shortest <= longest, got {shortest} and {longest}")
        super().__init__(longest, shortest)

    def extend(self, tokens: list[int]) -> None:
        """Adds tokens to the text."""
        super().extend(tokens)

    def follow(self, token: int) -> tuple[int, bool]:
        """Adds the token that came; returns `matched` of before, and whether the next token was guessed right."""
        return super().follow(token)

    def draft(self, count: int) -> list[int]:
        """Up to `count` tokens: fewer where the occurrence is close to the end of the text, none without one."""
        if count < 0:
            raise RequestError(f"count must be at least 0, got {count}")
        return super().draft(count)
