"""Generated text as it appears: drafted dim, accepted solid, rejected struck through."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from shutil import get_terminal_size
from time import sleep
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from blockdraft.generate import StreamEvent

RESET = "\x1b[0m"
DIM = "\x1b[2m"
STRUCK = "\x1b[2;9;31m"
_TAB = 8
_CONTEXT = 16  # final tokens before a draft that are decoded with it
_TAIL_ROWS = 8  # a longer draft is cut off: what has scrolled away cannot be redrawn


class View(Protocol):
    """Where a sample's text goes: first the prompt, then each event."""

    def start(self, prompt: str) -> None: ...
    def event(self, event: "StreamEvent") -> None: ...
    def finish(self) -> None: ...


def has_terminal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether escape sequences are welcome (https://no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM", "") not in ("", "dumb")


def make_view(stream: TextIO, tokenizer: "Tokenizer | None", frame_seconds: float = 0.0) -> View:
    """A live view in a terminal, plain text elsewhere. A frame stays at least frame_seconds in a terminal."""
    if tokenizer is None or not has_terminal(stream):
        return PlainView(stream)
    return LiveView(stream, tokenizer, frame_seconds)


class PlainView:
    """Final text only, in order."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def start(self, prompt: str) -> None:
        self._write(prompt)

    def event(self, event: "StreamEvent") -> None:
        self._write(event.text)

    def finish(self) -> None:
        self._write("\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def _width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def lay_out(text: str, column: int, columns: int) -> tuple[str, int]:
    """Text with tabs, line breaks and control characters made explicit, and the column after it.

    Lines break one column early: a terminal whose last column is filled disagrees with others on where its cursor is.
    """
    out: list[str] = []
    for character in text:
        if character == "\n":
            out.append("\n")
            column = 0
            continue
        if character == "\t":
            character = " " * (_TAB - column % _TAB)
        elif unicodedata.category(character) == "Cc":
            character = "\ufffd"  # an escape sequence in a model's output stays text
        width = sum(map(_width, character))
        if column + width >= columns:
            out.append("\n")
            column = 0
        out.append(character)
        column += width
    return "".join(out), column


class LiveView:
    """Final text is written once; the tail after it, drafts or what was rejected, is redrawn at each event.

    All cursor movement is relative to the end of the final text, so that a scrolling terminal does no harm.
    """

    def __init__(
        self,
        stream: TextIO,
        tokenizer: "Tokenizer",
        frame_seconds: float = 0.0,
        columns: Callable[[], int] = lambda: get_terminal_size().columns,
    ) -> None:
        self.stream, self.tokenizer, self.frame_seconds, self.columns = stream, tokenizer, frame_seconds, columns
        self.column = 0  # where the final text ends
        self.tail_rows = 0  # rows below it that the tail takes
        self.context: list[int] = []  # the last final tokens

    def start(self, prompt: str) -> None:
        self._write(self._final(prompt))
        self.context = self.tokenizer.encode(prompt, add_special_tokens=False).ids[-_CONTEXT:]

    def event(self, event: "StreamEvent") -> None:
        frame = self._erase_tail() + self._final(event.text)
        self.context = [*self.context, *event.token_ids][-_CONTEXT:]
        rejected = event.drafted[event.accepted :] if event.kind == "verify" else ()
        frame += self._tail([(STRUCK, rejected), (DIM, event.provisional)])
        self._write(frame)
        if self.frame_seconds and (rejected or event.provisional):
            sleep(self.frame_seconds)

    def finish(self) -> None:
        self._write(self._erase_tail() + "\n")
        self.column, self.context = 0, []

    def decode_after_context(self, tokens: Sequence[int]) -> str:
        """Text of tokens that follow the final ones; bytes of an unfinished character are left out."""
        before = self.tokenizer.decode(self.context).rstrip("\ufffd")
        return self.tokenizer.decode([*self.context, *tokens])[len(before) :].rstrip("\ufffd")

    def _final(self, text: str) -> str:
        laid_out, self.column = lay_out(text, self.column, self.columns())
        return laid_out

    def _tail(self, parts: Iterable[tuple[str, Sequence[int]]]) -> str:
        """Draws each part in its style and leaves the cursor at its end; remembers the rows for _erase_tail."""
        frame, column = "", self.column
        for style, tokens in parts:
            text, column = lay_out(self.decode_after_context(tokens) if tokens else "", column, self.columns())
            room = _TAIL_ROWS - self.tail_rows
            text = "\n".join(text.split("\n")[: room + 1])
            self.tail_rows += text.count("\n")
            frame += f"{style}{text}{RESET}" if text else ""
        return frame

    def _erase_tail(self) -> str:
        up = f"\x1b[{self.tail_rows}A" if self.tail_rows else ""
        right = f"\x1b[{self.column}C" if self.column else ""
        self.tail_rows = 0
        return f"{up}\r{right}\x1b[J"

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
