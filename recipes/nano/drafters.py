"""Drafters that use no model: what mask drafting is compared with."""


def ngram_drafter(tokens: list[int], count: int, longest: int = 8, shortest: int = 2) -> list[int]:
    """Prompt lookup: what followed the latest earlier occurrence of the longest suffix that has one."""
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        suffix = tokens[-n:]
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == suffix:
                return tokens[start + n : start + n + count]
    return []
