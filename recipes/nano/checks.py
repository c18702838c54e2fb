"""Whether a completion solves a task of `tasks.py`.

    blockdraft passk tasks.jsonl --checker-python recipes/nano/checks.py:passes

Imported anew for every check, so the standard library alone.
"""

import ast
import re
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]

# Whole strings and comments, in which brackets do not count; then a bracket.
LEXEME = re.compile(r'"""[\s\S]*?"""|"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])*'|#[^\n]*|[()\[\]{}]")


def passes(record: Record) -> bool:
    return CHECKS[record["kind"]](record)


def line(record: Record) -> bool:
    """The rest of the line is the file's."""
    return record["completion"].startswith(record["reference"] + "\n")


def name(record: Record) -> bool:
    """The rest of the name is the file's, and then it ends."""
    found = re.match(r"(\w*)\W", record["completion"])
    return found is not None and found[1] == record["reference"]


def brackets(record: Record) -> bool:
    """The brackets are closed, and the statement up to there is Python."""
    statement, known = record["text"][record["begin"] :], len(record["prompt"]) - record["begin"]
    end = closed_at(statement, known)
    return end is not None and parses(statement[:end])


def closed_at(text: str, known: int) -> int | None:
    """Where no bracket is open any more, behind text[:known]; whether they are of one kind, the parser says."""
    depth = 0
    for lexeme in LEXEME.finditer(text):
        depth += (lexeme[0] in "([{") - (lexeme[0] in ")]}")
        if depth == 0 and lexeme[0] in ")]}" and lexeme.end() > known:
            return lexeme.end()
    return None


def docstring(record: Record) -> bool:
    """It goes on by two words at least and ends, and the definition with it is Python."""
    words, end, _ = record["completion"].partition('"""')
    return bool(end) and len(words.split()) >= 2 and parses(record["prompt"][record["begin"] :] + words + end)


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):  # of a NUL character
        return False
    return True


CHECKS: dict[str, Callable[[Record], bool]] = {
    "line": line,
    "name": name,
    "brackets": brackets,
    "docstring": docstring,
}
