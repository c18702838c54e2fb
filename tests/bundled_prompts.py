"""Prompts for the bundled model from packages that its training did not see (recipes/nano/data.py)."""

import functools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "nano"))


@functools.cache
def held_out_texts() -> list[str]:
    import data

    return [text for _, text in data.split()[1]]


def held_out_prompts(count: int, length: int = 160) -> list[str]:
    """`count` pieces of `length` characters that begin at line starts, spread evenly over the held-out files."""
    texts = [text for text in held_out_texts() if len(text) > 4 * length]
    prompts = []
    for i in range(count):
        text = texts[i % len(texts)]
        start = text.index("\n", len(text) * (1 + i // len(texts)) // (2 + count // len(texts)) - length) + 1
        prompts.append(text[start : start + length])
    return prompts
