"""Reading a model folder that may be hostile: only regular files inside it, only plain JSON."""

import io
import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
MAX_JSON_DEPTH = 16
# The closing quote is optional, so that an unterminated string is consumed once: without that the scan is quadratic.
STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


class UnusableFile(Exception):
    """Why a file cannot be used. The caller knows which file it is and raises the error that users see."""


def open_regular(folder: Path, name: str) -> io.FileIO:
    """Opens a regular file of the folder for reading.

    Raises:
        UnusableFile: The name is a path, the file is absent, unreadable, not regular, or a link out of the folder.
    """
    if not PLAIN_NAME.fullmatch(name):
        raise UnusableFile("not a plain file name")
    try:
        path = (folder / name).resolve(strict=True)
        if not any(path.is_relative_to(root) for root in _roots(folder)):
            raise UnusableFile("links to a file outside the model folder")
        # O_NONBLOCK: opening a FIFO must fail below, not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise UnusableFile(getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnusableFile("not a regular file")
    return io.FileIO(descriptor)


def _roots(folder: Path) -> list[Path]:
    """Where the files may lie: a snapshot of the Hugging Face cache is a folder of links to ../../blobs."""
    real = folder.resolve()
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]


def read_into(file: io.FileIO, buffer: memoryview, offset: int) -> None:
    """Fills the buffer from the file at an offset.

    Raises:
        UnusableFile: The file ends before the buffer is full, or reading fails.
    """
    done = 0
    while done < len(buffer):  # Linux reads at most 2 GiB - 4 KiB at a time
        try:
            count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
        except OSError as error:
            raise UnusableFile(error.strerror or str(error)) from error
        if count == 0:
            raise UnusableFile(f"the file ends before byte {offset + len(buffer)}")
        done += count


def read_bytes(file: io.FileIO, offset: int, size: int) -> bytearray:
    data = bytearray(size)
    read_into(file, memoryview(data), offset)
    return data


def read_json(folder: Path, name: str, max_bytes: int) -> Any:
    """Parses a JSON file of the folder.

    Raises:
        UnusableFile: As for open_regular; larger than max_bytes; or not the JSON that parse_json takes.
    """
    with open_regular(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UnusableFile(f"{size} bytes, at most {max_bytes} are read")
        return parse_json(read_bytes(file, 0, size))


def parse_json(data: bytes | bytearray) -> Any:
    """Parses JSON as RFC 8259 has it: UTF-8 without a byte order mark, no NaN, no name twice, little depth.

    Raises:
        UnusableFile: The text is anything else.
    """
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UnusableFile(f"not valid JSON: {error}") from error


def _check_depth(text: str) -> None:
    depth = 0
    for token in STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(name)} occurs {times} times")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def shown(value: object) -> str:
    """The value for a message: ASCII and short, whatever it is."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
