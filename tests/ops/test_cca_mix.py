from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import blockdraft
from blockdraft.reference.cca_mix import rotate
from blockdraft.reference.pages import empty_pages, read_keys
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
    sum_error,
    untouched,
)

STATES = 5


def int32(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


@dataclass
class Layer:
    """A CCA layer with random weights, committed states and pages full of other keys. Rows are the caller's."""

    backend: Any
    Hq: int
    Hkv: int
    D: int
    rotary: int
    dtype: torch.dtype
    page_size: int = 32
    pages: int = 4
    states: int = STATES

    def __post_init__(self) -> None:
        self.heads = self.Hq + self.Hkv
        self.C = self.heads * self.D
        self.width = self.C + self.Hkv * self.D
        self.weight = torch.randn(self.heads, self.D, 2 * self.D).div(self.D**0.5).to(self.dtype)
        self.vectors = {
            "conv_qk_depthwise": torch.randn(2, self.C),
            "conv_depthwise_bias": torch.randn(self.C),
            "conv_grouped_bias": torch.randn(self.C),
            "temp": 0.8 + 12 * torch.rand(self.Hkv),
            "inverse_frequencies": 10000 ** -(torch.arange(0, self.rotary, 2) / max(1, self.rotary)),
        }
        self.conv_states = torch.randn(self.states, 2, self.C).to(self.dtype)
        self.recurrent_states = torch.randn(self.states, self.Hkv * self.D // 2).to(self.dtype)
        shapes = [t.shape for t in empty_pages(self.pages, self.Hkv, self.page_size, self.D, self.dtype)]
        self.k_pages, self.v_pages = (torch.randn(shape).to(self.dtype) for shape in shapes)

    @cached_property
    def packed(self) -> Tensor:
        return self.backend.op("pack_weight")(weight=self.weight, halves=1)

    def call(
        self, qkv: Tensor, parents: Any, states: Any = 0, positions: Any = None, slots: Any = -1
    ) -> dict[str, Tensor]:
        T = qkv.shape[0]
        ordered = {
            "qkv": qkv,
            "row_parents": int32(parents),
            "row_positions": int32(range(T) if positions is None else positions),
            "row_states": int32(states).expand(T).contiguous(),
            "row_slots": torch.as_tensor(slots).expand(T).contiguous(),
            "conv_states": self.conv_states,
            "recurrent_states": self.recurrent_states,
            "conv_qk_depthwise": None,
            "conv_depthwise_bias": None,
            "conv_qk_grouped": self.packed,
        }
        return ordered | self.vectors | {"k_pages": self.k_pages, "v_pages": self.v_pages}

    def mix(self, *rows: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.backend.op("cca_mix")(**self.call(*rows, **more))

    def all_keys(self) -> tuple[Tensor, Tensor]:
        """All keys and values in the pages, by slot."""
        slots = self.pages * self.page_size
        return read_keys(self.k_pages, self.v_pages, torch.arange(self.pages), slots, self.D)

    def rows(self, T: int) -> Tensor:
        return torch.randn(T, self.width).to(self.dtype)


def random_tree(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Parents and states of sequences beside each other: a parent is any earlier row of the sequence, or -1."""
    parents, states, first = [], [], 0
    for state, length in enumerate(lengths):
        choices = [int(torch.randint(-1, max(1, i), ())) for i in range(length)]
        parents += [first + c if c >= 0 else -1 for c in choices]
        states += [state % STATES] * length
        first += length
    return int32(parents), int32(states)


def before_norm(a: dict[str, Tensor], weight: Tensor, f=lambda x: x) -> Tensor:
    """y + mean of every head ``[T, heads, D]``; with f = abs, the sizes of all that is added up."""
    T, Hkv, (heads, D, _) = len(a["qkv"]), len(a["temp"]), weight.shape
    parents = a["row_parents"].long()
    u = f(a["qkv"][:, : heads * D])
    older, newer = f(a["conv_states"][a["row_states"].long()]).unbind(1)
    u1 = torch.where(parents[:, None] < 0, newer, u[parents])
    u2 = torch.where(parents[:, None] < 0, older, u1[parents])
    w0, b0 = f(a["conv_qk_depthwise"]), f(a["conv_depthwise_bias"])
    m = torch.stack([w0[0] * u2 + w0[1] * u1 + b0, w0[0] * u1 + w0[1] * u + b0])  # [taps, T, C]
    y = torch.einsum("atgi,goai->tgo", m.view(2, T, heads, D), f(weight).view(heads, D, 2, D))
    q, k = u.view(T, heads, D).split([heads - Hkv, Hkv], 1)
    mean = 0.5 * (q.view(T, Hkv, -1, D) + k[:, :, None])  # [T, Hkv, G, D]
    return y + f(a["conv_grouped_bias"]).view(heads, D) + torch.cat([mean.flatten(1, 2), mean.mean(2)], 1)


def float32_error(c: float, a: dict[str, Tensor], weight: Tensor) -> Tensor:
    """What a float32 evaluation may be off in Q and K ``[T, heads, D]`` before they are rounded."""
    D, half, Hkv = weight.shape[1], len(a["inverse_frequencies"]), len(a["temp"])
    z, size = before_norm(a, weight), before_norm(a, weight, torch.abs)
    scale = D**0.5 * torch.cat([torch.ones(weight.shape[0] - Hkv), a["temp"]])[:, None] / z.norm(dim=-1, keepdim=True)
    error = sum_error(c, 2 * D, size) + 4 * U32 * size  # the convolution; the taps, bias and mean
    error = scale * (error + z.abs() * error.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True))
    error += (c * D**0.5 + 8) * U32 * scale * z.abs()  # the norm, sines and cosines
    pair = error[..., : 2 * half].unflatten(-1, (2, half)).sum(-2)
    return torch.cat([pair, pair, error[..., 2 * half :]], -1)


def in_float64(layer: Layer, call: dict[str, Tensor]) -> dict[str, Tensor]:
    exact = {name: x.double() if x.is_floating_point() else x for name, x in call.items()}
    exact["conv_qk_grouped"] = blockdraft.reference.pack_weight(layer.weight.double())
    pages = empty_pages(layer.pages, layer.Hkv, layer.page_size, layer.D, torch.float64)
    return exact | dict(zip(("k_pages", "v_pages"), pages, strict=True))


each_shape = each_size(
    "Hq Hkv D rotary",
    (1, 1, 2, 2),
    (2, 2, 16, 8),
    (4, 2, 32, 32),
    (4, 1, 34, 0),
    (8, 2, 128, 64),
    (2, 1, 256, 64),
)


@dtypes
@each_shape
@pytest.mark.parametrize("lengths", [[1], [15, 1], [6, 20, 7]], ids=["T1", "T16", "T33"])
def test_matches_float64(backend, Hq, Hkv, D, rotary, lengths, dtype):
    layer = Layer(backend, Hq, Hkv, D, rotary, dtype)
    T = sum(lengths)
    parents, states = random_tree(lengths)
    call = layer.call(layer.rows(T), parents, states, positions=torch.randint(131_072, (T,)))
    q, k, v = backend.op("cca_mix")(**call)
    assert q.dtype == k.dtype == dtype
    exact = in_float64(layer, call)
    q64, k64, v64 = blockdraft.reference.cca_mix(**exact)
    q_error, k_error = float32_error(backend.sum_constant, exact, layer.weight.double()).split([Hq, Hkv], 1)
    assert_within(q, q64, q_error, "q")
    assert_within(k, k64, k_error, "k")
    assert same_bits(v, v64.to(dtype))
    plain_q, plain_k, _ = blockdraft.reference.cca_mix(
        **(call | {"conv_qk_grouped": blockdraft.reference.pack_weight(layer.weight)})
    )
    assert_no_worse_than_eager(q, plain_q, q64)
    assert_no_worse_than_eager(k, plain_k, k64)


@dtypes
def test_no_rows(backend, dtype):
    layer = Layer(backend, 4, 2, 16, 8, dtype)
    results = layer.mix(layer.rows(0), [])
    assert [x.shape for x in results] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]
    assert all(x.dtype == dtype for x in results)


def test_reference_without_rows(backend):
    layer = Layer(backend, 4, 2, 16, 8, torch.float32)
    assert blockdraft.reference.cca_mix(**layer.call(layer.rows(0), []))[0].shape == (0, 4, 16)


@dtypes
def test_first_token_matches_padded_convolution(backend, dtype):
    """Zero states are two zeros to the left of the convolutions, as transformers pads them: m of the token before the
    first is the bias, not 0."""
    layer = Layer(backend, 4, 2, 32, 16, dtype)
    layer.conv_states.zero_(), layer.recurrent_states.zero_()
    n, D, half = 6, layer.D, layer.Hkv * layer.D // 2
    call = layer.call(layer.rows(n), range(-1, n - 1))
    exact = in_float64(layer, call)
    u = exact["qkv"][:, : layer.C]
    taps = exact["conv_qk_depthwise"].T[:, None]  # [C, 1, 2]
    m = F.conv1d(F.pad(u.T, (2, 0))[None], taps, exact["conv_depthwise_bias"], groups=layer.C)
    grouped = layer.weight.double().view(layer.C, 2, D).transpose(1, 2)  # [C, D, 2]
    y = F.conv1d(m, grouped, exact["conv_grouped_bias"], groups=layer.heads)[0].T.view(n, -1, D)
    query, key = u.view(n, -1, D).split([4, 2], 1)
    y[:, :4] += (query + key.repeat_interleave(2, 1)) / 2
    y[:, 4:] += (query.view(n, 2, 2, D).mean(2) + key) / 2
    length = torch.cat([torch.ones(4), layer.vectors["temp"]]).double()[:, None] * D**0.5
    expected = rotate(F.normalize(y, dim=-1) * length, call["row_positions"], exact["inverse_frequencies"])

    q, k, v = backend.op("cca_mix")(**call)
    error = float32_error(backend.sum_constant, exact, layer.weight.double())
    assert_within(q, expected[:, :4], error[:, :4], "q")
    assert_within(k, expected[:, 4:], error[:, 4:], "k")
    delayed = F.pad(call["qkv"][:-1, layer.C + half :], (0, 0, 1, 0))
    assert same_bits(v.flatten(1), torch.cat([call["qkv"][:, layer.C : layer.C + half], delayed], 1))


def test_zero_head_stays_zero(backend):
    layer = Layer(backend, 2, 1, 16, 8, torch.float32)
    for x in (layer.conv_states, *layer.vectors.values()):
        x.zero_()
    q, k, _ = layer.mix(torch.zeros(3, layer.width), [-1, 0, 1])
    assert not q.any()
    assert not k.any()


@dtypes
@pytest.mark.parametrize("page_size", [32, 64, 96])
@each_size("Hkv D", (1, 2), (2, 16), (1, 34), (2, 128))
def test_writes_its_slots_and_no_others(backend, Hkv, D, page_size, dtype):
    layer = Layer(backend, 2 * Hkv, Hkv, D, 2, dtype, page_size)
    k_before, v_before = layer.all_keys()
    slots = torch.randperm(4 * page_size)[:20]
    slots[0], slots[5] = 0, 4 * page_size - 1  # the ends
    slots = slots.unique()[torch.randperm(len(slots.unique()))]
    slots[[2, 7]] = -1
    _, k, v = layer.mix(layer.rows(len(slots)), range(-1, len(slots) - 1), slots=slots)
    written = slots >= 0
    k_before[slots[written]], v_before[slots[written]] = k[written], v[written]
    for ours, expected in zip(layer.all_keys(), (k_before, v_before), strict=True):
        assert same_bits(ours, expected)


def test_slot_minus_one_leaves_every_byte(backend):
    layer = Layer(backend, 4, 2, 16, 8, torch.bfloat16)
    before = layer.k_pages.clone(), layer.v_pages.clone()
    rows = layer.rows(9)
    unwritten = layer.mix(rows, range(-1, 8))
    assert same_bits(layer.k_pages, before[0])
    assert same_bits(layer.v_pages, before[1])
    written = layer.mix(rows, range(-1, 8), slots=torch.arange(9))
    assert all(same_bits(a, b) for a, b in zip(unwritten, written, strict=True))


@dtypes
@pytest.mark.parametrize(
    "parts", [[1] * 12, [5, 1, 6], [11, 1], [2, 10], [1, 1, 10]], ids=lambda parts: "+".join(map(str, parts))
)
def test_several_calls_equal_one(backend, parts, dtype):
    """Rows whose ancestors are rows, and rows whose ancestors were committed: the same bits, in the pages as well."""
    layer = Layer(backend, 4, 2, 32, 16, dtype)
    rows, positions, slots = layer.rows(12), torch.arange(40, 52), torch.randperm(128)[:12]
    conv_states, recurrent_states = layer.conv_states.clone(), layer.recurrent_states.clone()
    together = layer.mix(rows, range(-1, 11), 3, positions, slots)
    pages = layer.k_pages.clone(), layer.v_pages.clone()
    layer.k_pages.normal_(), layer.v_pages.normal_()
    written = read_keys(*pages, torch.arange(4), 128, layer.D)
    first = 0
    for n in parts:
        part = slice(first, first + n)
        results = layer.mix(rows[part], range(-1, n - 1), 3, positions[part], slots[part])
        for ours, expected in zip(results, together, strict=True):
            assert same_bits(ours, expected[part])
        commit(layer, rows[part], range(-1, n - 1), n - 1, 3)
        first += n
    for ours, expected in zip(layer.all_keys(), written, strict=True):
        assert same_bits(ours[slots], expected[slots])
    others = torch.arange(STATES) != 3
    assert same_bits(layer.conv_states[others], conv_states[others])
    assert same_bits(layer.recurrent_states[others], recurrent_states[others])


def commit(layer: Layer, rows: Tensor, parents: Any, row: int, state: int) -> None:
    layer.backend.op("commit_states")(
        qkv=rows[None],
        row_parents=int32(parents),
        commit_rows=int32([row]),
        state_slots=int32([state]),
        conv_states=layer.conv_states[None],
        recurrent_states=layer.recurrent_states[None],
    )


@dtypes
@pytest.mark.parametrize("accepted", range(5))
def test_mask_group_equals_separate_call(backend, accepted, dtype):
    """A block of five rows and, in the same call, a group of three masks after each of them. The group after row j has
    the bits that it has once row j is committed."""
    layer = Layer(backend, 4, 2, 32, 16, dtype)
    rows = layer.rows(5 + 5 * 3)
    parents = list(range(-1, 4))
    for j in range(5):
        parents += [j, len(parents), len(parents) + 1]
    positions = [*range(5), *(j + i for j in range(5) for i in (1, 2, 3))]
    together = layer.mix(rows, parents, 2, positions)

    group = slice(5 + 3 * accepted, 8 + 3 * accepted)
    commit(layer, rows, parents, accepted, 2)
    alone = layer.mix(rows[group], [-1, 0, 1], 2, positions[group])
    for ours, expected in zip(alone, together, strict=True):
        assert same_bits(ours, expected[group])


@dtypes
def test_mask_groups_do_not_touch_the_chain(backend, dtype):
    layer = Layer(backend, 4, 2, 32, 16, dtype)
    rows = layer.rows(5 + 6)
    with_groups = layer.mix(rows, [-1, 0, 1, 2, 3, 1, 5, 6, 3, 8, 9])
    without = layer.mix(rows[:5], range(-1, 4))
    for ours, expected in zip(with_groups, without, strict=True):
        assert same_bits(ours[:5], expected)


@dtypes
def test_batch_invariance(backend, dtype):
    """64 sequences of three rows, each with its own state and slots."""
    layer = Layer(backend, 4, 2, *((32, 16) if backend.emulated else (128, 64)), dtype, pages=6, states=64)
    rows = layer.rows(64 * 3).view(64, 3, -1)

    def run(indices: Tensor) -> tuple[Tensor, ...]:
        n = len(indices)
        parents = (3 * torch.arange(n)[:, None] + torch.arange(-1, 2)).masked_fill(torch.arange(3) == 0, -1)
        positions, slots = (3 * indices[:, None] + torch.arange(3)).repeat(2, 1, 1)
        results = layer.mix(
            rows[indices].flatten(0, 1),
            parents.flatten(),
            indices.repeat_interleave(3),
            positions.flatten(),
            slots.flatten(),
        )
        written = (x[slots] for x in layer.all_keys())  # [n, 3, Hkv, D]
        return *(x.unflatten(0, (n, 3)) for x in results), *written

    assert_batch_invariant(run)


@dtypes
def test_nan_stays_with_its_descendants(backend, dtype):
    """Two chains; NaN in the second row of the second chain, in a state that no row has, and in the pages."""
    layer = Layer(backend, 4, 2, 16, 8, dtype)
    rows, parents, states = layer.rows(8), [-1, 0, 1, 2, -1, 4, 5, 4], [0] * 4 + [1] * 4
    clean = layer.mix(rows, parents, states)
    rows[5], layer.conv_states[2:], layer.recurrent_states[2:] = torch.nan, torch.nan, torch.nan
    layer.k_pages.fill_(torch.nan), layer.v_pages.fill_(torch.nan)
    results = layer.mix(rows, parents, states, slots=torch.arange(8))
    others = torch.tensor([0, 1, 2, 3, 4, 7])
    for ours, expected in zip(results, clean, strict=True):
        assert same_bits(ours[others], expected[others])
    assert all(results[0][row].isnan().all() for row in (5, 6))
    for page, expected in zip(layer.all_keys(), clean[1:], strict=True):
        assert same_bits(page[others], expected[others])
        assert page[8:].isnan().all()


def test_states_and_pages_beyond_32_bits(backend):
    """Of more than 2^31 elements, which are never touched but at the end."""
    layer = Layer(backend, 4, 2, 16, 8, torch.bfloat16)
    rows, slots = layer.rows(3), torch.arange(125, 128)
    expected = layer.mix(rows, [-1, 0, -1], 4, slots=slots)
    expected += tuple(x[-1].clone() for x in (layer.k_pages, layer.v_pages))
    last = {name: getattr(layer, name)[-1] for name in ("conv_states", "recurrent_states", "k_pages", "v_pages")}
    states, pages = 2**31 // (2 * layer.C) + 2, 2**31 // last["k_pages"].numel() + 2
    for name, x in last.items():
        setattr(layer, name, untouched(pages if "pages" in name else states, *x.shape, dtype=x.dtype))
        getattr(layer, name)[-1] = x
    results = layer.mix(rows, [-1, 0, -1], states - 1, slots=slots + 32 * (pages - 4))
    for ours, value in zip((*results, layer.k_pages[-1], layer.v_pages[-1]), expected, strict=True):
        assert same_bits(ours, value)


def small_call(backend, dtype: torch.dtype = torch.float32, T: int = 3) -> dict[str, Tensor]:
    layer = Layer(backend, 4, 2, 16, 8, dtype)
    return layer.call(layer.rows(T), range(-1, T - 1), slots=torch.arange(T))


@each_malformed_tensor("cca_mix")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "cca_mix", small_call(backend), changes, message)


@each_wrong_call(
    {
        "parents": ({"row_parents": int32([-1, 0])}, r"row_parents must be \[T=3\], got \[2\]"),
        "positions": ({"row_positions": int32([0])}, r"row_positions must be \[T=3\], got \[1\]"),
        "states": ({"row_states": int32([0])}, r"row_states must be \[T=3\], got \[1\]"),
        "slots": ({"row_slots": torch.tensor([0])}, r"row_slots must be \[T=3\], got \[1\]"),
        "slots-int32": ({"row_slots": Tensor.int}, "row_slots must be Long, got Int"),
        "three-taps": ({"conv_states": torch.zeros(5, 3, 96)}, r"conv_states must be .*, got \[5, 3, 96\]"),
        "mixed": ({"conv_states": Tensor.bfloat16}, "conv_states must be Float, got BFloat16"),
        "S": ({"recurrent_states": lambda t: t[:4]}, r"recurrent_states must be \[S=5, .*\], got \[4, 16\]"),
        "depthwise": ({"conv_qk_depthwise": lambda t: t[:, :9].clone()}, r"conv_qk_depthwise must be .*, got \[2, 9\]"),
        "bias": ({"conv_depthwise_bias": torch.zeros(95)}, r"conv_depthwise_bias must be \[C=96\], got \[95\]"),
        "bias-bfloat16": ({"conv_depthwise_bias": Tensor.bfloat16}, "conv_depthwise_bias must be Float, got BFloat16"),
        "grouped-bias": ({"conv_grouped_bias": torch.zeros(97)}, r"conv_grouped_bias must be \[C=96\], got \[97\]"),
        "qkv": ({"qkv": torch.zeros(3, 127)}, "columns of qkv must be 128, got 127"),
        "heads": ({"conv_qk_grouped": lambda t: t[:4]}, "C of conv_states must be 64, got 96"),
        "delayed": ({"recurrent_states": torch.zeros(5, 15)}, "columns of recurrent_states must be 16, got 15"),
        "panels": (
            {"conv_qk_grouped": lambda t: t.repeat(1, 2, 1, 1)},
            "panels of conv_qk_grouped must be 1, got 2",
        ),
        "temp": ({"temp": torch.ones(4)}, r"k_pages must be .*, got \[4, 2, 1, 512\]"),
        "no-temp": (
            {"temp": torch.ones(0), "k_pages": lambda t: t[:, :0].clone(), "v_pages": lambda t: t[:, :0].clone()},
            "query heads must be a multiple of Hkv=0, got 6",
        ),
        "groups": (
            {"temp": torch.ones(4), "k_pages": torch.zeros(4, 4, 1, 512), "v_pages": torch.zeros(4, 4, 1, 1024)},
            "query heads must be a multiple of Hkv=4, got 2",
        ),
        "k-pages": ({"k_pages": lambda t: t[..., :256].clone()}, "last size of k_pages must be 512, got 256"),
        "v-pages": ({"v_pages": lambda t: t[..., :512].clone()}, "last size of v_pages must be 1024, got 512"),
        "N": ({"v_pages": lambda t: t[:3]}, r"v_pages must be \[N=4, .*\], got \[3, 2, 1, 1024\]"),
        "tiles": ({"v_pages": lambda t: t.repeat(1, 1, 2, 1)}, r"v_pages must be .*, got \[4, 2, 2, 1024\]"),
        "rotary": (
            {"inverse_frequencies": torch.ones(9)},
            "inverse_frequencies must have at most D / 2 entries, got 9",
        ),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "cca_mix", small_call(backend), changes, message)


def test_odd_head(backend):
    layer = Layer(backend, 2, 2, 4, 0, torch.float32)
    layer.D, layer.C = 3, 12
    changes = {
        "qkv": torch.zeros(3, 18),
        "conv_qk_grouped": torch.zeros(4, 1, 3, 64),
        "conv_states": torch.zeros(5, 2, 12),
        "recurrent_states": torch.zeros(5, 3),
        "conv_qk_depthwise": torch.zeros(2, 12),
        "conv_depthwise_bias": torch.zeros(12),
        "conv_grouped_bias": torch.zeros(12),
    }
    assert_raises(backend, "cca_mix", small_call(backend), changes, "D must be even.*, got 3")


@each_size("D", (0,), (258,), (512,))
def test_head_size_without_kernel(backend, D):
    """0: a division by zero. Above 256: writes past a buffer on the stack."""
    layer = Layer(backend, 2, 1, max(D, 2), 0, torch.float32)
    call = layer.call(layer.rows(3), [-1, 0, 1])
    if D == 0:
        call |= {
            "qkv": torch.zeros(3, 0),
            "conv_states": torch.zeros(5, 2, 0),
            "recurrent_states": torch.zeros(5, 0),
            "conv_qk_depthwise": torch.zeros(2, 0),
            "conv_depthwise_bias": torch.zeros(0),
            "conv_qk_grouped": torch.zeros(3, 0, 0, 64),
            "conv_grouped_bias": torch.zeros(0),
            "k_pages": torch.zeros(4, 1, 1, 0),
            "v_pages": torch.zeros(4, 1, 1, 0),
        }
    assert_raises(backend, "cca_mix", call, {}, f"D must be .*, got {D}")


@each_wrong_call(
    {
        "parent-2": ({"row_parents": int32([-1, -2, 0])}, r"row_parents must be in \[-1, 2\], got -2 at 1"),
        "parent-T": ({"row_parents": int32([-1, 0, 3])}, r"row_parents must be in \[-1, 2\], got 3 at 2"),
        "state-1": ({"row_states": int32([0, -1, 0])}, r"row_states must be in \[0, 4\], got -1 at 1"),
        "state-S": ({"row_states": int32([0, 5, 0])}, r"row_states must be in \[0, 4\], got 5 at 1"),
        "slot-2": ({"row_slots": torch.tensor([0, 1, -2])}, r"row_slots must be in \[-1, 127\], got -2 at 2"),
        "slot-end": ({"row_slots": torch.tensor([128, 1, 2])}, r"row_slots must be in \[-1, 127\], got 128 at 0"),
        "slot-2**40": ({"row_slots": torch.tensor([0, 2**40, 2])}, rf"row_slots must be in .*, got {2**40} at 1"),
    }
)
def test_index_errors(cpu, changes, message):
    assert_raises(cpu, "cca_mix", small_call(cpu), changes, message)


@dtypes
def test_gpu_takes_indices_out_of_range(gpu, dtype):
    """A parent for -1, a state for zeros; the key of a slot stays out of the pages."""
    layer = Layer(gpu, 4, 2, 16, 8, dtype)
    least, most = -(2**31), 2**31 - 1
    rows, slots = layer.rows(8), torch.tensor([128, 0, -2, 2**40, 127, -(2**63), 5, 2**63 - 1])
    parents, states = [-2, 8, 1, least, most, 2, -1, 6], [0, 1, 1, 2, 3, 1, 4, 4]
    valid = [-1, -1, 1, -1, -1, 2, -1, 6], states
    results = [layer.mix(rows, parents, states, slots=slots)]
    written = layer.k_pages.clone(), layer.v_pages.clone()
    results.append(layer.mix(rows, *valid, slots=[-1, 0, -1, -1, 127, -1, 5, -1]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert same_bits(layer.k_pages, written[0])
    assert same_bits(layer.v_pages, written[1])

    layer.conv_states[3], layer.recurrent_states[3] = 0, 0
    unknown = [-1, STATES, most, least, 3, -1, STATES, most]
    results = [layer.mix(rows, valid[0], x) for x in (unknown, 3)]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@dtypes
def test_opcheck(cpu, dtype):
    opcheck("cca_mix", small_call(cpu, dtype))


def test_compiles_once_for_all_lengths(cpu):
    layer = Layer(cpu, 4, 2, 16, 8, torch.float32)
    first, then = (layer.call(layer.rows(T), range(-1, T - 1), slots=torch.arange(T)) for T in (33, 50))
    assert_compiles_once("cca_mix", first, then)
