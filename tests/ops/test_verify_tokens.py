from typing import Any

import pytest
import torch
from torch import Tensor

import blockdraft
from ops.helpers import (
    assert_batch_invariant,
    assert_compiles_once,
    assert_raises,
    each_malformed_tensor,
    each_wrong_call,
    opcheck,
)

NAMES = ("accepted", "committed", "commit_rows", "next_tokens")


def int32(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


def make_call(sequences: list[tuple[list[int], list[int], int, int]]) -> dict[str, Tensor]:
    """Each sequence: the tokens of its rows, the choices after them, how many of the rows are verified, the limit."""
    tokens, chosen, lengths, limits = zip(*sequences, strict=True) if sequences else ([],) * 4
    return {
        "token_ids": int32(sum(tokens, [])),
        "chosen": int32(sum(chosen, [])),
        "cu_rows": int32([0, *(len(x) for x in tokens)]).cumsum(0).int(),
        "verify_lengths": int32(lengths),
        "limits": int32(limits),
    }


def random_sequence(most_rows: int = 17) -> tuple[list[int], list[int], int, int]:
    """Two token ids, so that runs of agreement are long; rows past the verified ones (mask groups) have any choice."""
    rows = int(torch.randint(1, most_rows + 1, ()))
    length = int(torch.randint(1, rows + 1, ()))
    agreement = torch.rand(rows) < torch.rand(())
    tokens = torch.randint(2, (rows,))
    chosen = torch.where(agreement, tokens.roll(-1), 1 - tokens.roll(-1))
    chosen[length:] = torch.randint(-(2**31), 2**31, (rows - length,))
    return tokens.tolist(), chosen.tolist(), length, int(torch.randint(-1, most_rows + 2, ()))


@pytest.mark.parametrize(
    ("tokens", "chosen", "length", "limit", "expected"),
    [
        ([7, 1, 2, 3], [1, 2, 9, 5], 4, 99, (2, 3, 2, 9)),
        ([7, 1, 2, 3], [1, 2, 3, 5], 4, 99, (3, 4, 3, 5)),
        ([7, 1, 2, 3], [8, 2, 3, 5], 4, 99, (0, 1, 0, 8)),
        ([7, 1, 2, 3], [1, 8, 3, 5], 4, 99, (1, 2, 1, 8)),  # agreement after a rejection does not count
        ([7], [1], 1, 99, (0, 1, 0, 1)),
        ([7, 1, 2, 3], [1, 2, 3, 5], 2, 99, (1, 2, 1, 2)),  # rows past the length are not drafts
        ([7, 1, 2, 3], [1, 2, 3, 5], 4, 4, (3, 4, 3, 5)),
        ([7, 1, 2, 3], [1, 2, 3, 5], 4, 3, (3, 3, 2, 3)),
        ([7, 1, 2, 3], [1, 2, 3, 5], 4, 1, (3, 1, 0, 1)),
        ([7, 1, 2, 3], [1, 2, 3, 5], 4, 0, (3, 0, -1, -1)),
        ([7, 1, 2, 3], [1, 2, 3, 5], 4, -1, (3, 0, -1, -1)),
        ([0, 2**31 - 1], [2**31 - 1, 6], 2, 2**31 - 1, (1, 2, 1, 6)),
    ],
    ids=[
        "two",
        "all",
        "none",
        "gap",
        "no-drafts",
        "short",
        "limit-all",
        "limit3",
        "limit1",
        "limit0",
        "limit-1",
        "largest",
    ],
)
def test_examples(backend, tokens, chosen, length, limit, expected):
    """Second of two sequences, so that rows are counted from the start of the call."""
    results = backend.op("verify_tokens")(**make_call([([4, 4], [4, 4], 2, 2), (tokens, chosen, length, limit)]))
    accepted, committed, row, token = expected
    assert [int(x[1]) for x in results] == [accepted, committed, row + 2 if committed else -1, token]
    assert [int(x[0]) for x in results] == [1, 2, 1, 4]


@pytest.mark.parametrize("B", [0, 1, 2, 33, 600])
def test_matches_reference(backend, B):
    call = make_call([random_sequence() for _ in range(B)])
    results = backend.op("verify_tokens")(**call)
    for name, ours, expected in zip(NAMES, results, blockdraft.reference.verify_tokens(**call), strict=True):
        assert ours.dtype == torch.int32, name
        assert torch.equal(ours, expected), name
    if B == 600:
        assert set(results[0].tolist()) >= set(range(7)), "long runs of agreement are among the cases"


def test_batch_invariance(backend):
    sequences = [random_sequence() for _ in range(64)]

    def run(indices: Tensor) -> tuple[Tensor, ...]:
        call = make_call([sequences[b] for b in indices.tolist()])
        accepted, committed, rows, tokens = backend.op("verify_tokens")(**call)
        return accepted, committed, torch.where(rows >= 0, rows - call["cu_rows"][:-1], rows), tokens

    assert_batch_invariant(run)


SMALL = [([1, 2, 3], [2, 3, 4], 3, 9), ([5, 6], [6, 7], 2, 9)]


@each_malformed_tensor("verify_tokens")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "verify_tokens", make_call(SMALL), changes, message)


@each_wrong_call(
    {
        "int64": ({"token_ids": Tensor.long}, "token_ids must be Int, got Long"),
        "chosen": ({"chosen": int32([1])}, r"chosen must be \[T=5\], got \[1\]"),
        "cu-rows": ({"cu_rows": int32([0, 5])}, r"cu_rows must be \[B \+ 1=3\], got \[2\]"),
        "lengths": ({"verify_lengths": int32([1])}, r"cu_rows must be \[B \+ 1=2\], got \[3\]"),
        "limits": ({"limits": int32([1])}, r"limits must be \[B=2\], got \[1\]"),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "verify_tokens", make_call(SMALL), changes, message)


@each_wrong_call(
    {
        "length-1": ({"verify_lengths": int32([3, -1])}, r"verify_lengths must be in \[0, 2\], got -1 at 1"),
        "length-long": ({"verify_lengths": int32([4, 2])}, r"verify_lengths must be in \[0, 3\], got 4 at 0"),
        "rows-1": ({"cu_rows": int32([-1, 3, 5])}, r"cu_rows must be in \[0, 5\], got -1 at 0"),
        "rows-T": ({"cu_rows": int32([0, 3, 6])}, r"cu_rows must be in \[0, 5\], got 6 at 2"),
        "rows-order": ({"cu_rows": int32([0, 5, 3])}, r"verify_lengths must be in \[0, -2\], got 2 at 1"),
        "no-rows": ({"cu_rows": int32([0, 0, 5])}, r"verify_lengths must be in \[0, 0\], got 3 at 0"),
    }
)
def test_index_errors(cpu, changes, message):
    assert_raises(cpu, "verify_tokens", make_call(SMALL), changes, message)


def test_length_that_wraps(cpu):
    changes = {"verify_lengths": int32([3, 2**31 - 1])}
    message = r"verify_lengths must be in \[0, 2\], got 2147483647 at 1"
    assert_raises(cpu, "verify_tokens", make_call(SMALL), changes, message)


OUT_OF_RANGE = {
    "length-1": {"verify_lengths": int32([-1, 2])},
    "length-least": {"verify_lengths": int32([-(2**31), 2])},
    "length-long": {"verify_lengths": int32([4, 2])},
    "length-largest": {"verify_lengths": int32([2**31 - 1, 2])},
    "rows-1": {"cu_rows": int32([-1, 3, 5])},
    "rows-least": {"cu_rows": int32([-(2**31), 3, 5]), "verify_lengths": int32([2**31 - 1, 2])},
    "rows-T": {"cu_rows": int32([3, 6, 5]), "verify_lengths": int32([3, 0])},
    "rows-order": {"cu_rows": int32([4, 3, 5])},
}


@pytest.mark.parametrize("changes", OUT_OF_RANGE.values(), ids=list(OUT_OF_RANGE))
def test_gpu_keeps_nothing_of_rows_out_of_range(gpu, changes):
    call = make_call(SMALL) | changes
    results = gpu.op("verify_tokens")(**call)
    assert [int(x[0]) for x in results] == [0, 0, -1, -1]
    if call["verify_lengths"][1]:
        assert [int(x[1]) for x in results] == [1, 2, 4, 7]


def test_opcheck():
    opcheck("verify_tokens", make_call(SMALL))


def test_compiles_once_for_all_sizes():
    first, then = (make_call([random_sequence() for _ in range(B)]) for B in (9, 20))
    assert_compiles_once("verify_tokens", first, then)
