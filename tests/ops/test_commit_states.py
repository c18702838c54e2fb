from typing import Any

import torch
from torch import Tensor

import blockdraft
from ops.helpers import (
    assert_compiles_once,
    assert_raises,
    copies,
    dtypes,
    each_malformed_tensor,
    each_size,
    each_wrong_call,
    opcheck,
    same_bits,
    threads,
    untouched,
)


def int32(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


def make_call(L: int, T: int, B: int, S: int, C: int, delayed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random rows, parents and slots; about one sequence in five is left as it is."""
    commit_rows = torch.randint(T, (B,)) if T else torch.full((B,), -1)
    return {
        "qkv": torch.randn(L, T, C + 2 * delayed).to(dtype),
        "row_parents": int32([int(torch.randint(-1, max(1, t), ())) for t in range(T)]),
        "commit_rows": int32(torch.where(torch.rand(B) < 0.2, -1, commit_rows)),
        "state_slots": int32(torch.randperm(S)[:B]),
        "conv_states": torch.randn(L, S, 2, C).to(dtype),
        "recurrent_states": torch.randn(L, S, delayed).to(dtype),
    }


def states_after(op: Any, call: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    own = copies(call)
    assert op(**own) is None
    for name in ("qkv", "row_parents", "commit_rows", "state_slots"):
        assert same_bits(own[name], call[name])
    return own["conv_states"], own["recurrent_states"]


@dtypes
@each_size(
    "L T B S C delayed",
    (0, 4, 2, 3, 8, 2),
    (2, 0, 2, 3, 8, 2),
    (2, 4, 0, 3, 8, 2),
    (1, 1, 1, 1, 1, 1),
    (3, 31, 5, 9, 33, 7),
    (40, 64, 16, 17, 48, 16),
    (2, 50, 100, 100, 1280, 128),
)
def test_matches_reference(backend, L, T, B, S, C, delayed, dtype):
    call = make_call(L, T, B, S, C, delayed, dtype)
    ours = states_after(backend.op("commit_states"), call)
    expected = states_after(blockdraft.reference.commit_states, call)
    assert all(same_bits(a, b) for a, b in zip(ours, expected, strict=True))


@dtypes
def test_columns(backend, dtype):
    """Row 2 with parent 1, row 0 with the committed state as its parent, and a sequence that is left as it is."""
    call = make_call(2, 3, 3, 5, 6, 2, dtype)
    call |= {"row_parents": int32([-1, 0, 1]), "commit_rows": int32([2, 0, -1]), "state_slots": int32([4, 1, 0])}
    qkv, before = call["qkv"], call["conv_states"]
    conv, recurrent = states_after(backend.op("commit_states"), call)
    assert same_bits(conv[:, 4], qkv[:, [1, 2], :6])
    assert same_bits(recurrent[:, 4], qkv[:, 2, 8:])
    assert same_bits(conv[:, 1], torch.stack([before[:, 1, 1], qkv[:, 0, :6]], 1))
    assert same_bits(recurrent[:, 1], qkv[:, 0, 8:])
    assert same_bits(conv[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert same_bits(recurrent[:, [0, 2, 3]], call["recurrent_states"][:, [0, 2, 3]])


@dtypes
def test_commit_twice_equals_commit_of_both(backend, dtype):
    """Row by row with the state as parent, or two rows at once: the second row's state is the same."""
    call = make_call(2, 2, 1, 3, 6, 2, dtype) | {"state_slots": int32([1])}
    op = backend.op("commit_states")
    both = states_after(op, call | {"row_parents": int32([-1, 0]), "commit_rows": int32([1])})
    one_by_one = copies(call) | {"row_parents": int32([-1, -1])}
    for row in (0, 1):
        op(**(one_by_one | {"commit_rows": int32([row])}))
    assert same_bits(both[0], one_by_one["conv_states"])
    assert same_bits(both[1], one_by_one["recurrent_states"])


@dtypes
def test_nan_stays_in_its_slot(backend, dtype):
    """NaN in rows that are not committed, in a committed row and in another slot: moved as bits, and nowhere else."""
    call = make_call(3, 9, 3, 5, 6, 2, dtype)
    call |= {"row_parents": int32([-1] * 9), "commit_rows": int32([1, 4, -1]), "state_slots": int32([0, 1, 2])}
    clean = states_after(backend.op("commit_states"), call)
    call["qkv"][:, [0, 4, 8]], call["conv_states"][:, 3] = torch.nan, torch.nan
    for ours, expected in zip(states_after(backend.op("commit_states"), call), clean, strict=True):
        assert same_bits(ours[:, [0, 2, 4]], expected[:, [0, 2, 4]])
    assert states_after(backend.op("commit_states"), call)[1][:, 1].isnan().all()


@dtypes
def test_invariance(backend, dtype):
    """A sequence alone, beside others, in any order, with one thread and with two."""
    call = make_call(4, 64, 64, 80, 40, 8, dtype)
    op = backend.op("commit_states")
    together = states_after(op, call)
    alone = copies(call)
    for b in range(64):
        op(**(alone | {name: call[name][b : b + 1] for name in ("commit_rows", "state_slots")}))
    assert same_bits(together[0], alone["conv_states"])
    assert same_bits(together[1], alone["recurrent_states"])
    for count in (1, 2):
        order = torch.randperm(64)
        with threads(count):
            shuffled = states_after(op, call | {name: call[name][order] for name in ("commit_rows", "state_slots")})
        assert all(same_bits(a, b) for a, b in zip(shuffled, together, strict=True))


def small_call(dtype: torch.dtype = torch.float32, T: int = 4, B: int = 2) -> dict[str, Tensor]:
    return make_call(2, T, B, 30, 6, 2, dtype)


@each_malformed_tensor("commit_states")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "commit_states", small_call(), changes, message)


@each_wrong_call(
    {
        "float64": ({"qkv": Tensor.double}, "qkv must be Float or BFloat16, got Double"),
        "mixed": ({"conv_states": Tensor.bfloat16}, "conv_states must be Float, got BFloat16"),
        "recurrent-bfloat16": ({"recurrent_states": Tensor.bfloat16}, "recurrent_states must be Float, got BFloat16"),
        "parents": ({"row_parents": int32([-1])}, r"row_parents must be \[T=4\], got \[1\]"),
        "slots": ({"state_slots": int32([1])}, r"state_slots must be \[B=2\], got \[1\]"),
        "layers": ({"conv_states": lambda t: t[:1]}, r"conv_states must be \[L=2, .*\], got \[1, 30, 2, 6\]"),
        "taps": ({"conv_states": torch.zeros(2, 30, 3, 6)}, r"conv_states must be .*, got \[2, 30, 3, 6\]"),
        "S": ({"recurrent_states": torch.zeros(2, 29, 2)}, r"recurrent_states must be \[.*=30, .*\], got \[2, 29, 2\]"),
        "width": ({"qkv": torch.zeros(2, 4, 11)}, "columns of qkv must be 10, got 11"),
        "delayed": ({"recurrent_states": torch.zeros(2, 30, 3)}, "columns of qkv must be 12, got 10"),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "commit_states", small_call(), changes, message)


@each_wrong_call(
    {
        "parent-2": ({"row_parents": int32([-1, 0, -2, 0])}, r"row_parents must be in \[-1, 3\], got -2 at 2"),
        "parent-T": ({"row_parents": int32([-1, 0, 4, 0])}, r"row_parents must be in \[-1, 3\], got 4 at 2"),
        "row-2": ({"commit_rows": int32([0, -2])}, r"commit_rows must be in \[-1, 3\], got -2 at 1"),
        "row-T": ({"commit_rows": int32([4, 0])}, r"commit_rows must be in \[-1, 3\], got 4 at 0"),
        "slot-1": ({"state_slots": int32([-1, 0])}, r"state_slots must be in \[0, 29\], got -1 at 0"),
        "slot-S": ({"state_slots": int32([0, 30])}, r"state_slots must be in \[0, 29\], got 30 at 1"),
    }
)
def test_index_errors(cpu, changes, message):
    assert_raises(cpu, "commit_states", small_call(), changes, message)


@dtypes
def test_gpu_leaves_sequences_with_indices_out_of_range(gpu, dtype):
    """Rows, slots and parents below and above; the last sequence is committed."""
    call = make_call(2, 6, 12, 30, 6, 2, dtype)
    parents, least, most = [-2, 6, 2**31 - 1, -(2**31), 0, -1], -(2**31), 2**31 - 1
    rows, slots = [-2, 6, least, most, 5, 5, 5, 5, 0, 1, 2, 4], [0, 1, 2, 3, -1, 30, least, most, 8, 9, 10, 11]
    call |= {"row_parents": int32(parents), "commit_rows": int32(rows), "state_slots": int32(slots)}
    expected = copies(call)
    last = {"row_parents": int32([0] * 6), "commit_rows": int32([4]), "state_slots": int32([11])}
    blockdraft.reference.commit_states(**(expected | last))
    for name, x in zip(("conv_states", "recurrent_states"), states_after(gpu.op("commit_states"), call), strict=True):
        assert same_bits(x, expected[name])


def test_rows_and_slots_beyond_32_bits(backend):
    """Layers, rows and states of more than 2^31 elements, which are never touched but at the end."""
    L, T, S, C, delayed = 2, 2**18, 2**16 + 8, 2**13, 32
    qkv = untouched(L, T, C + 2 * delayed, dtype=torch.bfloat16)
    conv, recurrent = untouched(L, S, 2, C, dtype=torch.bfloat16), untouched(L, S, delayed, dtype=torch.bfloat16)
    qkv[1, -2:] = torch.randn(2, C + 2 * delayed)
    parents = torch.arange(-1, T - 1, dtype=torch.int32)
    backend.op("commit_states")(qkv, parents, int32([T - 1]), int32([S - 1]), conv, recurrent)
    assert same_bits(conv[1, -1], qkv[1, -2:, :C])
    assert same_bits(recurrent[1, -1], qkv[1, -1, -delayed:])


@dtypes
def test_opcheck(dtype):
    opcheck("commit_states", small_call(dtype))


def test_compiles_once_for_all_sizes():
    assert_compiles_once("commit_states", small_call(T=33, B=5), small_call(T=50, B=9))
