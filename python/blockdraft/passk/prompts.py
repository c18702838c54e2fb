"""The prompts of an evaluation: records with "prompt", "id" and what else the checker wants to know."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blockdraft.errors import RequestError
from blockdraft.model.zaya import ZayaForCausalLM

RESERVED = ("completion", "text")  # the checker's names for what was generated
SHOWN_CHARACTERS = 60

Record = dict[str, Any]


def read_records(path: str | Path) -> list[Record]:
    """The lines of a JSONL file, each with an "id" (default: the line's number). Empty lines are passed over.

    Raises:
        RequestError: No such file, no prompt in it, or a line that is no record; names file and line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    records = [_parse(line, f"{path}:{number}", number) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise RequestError(f"{path}: must hold a prompt a line, got none")
    return records


def _parse(line: bytes, place: str, number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:  # or bytes that are no text
        raise RequestError(f"{place}: no JSON: {error}") from None
    return _record(record, place, number)


def _record(record: Any, place: str, number: int) -> Record:
    if not isinstance(record, Mapping):
        raise RequestError(f'{place}: must be an object with a "prompt", got {_short(record)}')
    prompt = record.get("prompt")
    ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if not prompt or not (isinstance(prompt, str) or ids):
        raise RequestError(f'{place}: "prompt" must be text or a list of token ids, not empty, got {_short(prompt)}')
    for name in RESERVED:
        if name in record:
            raise RequestError(f'{place}: "{name}" is reserved for what is generated, it cannot be a field of a prompt')
    return {"id": number, **record}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def check_records(model: ZayaForCausalLM, records: Iterable[Mapping[str, Any]]) -> list[Record]:
    """The records with ids, looked at before any time goes into generating. Raises RequestError."""
    checked = [_record(record, f"record {number}", number) for number, record in enumerate(records, 1)]
    if not checked:
        raise RequestError("records must hold a prompt, got none")
    for record in checked:
        try:
            json.dumps(record)
            model.encode(record["prompt"])
        except (TypeError, ValueError) as error:
            raise RequestError(f"prompt {record['id']!r}: {error}") from None
    return checked
