"""The indexed n-gram drafter against the plain one, which searches the text."""

import random
import sys
from pathlib import Path

import pytest

from blockdraft import RequestError, SamplingParams
from blockdraft.ngram import NgramDrafter
from blockdraft.processors import Processors
from blockdraft.sample import Sample

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "nano"))
drafters = pytest.importorskip("drafters")

LENGTHS = [(8, 2), (1, 1), (3, 3), (5, 1), (40, 2)]  # longest, shortest


def random_text(rng: random.Random, alphabet: int, length: int) -> list[int]:
    """Random tokens, among them copies of what came before."""
    text: list[int] = []
    while len(text) < length:
        start, size = rng.randrange(len(text) + 1), rng.randint(1, 20)
        copied = text[start : start + size] if rng.random() < 0.4 else []
        text += copied or [rng.randrange(alphabet) for _ in range(rng.randint(1, 5))]
    return text[:length]


@pytest.mark.parametrize(("longest", "shortest"), LENGTHS)
@pytest.mark.parametrize("alphabet", [1, 2, 3, 10, 1000])
def test_equals_search(longest, shortest, alphabet):
    """After every token: the same drafts, also where they run into the end of the text."""
    rng = random.Random(alphabet)
    for _ in range(6):
        text, drafter = random_text(rng, alphabet, rng.randint(1, 90)), NgramDrafter(longest, shortest)
        for end, token in enumerate(text):
            drafter.extend([token])
            for count in (1, 4, 15):
                expected = drafters.ngram_drafter(text[: end + 1], count, longest, shortest)
                assert drafter.draft(count) == expected, f"{text[: end + 1]}, count {count}"


def longest_repeated_ending(text: list[int], longest: int, shortest: int) -> int:
    """Its length; 0 where none of the lengths looked for occurred before."""
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        if any(text[i : i + n] == text[-n:] for i in range(len(text) - n)):
            return n
    return 0


@pytest.mark.parametrize(("longest", "shortest"), LENGTHS)
@pytest.mark.parametrize("alphabet", [1, 2, 3, 10])
def test_matched(longest, shortest, alphabet):
    """The longest repeated ending, or one more with every guess that held."""
    rng = random.Random(alphabet)
    text, drafter, run = random_text(rng, alphabet, 120), NgramDrafter(longest, shortest), 0
    for end, token in enumerate(text):
        foreseen, guess = drafter.matched, drafter.draft(1)
        assert bool(guess) == (foreseen > 0)
        assert drafter.follow(token) == (foreseen, guess == [token])
        run = run + 1 if guess == [token] else 0
        run = max(run, longest_repeated_ending(text[: end + 1], longest, shortest))
        assert drafter.matched == run, f"{text[: end + 1]}"


def test_pieces_do_not_matter():
    text = random_text(random.Random(0), 3, 200)
    whole, pieces = NgramDrafter(), NgramDrafter()
    whole.extend(text)
    for start in range(0, 200, 7):
        pieces.extend(text[start : start + 7])
        pieces.draft(15)  # asking changes nothing
    assert (whole.entries, whole.matched) == (pieces.entries, pieces.matched)
    assert whole.draft(15) == pieces.draft(15)


def test_a_sample_that_rests_misses_nothing():
    """Tokens decided while the text is not followed are in the index when it is again."""
    text = random_text(random.Random(1), 3, 120)
    rested, followed = (
        Sample(text[:20], SamplingParams(drafter="ngram"), 0, 0, None, Processors(), frozenset()) for _ in range(2)
    )
    followed.follow(True)
    for i, token in enumerate(text[20:]):
        rested.follow(i % 30 < 10)
        rested.append(token)
        followed.append(token)
    rested.follow(True)
    assert rested.ngram.draft(15) == followed.ngram.draft(15) != []
    assert rested.ngram.entries == followed.ngram.entries
    assert 0 < len(rested.guesses) < len(followed.guesses) == 100


def test_latest_occurrence_of_the_longest_ending():
    drafter = NgramDrafter()
    drafter.extend([1, 2, 3, 50, 9, 2, 3, 60, 7, 2, 3, 70, 1, 2, 3])
    assert drafter.draft(2) == [50, 9]  # [1, 2, 3] is longer than [2, 3], whose latest occurrence precedes 70
    drafter.extend([50, 8, 2, 3])
    assert drafter.draft(1) == [50]


@pytest.mark.parametrize("text", [[], [5], [5, 5], [1, 2, 3, 4]])
def test_nothing_to_find(text):
    drafter = NgramDrafter()
    drafter.extend(text)
    assert drafter.draft(15) == []


def test_no_count():
    drafter = NgramDrafter()
    drafter.extend([1, 2, 3, 1, 2])
    assert drafter.draft(0) == []
    assert drafter.draft(1) == [3]


def test_index_stays_small():
    """The promise about memory: an entry a token where nothing recurs, 4 in any case. All n-grams: 7 and 5.6."""
    rng, unique, recurring = random.Random(0), NgramDrafter(), NgramDrafter()
    unique.extend(range(1000))
    text = [rng.randrange(12) for _ in range(1980)]
    recurring.extend(text + text[:20])
    assert unique.entries == 999  # 2-grams
    assert 999 < recurring.entries <= 4 * 2000
    for index, tokens in ((unique, 1000), (recurring, 2000)):  # half of the slots taken at most, a quarter at least
        assert 16 * index.entries <= index.bytes <= 32 * index.entries + 8 * tokens


@pytest.mark.parametrize(("longest", "shortest"), [(8, 0), (2, 3), (0, 0), (8, -1)])
def test_lengths_that_are_refused(longest, shortest):
    with pytest.raises(RequestError, match=f"1 <= shortest <= longest, got {shortest} and {longest}"):
        NgramDrafter(longest, shortest)


def test_count_that_is_refused():
    with pytest.raises(RequestError, match="count must be at least 0, got -1"):
        NgramDrafter().draft(-1)
