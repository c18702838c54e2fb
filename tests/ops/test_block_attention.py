import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import blockdraft
from ops.helpers import (
    U32,
    assert_batch_invariant,
    assert_compiles_once,
    assert_no_worse_than_eager,
    assert_raises,
    assert_within,
    dtypes,
    each_malformed_tensor,
    each_size,
    each_wrong_call,
    opcheck,
    same_bits,
    threads,
    untouched,
)

NOWHERE = 2**31 - 1  # what the page table holds past a sequence's pages


def int32(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


@dataclass
class Row:
    sequence: int
    position: int
    q: Tensor  # [Hq, D]
    k: Tensor  # [Hkv, D]
    v: Tensor  # [Hkv, D]
    prefix: int
    group: Any = None  # rows with the same one see each other


@dataclass
class Cache:
    """Sequences with random keys in shuffled pages. What no sequence owns is NaN: the slots past its end, other pages,
    and the padding of the head dimension."""

    Hq: int
    Hkv: int
    D: int
    dtype: torch.dtype
    lengths: list[int]
    page_size: int = 32
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.keys, self.values = ([self.random(n, self.Hkv) for n in self.lengths] for _ in range(2))
        self.shuffle()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.D).to(self.dtype)

    def shuffle(self) -> None:
        """Other pages for everyone."""
        needed = [-(-n // self.page_size) for n in self.lengths]
        pages = torch.randperm(sum(needed) + 2)
        self.num_pages = len(pages)
        self.table = torch.full((len(needed), max(needed, default=0) + 1), NOWHERE, dtype=torch.int32)
        for b, own in enumerate(pages[: sum(needed)].split(needed)):
            self.table[b, : len(own)] = own

    def pages(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        width = -(-self.D // 32) * 32
        k = torch.full((self.num_pages * self.page_size, self.Hkv, self.D), torch.nan, dtype=dtype)
        v = torch.full((self.num_pages * self.page_size, self.Hkv, width), torch.nan, dtype=dtype)
        for b, n in enumerate(self.lengths):
            positions = torch.arange(n)
            slots = self.table[b].long()[positions // self.page_size] * self.page_size + positions % self.page_size
            k[slots] = self.keys[b].to(dtype)
            v[slots] = F.pad(self.values[b].to(dtype), (0, width - self.D), value=torch.nan)
        k, v = (x.view(self.num_pages, -1, 32, self.Hkv, x.shape[-1]).permute(0, 3, 1, 2, 4) for x in (k, v))
        pack = blockdraft.reference.pack_weight  # [N, Hkv, tiles, 32, D], for v transposed
        return tuple(pack(x.flatten(0, 2)).view(*x.shape[:3], -1) for x in (k, v.transpose(-1, -2)))

    def causal(self, sequence: int, positions: Any) -> list[Row]:
        """Rows whose own key is in the pages."""
        blank = torch.full((self.Hkv, self.D), torch.nan, dtype=self.dtype)
        return [Row(sequence, p, self.random(self.Hq), blank, blank, p + 1) for p in positions]

    def group(self, sequence: int, prefix: int, count: int) -> list[Row]:
        group = object()
        parts = [(self.random(self.Hq), self.random(self.Hkv), self.random(self.Hkv)) for _ in range(count)]
        return [Row(sequence, prefix + i, *parts[i], prefix, group) for i in range(count)]

    def call(self, rows: list[Row], sliding_window: int = 0, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Rows of one group must lie together."""
        rows = sorted(rows, key=lambda row: row.sequence)
        cu_rows = [sum(row.sequence < b for row in rows) for b in range(len(self.lengths) + 1)]
        groups = []
        for row in rows:
            own = [i for i, other in enumerate(rows) if row.group is not None and other.group is row.group]
            groups.append((own[0], own[-1] + 1) if own else (cu_rows[row.sequence],) * 2)
        dtype = dtype or self.dtype
        k_pages, v_pages = self.pages(dtype)
        return {
            "q": torch.cat([torch.empty(0, self.Hq, self.D), *(row.q[None] for row in rows)]).to(dtype),
            "k": torch.cat([torch.empty(0, self.Hkv, self.D), *(row.k[None] for row in rows)]).to(dtype),
            "v": torch.cat([torch.empty(0, self.Hkv, self.D), *(row.v[None] for row in rows)]).to(dtype),
            "k_pages": k_pages,
            "v_pages": v_pages,
            "page_table": self.table,
            "cu_rows": int32(cu_rows),
            "row_positions": int32([row.position for row in rows]),
            "row_prefix": int32([row.prefix for row in rows]),
            "row_group_begin": int32([begin for begin, _ in groups]),
            "row_group_end": int32([end for _, end in groups]),
            "softmax_scale": self.D**-0.5,
            "sliding_window": sliding_window,
        }


def assert_matches_float64(backend, cache: Cache, rows: list[Row], sliding_window: int = 0) -> None:
    call = cache.call(rows, sliding_window)
    out = backend.op("block_attention")(**call)
    assert out.dtype == cache.dtype
    exact = cache.call(rows, sliding_window, torch.float64)
    expected = blockdraft.reference.block_attention(**exact)

    # A weight is off by its score's error, by what the distance to the maximum loses, and by exp's own; twice for the
    # denominator. `largest` bounds |q| |k| by the lengths of the vectors, `size` is the mean of |v|.
    size = blockdraft.reference.block_attention(**(exact | {"v": exact["v"].abs(), "v_pages": exact["v_pages"].abs()}))
    longest = max(x.double().norm(dim=-1).nan_to_num().max() for x in [*cache.keys, call["k"]] if x.numel())
    largest = exact["softmax_scale"] * exact["q"].norm(dim=-1, keepdim=True) * longest
    c, keys = backend.sum_constant, max(cache.lengths) + len(rows)
    error = U32 * size * (2 * ((c * cache.D**0.5 + 4) * largest + 16) + c * keys**0.5)
    assert_within(out, expected, error)
    assert_no_worse_than_eager(out, blockdraft.reference.block_attention(**call), expected)


each_shape = each_size("Hq Hkv D", (1, 1, 2), (2, 2, 16), (3, 1, 34), (4, 2, 32), (8, 2, 128), (16, 1, 64), (2, 1, 256))
few_shapes = each_size("Hq Hkv D", (2, 2, 16), (4, 1, 34), (8, 2, 128))
page_sizes = pytest.mark.parametrize("page_size", [32, 64], ids=["page32", "page64"])

# Around tiles of 32 keys and chunks of 512.
LENGTHS = [1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 543, 544, 1023, 1024, 1025, 1100]


@dtypes
@page_sizes
@each_shape
def test_matches_float64_decoding(backend, Hq, Hkv, D, page_size, dtype):
    cache = Cache(Hq, Hkv, D, dtype, LENGTHS, page_size)
    assert_matches_float64(backend, cache, [row for b, n in enumerate(LENGTHS) for row in cache.causal(b, [n - 1])])


@dtypes
@page_sizes
@few_shapes
def test_matches_float64_prefill(backend, Hq, Hkv, D, page_size, dtype):
    cache = Cache(Hq, Hkv, D, dtype, [45, 1, 70, 530], page_size)
    rows = cache.causal(0, range(45)) + cache.causal(1, [0]) + cache.causal(2, range(20, 70))
    assert_matches_float64(backend, cache, rows + cache.causal(3, range(500, 530)))


@dtypes
@few_shapes
def test_matches_float64_with_sharp_scores(backend, Hq, Hkv, D, dtype):
    """Keys of the largest temperature in ZAYA1-8B, so that one weight is almost 1."""
    cache = Cache(Hq, Hkv, D, dtype, [700])
    cache.keys = [12.9 * k for k in cache.keys]
    assert_matches_float64(backend, cache, cache.causal(0, [0, 31, *range(500, 700, 8)]))


@dtypes
@few_shapes
@each_size("prefix count", (0, 1), (0, 16), (5, 16), (31, 2), (32, 16), (505, 16), (512, 1), (500, 40))
def test_group_matches_float64(backend, Hq, Hkv, D, prefix, count, dtype):
    cache = Cache(Hq, Hkv, D, dtype, [max(1, prefix), 3])
    assert_matches_float64(backend, cache, cache.group(0, prefix, count) + cache.causal(1, [2]))


@dtypes
@few_shapes
def test_block_with_a_group_per_row_matches_float64(backend, Hq, Hkv, D, dtype):
    """As in a decoding step: causal rows, whose keys are in the pages already, and for each of them a group that sees
    the prefix up to it."""
    cache = Cache(Hq, Hkv, D, dtype, [520, 40])
    rows = cache.causal(0, range(508, 520)) + [row for p in range(508, 521) for row in cache.group(0, p, 4)]
    assert_matches_float64(backend, cache, rows + cache.causal(1, range(36, 40)) + cache.group(1, 38, 16))


@dtypes
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100, 511, 512, 513, 600, 5000])
def test_sliding_window_matches_float64(backend, window, dtype):
    lengths = [1, 33, 64, 513, 1040]
    cache = Cache(4, 2, 32, dtype, lengths)
    rows = [
        row for b, n in enumerate(lengths) for row in cache.causal(b, {max(0, n - 2), n - 1}) + cache.group(b, n, 5)
    ]
    assert_matches_float64(backend, cache, rows, window)


@dtypes
@each_size("position window", (100, 33), (100, 32), (543, 32), (544, 32), (600, 90), (31, 31), (5, 1))
def test_sliding_window_ends_exactly(backend, position, window, dtype):
    """The key at position - window does not enter, the next one does."""
    cache = Cache(4, 2, 32, dtype, [position + 1])
    row = cache.causal(0, [position])

    def out() -> Tensor:
        return backend.op("block_attention")(**cache.call(row, window))

    expected = out()
    cache.values[0][position - window] += 1
    cache.keys[0][position - window] += 1
    assert same_bits(out(), expected)
    cache.values[0][position - window + 1] += 1
    assert not same_bits(out(), expected)


@dtypes
def test_window_of_one_gives_own_value(backend, dtype):
    cache = Cache(4, 2, 34, dtype, [600])
    positions = [0, 31, 32, 511, 512, 599]
    out = backend.op("block_attention")(**cache.call(cache.causal(0, positions), 1))
    assert same_bits(out, cache.values[0][positions].repeat_interleave(2, 1))


@dtypes
def test_group_sees_itself_in_both_directions(backend, dtype):
    cache = Cache(4, 2, 32, dtype, [40])
    rows, others = cache.group(0, 40, 5), cache.group(0, 40, 3)
    before = backend.op("block_attention")(**cache.call(rows + others))
    for changed in (0, 4):
        rows[changed].v = rows[changed].v + 1
        after = backend.op("block_attention")(**cache.call(rows + others))
        assert all((before[i] != after[i]).any() for i in range(5))
        assert same_bits(before[5:], after[5:])
        before = after


# Invariance.


@dtypes
@pytest.mark.parametrize("window", [0, 40], ids=["full", "window"])
@each_size("Hq Hkv D", (4, 2, 32), (16, 1, 64), (1, 1, 16))
def test_causal_rows_in_one_call_or_many(backend, Hq, Hkv, D, window, dtype):
    cache = Cache(Hq, Hkv, D, dtype, [540])
    call = cache.call(cache.causal(0, [*range(3), *range(20, 50), *range(505, 540)]), window)
    per_row = [name for name in call if name in ("q", "k", "v") or name.startswith("row_")]

    def run(first: int, last: int) -> Tensor:
        part = {name: call[name][first:last] for name in per_row}
        return backend.op("block_attention")(**(call | part | {"cu_rows": int32([0, len(part["q"])])}))

    T = len(call["q"])
    alone = torch.cat([run(i, i + 1) for i in range(T)])
    sizes, counts = ((7, 16, T), (1,)) if backend.emulated else ((2, 3, 7, 16, 64, T), (1, 2))
    for size, count in itertools.product(sizes, counts):
        with threads(count):
            assert same_bits(torch.cat([run(i, i + size) for i in range(0, T, size)]), alone)


@dtypes
@pytest.mark.parametrize("window", [0, 40], ids=["full", "window"])
def test_batch_invariance(backend, window, dtype):
    """64 sequences of random length, each with two causal rows and a group of three."""
    lengths = torch.randint(2, 300 if backend.emulated else 600, (64,)).tolist()
    cache = Cache(4, 2, 32, dtype, lengths, page_size=64)
    rows = [cache.causal(b, [n - 2, n - 1]) + cache.group(b, n - 1, 3) for b, n in enumerate(lengths)]
    call = cache.call(sum(rows, []), window)
    per_row = {name: call[name].unflatten(0, (64, 5)) for name in ("q", "k", "v", "row_positions", "row_prefix")}

    def run(indices: Tensor) -> tuple[Tensor]:
        first = 5 * torch.arange(len(indices) + 1)
        chosen = {name: x[indices].flatten(0, 1) for name, x in per_row.items()} | {
            "page_table": cache.table[indices],
            "cu_rows": int32(first),
            "row_group_begin": int32(first[:-1, None] + torch.tensor([0, 0, 2, 2, 2])).flatten(),
            "row_group_end": int32(first[:-1, None] + torch.tensor([0, 0, 5, 5, 5])).flatten(),
        }
        return (backend.op("block_attention")(**(call | chosen)).unflatten(0, (-1, 5)),)

    assert_batch_invariant(run)


@dtypes
@pytest.mark.parametrize("window", [0, 300, 2100], ids=lambda window: f"window{window}")
def test_long_row_alone_and_beside_others(backend, window, dtype):
    """Many rows of a call go through the keys in other portions than few: the GPU kernel folds eight chunks at once."""
    lengths = [4700] + [3] * (12 if backend.emulated else 400)
    cache = Cache(2, 1, 16, dtype, lengths)
    rows = cache.causal(0, [2047, 2048, 4699]) + cache.group(0, 4600, 2)
    others = [row for b in range(1, len(lengths)) for row in cache.causal(b, [2])]
    op = backend.op("block_attention")
    alone, together = op(**cache.call(rows, window)), op(**cache.call(rows + others, window))
    assert alone.isfinite().all()
    assert same_bits(alone, together[: len(rows)])


@dtypes
def test_pages_do_not_matter(backend, dtype):
    """Neither which pages a sequence has nor their size."""
    cache = Cache(4, 2, 32, dtype, [600, 31, 33, 128])
    rows = [row for b, n in enumerate(cache.lengths) for row in cache.causal(b, [n - 2, n - 1]) + cache.group(b, n, 3)]
    outs = []
    for cache.page_size in (32, 32, 64, 128, 512):
        cache.shuffle()
        outs.append(backend.op("block_attention")(**cache.call(rows)))
    assert outs[0].isfinite().all()
    assert all(same_bits(out, outs[0]) for out in outs)


def test_page_table_of_huge_capacity(backend):
    """Room for 2^30 keys: the GPU kernel has room for the partial sums of a few rows only, and takes rows in turns."""
    cache = Cache(1, 1, 16, torch.float32, [700])
    call = cache.call(cache.causal(0, range(680, 700)))
    expected = backend.op("block_attention")(**call)
    wide = torch.zeros(1, 2**25, dtype=torch.int32)
    wide[:, : cache.table.shape[1]] = cache.table
    assert same_bits(backend.op("block_attention")(**(call | {"page_table": wide})), expected)


def test_pages_beyond_32_bits(backend):
    """Of more than 2^31 elements, which are never touched but at the end."""
    cache = Cache(2, 1, 16, torch.bfloat16, [70])
    call = cache.call(cache.causal(0, [68, 69]))
    expected = backend.op("block_attention")(**call)
    wide = {}
    for name in ("k_pages", "v_pages"):
        wide[name] = untouched(2**22 + cache.num_pages, *call[name].shape[1:], dtype=torch.bfloat16)
        wide[name][2**22 :] = call[name]
    wide["page_table"] = torch.where(cache.table == NOWHERE, NOWHERE, cache.table + 2**22)
    assert same_bits(backend.op("block_attention")(**(call | wide)), expected)


def test_sequences_without_rows(backend):
    cache = Cache(4, 2, 32, torch.float32, [20, 5, 33, 7])
    rows = cache.causal(1, [3, 4]) + cache.causal(3, [6])
    assert_matches_float64(backend, cache, rows)


@dtypes
def test_no_rows(backend, dtype):
    cache = Cache(4, 2, 32, dtype, [20])
    out = backend.op("block_attention")(**cache.call([]))
    assert out.shape == (0, 4, 32)
    assert out.dtype == dtype


# NaN. Everything that no sequence owns is NaN in all tests above.


def before_and_after_nan(
    backend, cache: Cache, rows: list[Row], *spoiled: Tensor, window: int = 0
) -> tuple[Tensor, Tensor]:
    op = backend.op("block_attention")
    before = op(**cache.call(rows, window))
    for x in spoiled:
        x.fill_(torch.nan)
    return before, op(**cache.call(rows, window))


@dtypes
def test_nan_query_stays_in_its_head(backend, dtype):
    cache = Cache(4, 2, 32, dtype, [50])
    rows = cache.causal(0, range(40, 50))
    clean, out = before_and_after_nan(backend, cache, rows, rows[3].q[2])
    assert out[3, 2].isnan().all()
    clean[3, 2] = out[3, 2]
    assert same_bits(out, clean)


@dtypes
def test_nan_in_a_group_stays_in_it(backend, dtype):
    cache = Cache(4, 2, 32, dtype, [50, 50])
    rows = cache.causal(0, [48, 49]) + cache.group(0, 50, 4) + cache.group(0, 50, 4) + cache.group(1, 50, 4)
    clean, out = before_and_after_nan(backend, cache, rows, rows[7].k, rows[7].v)
    assert out[6:10].isnan().all()
    assert same_bits(out[:6], clean[:6])
    assert same_bits(out[10:], clean[10:])


@dtypes
def test_nan_in_another_sequence(backend, dtype):
    cache = Cache(4, 2, 32, dtype, [50, 50])
    rows = cache.causal(0, [48, 49]) + cache.causal(1, [48, 49])
    clean, out = before_and_after_nan(backend, cache, rows, cache.keys[1], cache.values[1])
    assert same_bits(out[:2], clean[:2])
    assert out[2:].isnan().all()


@dtypes
@pytest.mark.parametrize(
    ("part", "position"),
    [("values", 0), ("values", 33), ("keys", 0), ("keys", 5), ("keys", 16), ("keys", 33), ("keys", 40)],
)
def test_visible_nan_shows(backend, part, position, dtype):
    cache = Cache(4, 2, 32, dtype, [41])
    getattr(cache, part)[0][position] = torch.nan
    assert backend.op("block_attention")(**cache.call(cache.causal(0, [40]))).isnan().all()


@dtypes
@pytest.mark.parametrize("part", ["keys", "values"])
def test_nan_after_a_row(backend, part, dtype):
    """A key that a later row of the call sees: earlier rows keep their bits."""
    cache = Cache(4, 2, 32, dtype, [50])
    rows = cache.causal(0, range(40, 50))
    clean, out = before_and_after_nan(backend, cache, rows, getattr(cache, part)[0][45])
    assert out[5:].isnan().all()
    assert same_bits(out[:5], clean[:5])


@dtypes
@pytest.mark.parametrize("part", ["keys", "values"])
def test_nan_before_the_window(backend, part, dtype):
    cache = Cache(4, 2, 32, dtype, [50])
    rows = cache.causal(0, [49])
    clean, out = before_and_after_nan(backend, cache, rows, getattr(cache, part)[0][:40], window=10)
    assert same_bits(out, clean)


def test_rows_of_a_group_with_prefixes_of_their_own(backend):
    cache = Cache(4, 2, 32, torch.float32, [50])
    rows = cache.group(0, 50, 4)
    rows[1].prefix, rows[3].prefix = 30, 49
    assert_matches_float64(backend, cache, rows)


# Errors.


def small_call(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    cache = Cache(4, 2, 16, dtype, [40, 5])
    return cache.call(cache.causal(0, [38, 39]) + cache.group(0, 40, 2) + cache.causal(1, [4])) | {
        "page_table": int32([[3, 1, 0], [2, 0, 0]])
    }


@each_malformed_tensor("block_attention")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "block_attention", small_call(), changes, message)


@each_wrong_call(
    {
        "float64": ({"q": Tensor.double}, "q must be Float or BFloat16, got Double"),
        "mixed": ({"k": Tensor.bfloat16}, "k must be Float, got BFloat16"),
        "rows-of-k": ({"k": torch.zeros(4, 2, 16)}, r"k must be \[T=5, Hkv, D=16\], got \[4, 2, 16\]"),
        "heads-of-v": ({"v": torch.zeros(5, 1, 16)}, r"v must be \[T=5, Hkv=2, D=16\], got \[5, 1, 16\]"),
        "heads-of-pages": ({"k_pages": torch.zeros(5, 4, 1, 512)}, r"k_pages must be .*, got \[5, 4, 1, 512\]"),
        "N": ({"v_pages": lambda t: t[:3]}, r"v_pages must be .*, got \[3, 2, 1, 1024\]"),
        "k-pages": ({"k_pages": lambda t: t[..., :256].clone()}, "last size of k_pages must be 512, got 256"),
        "v-pages": ({"v_pages": lambda t: t[..., :512].clone()}, "last size of v_pages must be 1024, got 512"),
        "B": ({"cu_rows": int32([0, 5])}, r"cu_rows must be \[B \+ 1=3\], got \[2\]"),
        "positions": ({"row_positions": int32([0])}, r"row_positions must be \[T=5\], got \[1\]"),
        "prefix": ({"row_prefix": int32([0])}, r"row_prefix must be \[T=5\], got \[1\]"),
        "begin": ({"row_group_begin": int32([0])}, r"row_group_begin must be \[T=5\], got \[1\]"),
        "end": ({"row_group_end": int32([0])}, r"row_group_end must be \[T=5\], got \[1\]"),
        "table-int64": ({"page_table": Tensor.long}, "page_table must be Int, got Long"),
        "groups": ({"q": torch.zeros(5, 3, 16)}, "Hq must be a multiple of Hkv=2, got 3"),
        "window": ({"sliding_window": -1}, "sliding_window must be at least 0, got -1"),
        "no-sequence": (
            {"page_table": torch.zeros(0, 3).int(), "cu_rows": int32([0])},
            "page_table must have a row for each sequence, got 0 for T=5 rows",
        ),
    }
    | {
        f"D{D}": (
            {
                "q": torch.zeros(5, 4, D),
                "k": torch.zeros(5, 2, D),
                "v": torch.zeros(5, 2, D),
                "k_pages": torch.zeros(5, 2, 1, 32 * D),
                "v_pages": torch.zeros(5, 2, 1, -(-D // 32) * 1024),
            },
            f"D must be even and at most 256, got {D}",
        )
        for D in (15, 258)
    }
    | {
        "many-heads": (
            {"q": torch.zeros(5, 34, 16)},
            "at most 16 query heads per key-value head, got 17",
        ),
        "no-key-heads": (
            {name: lambda t: t[:, :0].clone() for name in ("k", "v", "k_pages", "v_pages")},
            "Hq must be a multiple of Hkv=0, got 4",
        ),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "block_attention", small_call(), changes, message)


@each_wrong_call(
    {
        "D0": (
            {name: lambda t: t[..., :0].clone() for name in ("q", "k", "v", "k_pages", "v_pages")},
            "D must be .*, got 0",
        ),
        "Hq0": ({"q": torch.zeros(5, 0, 16)}, "Hq must be .*, got 0"),
        "page-size-0": ({name: lambda t: t[:, :, :0].clone() for name in ("k_pages", "v_pages")}, ".*"),
    }
)
def test_empty_sizes(backend, changes, message):
    assert_raises(backend, "block_attention", small_call(), changes, message)


@each_wrong_call(
    {
        "cu-begin": ({"cu_rows": int32([1, 4, 5])}, "cu_rows must run from 0 to T=5, got 1 to 5"),
        "cu-end": ({"cu_rows": int32([0, 4, 6])}, "cu_rows must run from 0 to T=5, got 0 to 6"),
        "cu-order": (
            {"cu_rows": int32([0, 4, 3, 5]), "page_table": torch.zeros(3, 3).int()},
            "cu_rows must not decrease, got 4 before 3",
        ),
        "prefix-1": ({"row_prefix": int32([-1, 40, 40, 40, 5])}, r"row_prefix must be in \[0, 96\], got -1 at 0"),
        "prefix-long": ({"row_prefix": int32([39, 97, 40, 40, 5])}, r"row_prefix must be in \[0, 96\], got 97 at 1"),
        "page-1": (
            {"page_table": int32([[3, -1, 0], [2, 0, 0]])},
            r"page_table must be in \[0, 4\], got -1 at \[0, 1\]",
        ),
        "page-N": ({"page_table": int32([[3, 1, 0], [5, 0, 0]])}, r"page_table must be in \[0, 4\], got 5 at \[1, 0\]"),
        "group-order": (
            {"row_group_end": int32([0, 0, 1, 4, 4])},
            r"the group of row 2 must lie in the rows of its sequence, got \[2, 1\)",
        ),
        "group-before": (
            {"row_group_begin": int32([0, 0, 2, 2, 3])},
            r"the group of row 4 must lie in the rows of its sequence, got \[3, 4\)",
        ),
        "group-after": (
            {"row_group_end": int32([0, 0, 5, 5, 4])},
            r"the group of row 2 must lie in the rows of its sequence, got \[2, 5\)",
        ),
        "no-key": ({"row_prefix": int32([0, 40, 40, 40, 5])}, "row 0 must see at least one key, got 0"),
    }
)
def test_index_errors(cpu, changes, message):
    assert_raises(cpu, "block_attention", small_call(), changes, message)


def test_cu_rows_past_the_end(cpu):
    changes = {"cu_rows": int32([0, 2**30, 5])}
    assert_raises(cpu, "block_attention", small_call(), changes, "cu_rows must .*, got 1073741824 .*")


def test_page_of_the_last_prefix(cpu):
    """A prefix that ends with a page does not read the next entry of the table; one key more does."""
    cache = Cache(4, 2, 16, torch.float32, [64])
    rows = cache.causal(0, [63])
    call = cache.call(rows)
    assert call["page_table"][0, 2] == NOWHERE
    cpu.op("block_attention")(**call)
    changes = {"row_prefix": int32([65])}
    message = rf"page_table must be in \[0, 3\], got {NOWHERE} at \[0, 2\]"
    assert_raises(cpu, "block_attention", call, changes, message)


@dtypes
def test_gpu_takes_indices_out_of_range(gpu, dtype):
    """Prefixes and groups end with what exists, a page that does not exist is one of zeros, and a row without keys
    gives zeros."""
    op = gpu.op("block_attention")
    call = {n: x.nan_to_num() if isinstance(x, Tensor) else x for n, x in small_call(dtype).items()}
    least, most, pages = -(2**31), 2**31 - 1, len(call["k_pages"])

    def same(changes: dict[str, Any], valid: dict[str, Any]) -> bool:
        return same_bits(op(**(call | changes)), op(**(call | valid)))

    for low, high in ((-1, 97), (least, most)):
        prefix = int32([low, high, 40, 40, low])
        assert same({"row_prefix": prefix}, {"row_prefix": int32([0, 96, 40, 40, 0])})
        groups = {"row_group_begin": int32([0, 3, 2, low, 0]), "row_group_end": int32([low, high, high, 4, 0])}
        valid = {"row_group_begin": int32([0, 3, 2, 0, 0]), "row_group_end": int32([0, 5, 5, 4, 0])}
        assert same(groups, valid)
    assert not op(**(call | {"row_prefix": int32([0, 40, 40, 40, -1])}))[[0, 4]].any()
    zero = {name: torch.cat([call[name], 0 * call[name][:1]]) for name in ("k_pages", "v_pages")}
    for bad in (-1, pages, least, most):
        table = int32([[3, bad, 0], [2, bad, bad]])
        expected = op(**(call | zero | {"page_table": table.where(table != bad, pages)}))
        assert same_bits(op(**(call | {"page_table": table})), expected)
    for cu_rows in ([0, 2**30, 5], [3, 4, 1], [most, least, most], [-1, -1, -1]):
        op(**(call | {"cu_rows": int32(cu_rows)}))  # what it gives is not said, but it ends and stays in its memory


# Registration.


@dtypes
def test_opcheck(dtype):
    call = small_call(dtype)  # opcheck compares results and takes NaN for a difference
    opcheck("block_attention", {n: x.nan_to_num() if isinstance(x, Tensor) else x for n, x in call.items()})


def test_compiles_once_for_all_lengths():
    cache = Cache(4, 2, 16, torch.float32, [70, 35])
    first, then = (cache.call(cache.causal(0, range(n)) + cache.causal(1, [34])) for n in (40, 60))
    assert_compiles_once("block_attention", first, then)
