import io
import itertools
import random
import re
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from blockdraft.generate import StreamEvent
from blockdraft.live import DIM, RESET, STRUCK, LiveView, PlainView, has_terminal, lay_out, make_view

COLUMNS = 20


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte: every character beyond ASCII spans several tokens."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Screen(io.StringIO):
    """A terminal of COLUMNS columns that knows the sequences LiveView uses; keeps the style of each cell."""

    def __init__(self):
        super().__init__()
        self.cells, self.row, self.column, self.style = {}, 0, 0, ""

    def isatty(self):
        return True

    def write(self, text):
        for escape, character in re.findall(r"\x1b\[([\d;]*[A-Za-z])|(.)", text, re.DOTALL):
            self._escape(escape) if escape else self._put(character)
        return super().write(text)

    def _escape(self, escape):
        count, command = int(escape[:-1] or 1) if escape[-1] in "AC" else 0, escape[-1]
        if command == "A":
            self.row -= count
            assert self.row >= 0
        elif command == "C":
            self.column = min(self.column + count, COLUMNS - 1)
        elif command == "J":
            here = (self.row, self.column)
            self.cells = {place: cell for place, cell in self.cells.items() if place < here}
        else:
            self.style = "" if escape == "0m" else f"\x1b[{escape}"

    def _put(self, character):
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0
        else:
            assert self.column < COLUMNS - 1, "the last column is left free"
            self.cells[self.row, self.column] = (character, self.style)
            self.column += 2 if unicodedata.east_asian_width(character) == "W" else 1

    def rows(self, style=None):
        """Text per row; with a style, only the cells that have it."""
        shown = {place: c for place, (c, s) in sorted(self.cells.items()) if style is None or s == style}
        last = max((row for row, _ in shown), default=-1)
        return ["".join(c for (r, _), c in shown.items() if r == row) for row in range(last + 1)]


def make_event(kind="verify", drafted=(), accepted=0, token_ids=(), text="", provisional=()):
    return StreamEvent(0, 0, kind, tuple(drafted), accepted, tuple(token_ids), text, tuple(provisional))


def live_view(screen, tokenizer):
    return LiveView(screen, tokenizer, columns=lambda: COLUMNS)


def test_draft_is_dim_then_solid_or_struck(tokenizer):
    screen = Screen()
    view, ids = live_view(screen, tokenizer), lambda text: tokenizer.encode(text).ids
    view.start("def ")
    view.event(make_event("prefill", token_ids=ids("f"), text="f", provisional=ids("(x):")))
    assert (screen.rows(""), screen.rows(DIM)) == (["def f"], ["(x):"])
    view.event(make_event(drafted=ids("(x):"), accepted=2, token_ids=ids("(x,"), text="(x,"))
    assert (screen.rows(""), screen.rows(STRUCK), screen.rows(DIM)) == (["def f(x,"], ["):"], [])
    view.event(make_event("draft", token_ids=ids(" "), text=" ", provisional=ids("y):")))
    assert (screen.rows(""), screen.rows(STRUCK), screen.rows(DIM)) == (["def f(x, "], [], ["y):"])
    view.finish()
    assert screen.rows() == ["def f(x, "]


def test_final_text_survives_any_tail(tokenizer):
    """Random tails with line breaks, wide characters and wrapped lines: what stays is the final text, laid out."""
    rng = random.Random(5)
    alphabet = "ab \n\t=é漢"
    for _ in range(30):
        screen, final = Screen(), ""
        view = live_view(screen, tokenizer)
        view.start("")
        for _ in range(12):
            new, drafts = ("".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(2))
            final += new
            tokens = tokenizer.encode(new).ids
            view.event(make_event(token_ids=tokens, text=new, provisional=tokenizer.encode(drafts).ids))
        view.finish()
        expected = lay_out(final, 0, COLUMNS)[0].rstrip("\n").split("\n")
        assert screen.rows() == screen.rows("") == (expected if final.strip("\n") else [])


def test_half_a_character_is_not_shown(tokenizer):
    view = live_view(Screen(), tokenizer)
    first, second = tokenizer.encode("é").ids
    assert view.decode_after_context([first]) == ""
    assert view.decode_after_context([first, second]) == "é"
    view.context = [first]
    assert view.decode_after_context([second, first]) == "é"


def test_long_draft_is_cut(tokenizer):
    screen = Screen()
    view = live_view(screen, tokenizer)
    view.start("x")
    view.event(make_event("draft", provisional=tokenizer.encode("a\n" * 50).ids))
    assert len(screen.rows()) <= 10
    view.finish()
    assert screen.rows() == ["x"]


def test_escape_sequences_of_the_model_stay_text():
    assert "\x1b" not in lay_out("\x1b[2Jgone", 0, COLUMNS)[0]


@pytest.mark.parametrize("column", [0, 5, 18])
def test_layout_leaves_the_last_column_free(column):
    text, end = lay_out("x" * 50, column, COLUMNS)
    lengths = [len(line) for line in text.split("\n")]
    assert max([column + lengths[0], *lengths[1:]]) == COLUMNS - 1
    assert end == lengths[-1]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_when_there_is_a_terminal(environ, expected):
    assert has_terminal(Screen(), environ) is expected
    assert not has_terminal(io.StringIO(), environ)


def test_plain_output_in_a_pipe(tokenizer):
    pipe = io.StringIO()
    view = make_view(pipe, tokenizer)
    assert isinstance(view, PlainView)
    view.start("def ")
    for text in itertools.chain("f(x)"):
        view.event(make_event(text=text, provisional=[1, 2]))
    view.finish()
    assert pipe.getvalue() == "def f(x)\n"
    assert RESET not in pipe.getvalue()
