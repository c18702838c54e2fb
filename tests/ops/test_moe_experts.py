from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import blockdraft
from blockdraft.ops.pack_weight import pack_scales
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
)


def int32(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


@dataclass
class Experts:
    """Experts with random weights, and rows with ids; id E is skip. `stored`: int8, fp8 or mxfp4, then H and I are
    rounded up to whole blocks."""

    backend: Any
    ids: Tensor
    H: int
    I: int  # noqa: E741
    E: int
    dtype: torch.dtype
    skip_identity: bool = False
    stored: str | None = None

    def __post_init__(self) -> None:
        T = len(self.ids)
        if self.stored == "mxfp4":
            self.H, self.I = self.H + -self.H % 32, self.I + -self.I % 32
        self.x = torch.randn(T, self.H).to(self.dtype)
        self.weights = torch.rand(T)
        self.gate_up = (2 * torch.randn(self.E, 2 * self.I, self.H) / self.H**0.5).to(self.dtype)
        self.down = (torch.randn(self.E, self.H, self.I) / self.I**0.5).to(self.dtype)
        self.scales: tuple[Tensor | None, Tensor | None] = None, None
        if self.stored == "mxfp4":
            self.set_mxfp4(random_mxfp4(self.gate_up), random_mxfp4(self.down))
        elif self.stored:
            to_bytes = to_int8 if self.stored == "int8" else to_fp8
            self.set_bytes(to_bytes(self.gate_up), to_bytes(self.down))

    def set_bytes(self, gate_up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> None:
        """Values ``[.., K]`` and scales ``[..]``; the weights become their products, in float64."""
        self.values, self.scales = (gate_up[0], down[0]), (gate_up[1], down[1])
        self.gate_up, self.down = (values.double() * scales.double()[..., None] for values, scales in (gate_up, down))

    def set_mxfp4(self, gate_up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> None:
        """Codes ``[.., K]`` and exponents ``[.., K / 32]``; the weights become what they say, in float64."""
        self.values = tuple(codes[..., ::2] | codes[..., 1::2] << 4 for codes, _ in (gate_up, down))
        self.scales = pack_scales(gate_up[1], 2), pack_scales(down[1])
        self.gate_up, self.down = (
            E2M1[codes.int()] * 2.0 ** (scales.double() - 127).repeat_interleave(32, -1)
            for codes, scales in (gate_up, down)
        )

    def call(self, pack: Any = None) -> dict[str, Any]:
        pack = pack or self.backend.op("pack_weight")
        gate_up, down = self.values if self.stored else (self.gate_up, self.down)
        return {
            "x": self.x,
            "topk_ids": int32(self.ids),
            "topk_weights": self.weights,
            "gate_up_proj": pack(weight=gate_up, halves=2),
            "down_proj": pack(weight=down, halves=1),
            "intermediate_size": self.I,
            "skip_identity": self.skip_identity,
            "gate_up_scales": self.scales[0],
            "down_scales": self.scales[1],
        }

    def run(self) -> Tensor:
        return self.backend.op("moe_experts")(**self.call())

    def in_float64(self) -> tuple[Tensor, Tensor]:
        """The result before its last rounding, and what float32 may be off. silu(gate) * up is rounded before:
        where float32 may fall on either side, the error holds both."""
        c, x, weights = self.backend.sum_constant, self.x.double(), self.weights.double()[:, None]
        out = weights * x if self.skip_identity else torch.zeros_like(x)
        error = U32 * out.abs()
        for e in set(self.ids.tolist()) - {self.E}:
            rows, gate_up, down = self.ids == e, self.gate_up[e].double(), self.down[e].double()
            gate, up = (x[rows] @ gate_up.T).chunk(2, -1)
            sums_error = sum_error(c, self.H, x[rows].abs() @ gate_up.abs().T)
            gate_error, up_error = (sums_error + self.scaling_error(x[rows] @ gate_up.T)).chunk(2, -1)
            gate_error = 1.1 * gate_error + (2 * gate.abs() + 8) * U32 * silu(gate).abs()  # of silu: its slope, its exp
            hidden = silu(gate) * up
            hidden_error = gate_error * (up.abs() + up_error) + silu(gate).abs() * up_error + U32 * hidden.abs() + 1e-37
            low, high = ((hidden + sign * hidden_error).to(self.dtype).double() for sign in (-1, 1))
            hidden, hidden_error = (low + high) / 2, (high - low) / 2
            sums_error = hidden_error @ down.abs().T + sum_error(c, self.I, hidden.abs() @ down.abs().T)
            out[rows] = weights[rows] * (hidden @ down.T)
            error[rows] = weights[rows] * sums_error + 2 * U32 * out[rows].abs() + self.scaling_error(out[rows])
        return out, error

    def scaling_error(self, scaled: Tensor) -> Tensor:
        return int(self.stored in ("int8", "fp8")) * U32 * scaled.abs()


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """127 is the largest of each row."""
    scales = weight.float().abs().amax(-1) / 127
    return (weight.float() / scales[..., None]).round().to(torch.int8), scales


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """448 is the largest of each row."""
    scales = weight.float().abs().amax(-1) / 448
    return (weight.float() / scales[..., None]).to(torch.float8_e4m3fn), scales


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)  # by code


def random_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and exponents of the size of the weights; their mean square is that of the codes by the scale's."""
    scale = weight.shape[-1] ** -0.5 / 3
    exponents = 127 + round(torch.tensor(scale).log2().item()) + torch.randint(-1, 2, (*weight.shape[:-1], 1))
    blocks = weight.shape[-1] // 32
    shifts = torch.randint(0, 2, (*weight.shape[:-1], blocks))
    return torch.randint(16, weight.shape, dtype=torch.uint8), (exponents + shifts).to(torch.uint8)


def assert_matches_float64(experts: Experts) -> None:
    out, (expected, error) = experts.run(), experts.in_float64()
    assert out.dtype == experts.dtype
    routed = experts.ids != experts.E
    assert_within(out[routed], expected[routed], error[routed])
    assert_within(out[~routed], expected[~routed], error[~routed], "skipped rows", zeros=not experts.skip_identity)


skips = pytest.mark.parametrize("skip_identity", [False, True], ids=["skip0", "skip-identity"])


@dtypes
@skips
@each_size(
    "T H I E",
    (0, 8, 8, 4),
    (1, 1, 1, 1),
    (3, 31, 33, 5),
    (33, 33, 31, 16),
    (7, 64, 32, 17),
    (64, 128, 64, 4),
    (130, 257, 65, 3),
    (130, 64, 96, 3),
    (16, 48, 352, 2),
)
def test_matches_float64(backend, T, H, I, E, skip_identity, dtype):  # noqa: E741
    experts = Experts(backend, torch.randint(E + 1, (T,)), H, I, E, dtype, skip_identity)
    if T == 1:
        experts.ids[0] = 0
    assert_matches_float64(experts)
    routed, (expected, error) = experts.ids != E, experts.in_float64()
    reference = blockdraft.reference.moe_experts(**experts.call(blockdraft.reference.pack_weight))
    assert_within(reference[routed], expected[routed], error[routed], "the definition")
    assert_no_worse_than_eager(experts.run()[routed], reference[routed], expected[routed])


@dtypes
@pytest.mark.parametrize("T", [1, 2, 5, 6, 7, 13, 16, 17, 47, 48, 49, 96, 97, 130])
@each_size("H I expert", (33, 40, 0), (64, 32, 4))
def test_all_rows_to_one_expert(backend, H, I, expert, T, dtype):  # noqa: E741
    """6 rows are a tile of the CPU kernel, 48 a block; 8, 16 or 48 a block of the GPU kernel. The other experts are
    NaN: their weights are not read."""
    experts = Experts(backend, torch.full((T,), expert), H, I, 5, dtype)
    others = torch.arange(5) != expert
    experts.gate_up[others], experts.down[others] = torch.nan, torch.nan
    assert_matches_float64(experts)


@dtypes
@each_size("T H I", (1, 20, 70), (2, 20, 70), (7, 64, 64), (64, 20, 70), (130, 64, 96), (9, 1088, 1056))
def test_matches_integers_exactly(backend, T, H, I, dtype):  # noqa: E741
    """A gate of 24 is its own silu in either dtype, so that gate * up are integers; so are all sums. 1088 and 1056
    are more steps of k than a warp of the GPU kernel has on their way."""
    E = 3
    experts = Experts(backend, torch.randint(E + 1, (T,)), H, I, E, dtype)
    experts.x = torch.randint(-1, 2, (T, H)).to(dtype)
    experts.x[:, -1] = 1
    experts.gate_up[:, :I] = 0
    experts.gate_up[:, :I, -1] = 24
    experts.gate_up[:, I:] = torch.randint(-1, 2, (E, I, H)).to(dtype) * (
        torch.arange(H) % (H // 8) == 0
    )  # at most 240
    experts.down = torch.randint(-4, 5, (E, H, I)).to(dtype)
    experts.weights = 2.0 ** torch.randint(-3, 3, (T,))
    up = torch.einsum("th,tih->ti", experts.x.double(), experts.gate_up[experts.ids % E, I:].double())
    expected = torch.einsum("ti,tio->to", 24 * up, experts.down[experts.ids % E].double().mT) * experts.weights[:, None]
    expected[experts.ids == E] = 0
    assert same_bits(experts.run(), (expected + 0.0).to(dtype))


@dtypes
@skips
@pytest.mark.parametrize("T", [1, 33])
def test_all_rows_skipped(backend, T, skip_identity, dtype):
    """No expert is touched, and the result is exact."""
    experts = Experts(backend, torch.full((T,), 5), 33, 40, 5, dtype, skip_identity)
    experts.gate_up.fill_(torch.nan), experts.down.fill_(torch.nan)
    expected = experts.weights[:, None] * experts.x.float() if skip_identity else torch.zeros(T, 33)
    assert same_bits(experts.run(), expected.to(dtype))


@dtypes
def test_skipped_nan_row_is_zero(backend, dtype):
    experts = Experts(backend, torch.tensor([5, 0, 5]), 33, 40, 5, dtype)
    experts.x[2] = torch.nan
    out = experts.run()
    assert not out[[0, 2]].any()
    assert out[1].isfinite().all()


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nan_stays_in_its_row(backend, value, dtype):
    experts = Experts(backend, torch.arange(20) % 3, 33, 41, 2, dtype)
    clean = experts.run()
    experts.x[7, 32] = value
    experts.weights[12] = torch.nan
    out = experts.run()
    assert not out[[7, 12]].isfinite().any()
    others = torch.tensor([i not in (7, 12) for i in range(20)])
    assert same_bits(out[others], clean[others])


@dtypes
@skips
def test_large_gates(backend, skip_identity, dtype):
    """Gates to +-500, where exp has left the range of float32."""
    experts = Experts(backend, torch.randint(4, (30,)), 64, 40, 3, dtype, skip_identity)
    experts.x *= 200
    assert_matches_float64(experts)


@dtypes
@skips
@each_size("H I E", (33, 40, 3), (256, 96, 5))
def test_batch_invariance(backend, H, I, E, skip_identity, dtype):  # noqa: E741
    call = Experts(backend, torch.randint(E + 1, (64,)), H, I, E, dtype, skip_identity).call()

    def run(rows: Tensor) -> tuple[Tensor]:
        chosen = {name: call[name][rows] for name in ("x", "topk_ids", "topk_weights")}
        return (backend.op("moe_experts")(**(call | chosen)),)

    assert_batch_invariant(run)


@dtypes
@each_size("H I", (33, 40), (320, 288))
def test_many_rows_have_the_bits_of_few(backend, H, I, dtype):  # noqa: E741
    """More than 64 rows are a kernel of its own on a GPU, and so are more than 8."""
    call = Experts(backend, torch.randint(4, (130,)), H, I, 3, dtype).call()
    together = backend.op("moe_experts")(**call)
    for begin, end in ((0, 3), (3, 19), (60, 124), (120, 130)):
        rows = {name: call[name][begin:end] for name in ("x", "topk_ids", "topk_weights")}
        assert same_bits(together[begin:end], backend.op("moe_experts")(**(call | rows)))


@dtypes
@skips
def test_ids_out_of_range(gpu, skip_identity, dtype):
    """Nothing is read or written outside the tensors, and the rows are NaN; the CPU raises. Fresh memory is what the
    good results left, not NaN."""
    experts = Experts(gpu, torch.arange(40) % 4, 33, 40, 3, dtype, skip_identity)
    clean, bad = experts.run(), torch.arange(40) % 7 == 2
    experts.ids[bad] = torch.tensor([-1, 4, 2**31 - 1, -(2**31), 5, -3])
    torch.use_deterministic_algorithms(False)
    good = clean.clone()
    call = experts.call()
    del good
    out = gpu.op("moe_experts")(**call)
    assert out[bad].isnan().all()
    assert same_bits(out[~bad], clean[~bad])


# Weights of one byte, and of half a byte.

stored = pytest.mark.parametrize("stored", ["int8", "fp8", "mxfp4"])


@dtypes
@stored
@each_size(
    "T H I E", (1, 1, 1, 1), (3, 31, 33, 5), (33, 33, 31, 16), (64, 128, 64, 4), (130, 64, 96, 3), (16, 48, 352, 2)
)
def test_stored_matches_float64(backend, T, H, I, E, stored, dtype):  # noqa: E741
    experts = Experts(backend, torch.randint(E + 1, (T,)), H, I, E, dtype, T % 2 == 0, stored)
    experts.ids[0] = 0
    assert_matches_float64(experts)
    (expected, error), routed = experts.in_float64(), experts.ids != E
    reference = blockdraft.reference.moe_experts(**experts.call(blockdraft.reference.pack_weight))
    assert_within(reference[routed], expected[routed], error[routed], "the definition")


@dtypes
@stored
@pytest.mark.parametrize("T", [1, 2, 5, 7, 8, 13, 17, 48, 49, 97, 130])
def test_stored_all_rows_to_one_expert(backend, T, stored, dtype):
    assert_matches_float64(Experts(backend, torch.full((T,), 3), 64, 33, 5, dtype, stored=stored))


@dtypes
def test_mxfp4_matches_floats_bit_by_bit(backend, dtype):
    """All codes, of the down projection with all scales; every number of rows. 320 and 288 are more pairs than a block
    of the CPU kernel, and panels that are not full."""
    experts = Experts(backend, torch.zeros(64, dtype=torch.int64), 320, 288, 2, dtype, stored="mxfp4")
    codes = torch.randint(16, (2, 320, 288), dtype=torch.uint8)
    scales = torch.randint(2, 253, (2, 320, 9), dtype=torch.uint8)
    scales[:, ::2] = torch.randint(110, 140, (2, 160, 9), dtype=torch.uint8)  # a sum of all scales is the largest alone
    scales[:, 1, 0], scales[:, 3, 0] = 2, 252
    gate_up = torch.randint(16, (2, 576, 320), dtype=torch.uint8), torch.full((2, 576, 10), 122, dtype=torch.uint8)
    experts.set_mxfp4(gate_up, (codes, scales))
    call, pack = experts.call(), backend.op("pack_weight")
    floats = {"gate_up_proj": experts.gate_up, "down_proj": experts.down}
    packed = {name: pack(weight=w.to(dtype), halves=1 + (name[0] == "g")) for name, w in floats.items()}
    assert torch.equal(experts.down, experts.down.to(dtype).double())  # exactly
    for T in backend.fewer(range(1, 65), (1, 7, 8, 9, 17, 33, 64)):
        rows = {name: call[name][:T] for name in ("x", "topk_ids", "topk_weights")}
        plain = packed | {"gate_up_scales": None, "down_scales": None}
        out, expected = (backend.op("moe_experts")(**(call | rows | weights)) for weights in ({}, plain))
        assert same_bits(out, expected)
    assert out.isfinite().double().mean() > 0.5


@dtypes
@pytest.mark.parametrize("T", [1, 5, 8, 9, 50])
def test_fp8_matches_floats_bit_by_bit(backend, T, dtype):
    """With scales of 1; all codes but NaN."""
    experts = Experts(backend, torch.zeros(T, dtype=torch.int64), 128, 70, 1, dtype, stored="fp8")
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].repeat(40)[: 128 * 70].view(1, 128, 70).view(torch.float8_e4m3fn)
    gate_up = (torch.randn(1, 140, 128) / 8).to(torch.float8_e4m3fn)
    experts.set_bytes((gate_up, torch.ones(1, 140)), (codes, torch.ones(1, 128)))
    assert experts.down.abs().max() == 448
    assert experts.down[experts.down > 0].min() == 2.0**-9
    call, pack = experts.call(), backend.op("pack_weight")
    plain = {
        "gate_up_proj": pack(weight=gate_up.to(dtype), halves=2),
        "down_proj": pack(weight=codes.to(dtype), halves=1),
    }
    expected = backend.op("moe_experts")(**(call | plain | {"gate_up_scales": None, "down_scales": None}))
    assert same_bits(backend.op("moe_experts")(**call), expected)


@dtypes
@each_size("T H I", (1, 20, 70), (7, 64, 64), (64, 20, 70), (130, 64, 96), (9, 1088, 1056))
def test_int8_matches_integers_exactly(backend, T, H, I, dtype):  # noqa: E741
    """As test_matches_integers_exactly; every byte from -127 to 127 is a weight, and every scale a power of two or the
    gate's 24."""
    E = 3
    experts = Experts(backend, torch.randint(E, (T,)), H, I, E, dtype, stored="int8")
    experts.x = torch.randint(-1, 2, (T, H)).to(dtype)
    experts.x[:, -1] = 1
    gate_up = torch.randint(-1, 2, (E, 2 * I, H)) * (torch.arange(H) % (H // 8) == 0)
    gate_up[:, :I] = 0
    gate_up[:, :I, -1] = 1
    gate_up_scales = 2.0 ** torch.randint(-3, 1, (E, 2 * I))
    gate_up_scales[:, :I] = 24
    down = torch.randint(-127, 128, (E, H, I))
    down.view(-1)[:255] = torch.arange(-127, 128)
    down_scales = 2.0 ** torch.randint(-9, -2, (E, H))
    experts.set_bytes((gate_up.to(torch.int8), gate_up_scales), (down.to(torch.int8), down_scales))
    experts.weights = 2.0 ** torch.randint(-3, 3, (T,))
    up = torch.einsum("th,tih->ti", experts.x.double(), experts.gate_up[experts.ids, I:])
    expected = torch.einsum("ti,tio->to", 24 * up, experts.down[experts.ids].mT) * experts.weights[:, None]
    assert same_bits(experts.run(), (expected + 0.0).to(dtype))


@dtypes
@stored
@each_size("H I E", (33, 40, 3), (256, 96, 5))
def test_stored_batch_invariance(backend, H, I, E, stored, dtype):  # noqa: E741
    call = Experts(backend, torch.randint(E + 1, (64,)), H, I, E, dtype, stored=stored).call()

    def run(rows: Tensor) -> tuple[Tensor]:
        chosen = {name: call[name][rows] for name in ("x", "topk_ids", "topk_weights")}
        return (backend.op("moe_experts")(**(call | chosen)),)

    assert_batch_invariant(run)


@dtypes
@stored
def test_stored_many_rows_have_the_bits_of_few(backend, stored, dtype):
    call = Experts(backend, torch.randint(4, (130,)), 320, 288, 3, dtype, stored=stored).call()
    together = backend.op("moe_experts")(**call)
    for begin, end in ((0, 3), (3, 19), (60, 124), (120, 130)):
        rows = {name: call[name][begin:end] for name in ("x", "topk_ids", "topk_weights")}
        assert same_bits(together[begin:end], backend.op("moe_experts")(**(call | rows)))


@each_wrong_call(
    {
        "no-scales": (
            {"gate_up_scales": None, "down_scales": None},
            "gate_up_scales must be a tensor with weights of Char, got None",
        ),
        "no-down-scales": ({"down_scales": None}, "down_scales must be a tensor with weights of Char, got None"),
        "one-float": ({"down_proj": Tensor.float}, "down_proj must be Char, got Float"),
        "other-float": ({"gate_up_proj": Tensor.float}, "down_proj must be Float, got Char"),
        "scales-of-halves": (
            {"gate_up_scales": lambda t: t[:, :40].clone()},
            r"gate_up_scales must be .*=80\], .*40\]",
        ),
        "scales-E": ({"down_scales": lambda t: t[:4]}, r"down_scales must be \[E=5, H=8\], got \[4, 8\]"),
        "scales-bfloat16": ({"down_scales": Tensor.bfloat16}, "down_scales must be Float, got BFloat16"),
    }
)
def test_int8_error_messages(backend, changes, message):
    assert_raises(backend, "moe_experts", small_call(backend, stored="int8"), changes, message)


@each_wrong_call(
    {
        "no-scales": (
            {"gate_up_scales": None, "down_scales": None},
            "gate_up_scales must be a tensor with weights of Float8_e4m3fn, got None",
        ),
        "one-int8": ({"down_proj": lambda t: t.view(torch.int8)}, "down_proj must be Float8_e4m3fn, got Char"),
        "scales-bfloat16": ({"down_scales": Tensor.bfloat16}, "down_scales must be Float, got BFloat16"),
    }
)
def test_fp8_error_messages(backend, changes, message):
    assert_raises(backend, "moe_experts", small_call(backend, stored="fp8"), changes, message)


@each_wrong_call(
    {
        "no-scales": (
            {"gate_up_scales": None, "down_scales": None},
            "gate_up_scales must be a tensor with weights of Byte, got None",
        ),
        "one-int8": ({"down_proj": lambda t: t.view(torch.int8)}, "down_proj must be Byte, got Char"),
        "scales-of-rows": (
            {"down_scales": torch.ones(5, 32)},
            r"down_scales must be \[E=5, ceil\(H / 32\)=1, I / 32=2, 32=32\], got \[5, 32\]",
        ),
        "scales-float": ({"down_scales": Tensor.float}, "down_scales must be Byte, got Float"),
        "odd-I": (
            {"intermediate_size": 40},
            "H and intermediate_size must be multiples of 32 with weights of Byte, got 32 and 40",
        ),
        "pairs": ({"gate_up_proj": lambda t: t[..., :16].clone()}, r"gate_up_proj must be .*32=32\], .*16\]"),
    }
)
def test_mxfp4_error_messages(backend, changes, message):
    assert_raises(backend, "moe_experts", small_call(backend, stored="mxfp4"), changes, message)


@each_wrong_call(
    {
        "gate-up": (
            {"gate_up_scales": torch.ones(5, 80)},
            "gate_up_scales must be None with weights of the dtype of x, got a tensor",
        ),
        "down": (
            {"down_scales": torch.ones(5, 8)},
            "down_scales must be None with weights of the dtype of x, got a tensor",
        ),
    }
)
def test_scales_without_int8(backend, changes, message):
    assert_raises(backend, "moe_experts", small_call(backend), changes, message)


@dtypes
@stored
def test_stored_opcheck(cpu, stored, dtype):
    opcheck("moe_experts", small_call(cpu, dtype, T=9, stored=stored))


# Errors.


def small_call(backend, dtype: torch.dtype = torch.float32, T: int = 3, stored: str | None = None) -> dict[str, Any]:
    return Experts(backend, torch.arange(T) % 6, 8, 40, 5, dtype, stored=stored).call()


@each_malformed_tensor("moe_experts")
def test_malformed_tensor(backend, changes, message):
    stored = "int8" if any(name.endswith("scales") for name in changes) else None
    assert_raises(backend, "moe_experts", small_call(backend, stored=stored), changes, message)


@each_wrong_call(
    {
        "float64": ({"x": Tensor.double}, "x must be Float or BFloat16, got Double"),
        "mixed": ({"x": Tensor.bfloat16}, "gate_up_proj must be BFloat16 or Char or Float8_e4m3fn or Byte, got Float"),
        "down-bfloat16": ({"down_proj": Tensor.bfloat16}, "down_proj must be Float, got BFloat16"),
        "ids-int64": ({"topk_ids": Tensor.long}, "topk_ids must be Int, got Long"),
        "ids": ({"topk_ids": int32([0])}, r"topk_ids must be \[T=3\], got \[1\]"),
        "weights": ({"topk_weights": torch.ones(4)}, r"topk_weights must be \[T=3\], got \[4\]"),
        "weights-bfloat16": ({"topk_weights": Tensor.bfloat16}, "topk_weights must be Float, got BFloat16"),
        "H": ({"x": torch.zeros(3, 10)}, r"gate_up_proj must be .*=5, .*, got \[5, 4, 4, 64\]"),
        "I": ({"intermediate_size": 70}, r"gate_up_proj must be .*=6, .*, got \[5, 4, 4, 64\]"),
        "I-of-down": ({"intermediate_size": 42}, r"down_proj must be .*=21, .*, got \[5, 1, 20, 64\]"),
        "E": ({"down_proj": lambda t: t[:4]}, r"down_proj must be \[E=5, .*, got \[4, 1, 20, 64\]"),
        "one-half": (
            {"gate_up_proj": lambda t: t[:, :2].clone()},
            r"gate_up_proj must be .*=4, .*, got \[5, 2, 4, 64\]",
        ),
        "I0": ({"intermediate_size": 0}, "intermediate_size must be positive, got 0"),
        "I-1": ({"intermediate_size": -1}, "intermediate_size must be positive, got -1"),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "moe_experts", small_call(backend), changes, message)


@each_wrong_call(
    {
        "id-1": ({"topk_ids": int32([0, -1, 5])}, r"topk_ids must be in \[0, 5\], got -1 at 1"),
        "id-E+1": ({"topk_ids": int32([0, 1, 6])}, r"topk_ids must be in \[0, 5\], got 6 at 2"),
        "id-2**31-1": ({"topk_ids": int32([2**31 - 1, 1, 5])}, r"topk_ids must be in \[0, 5\], got 2147483647 at 0"),
    }
)
def test_index_errors(cpu, changes, message):
    assert_raises(cpu, "moe_experts", small_call(cpu), changes, message)


def test_no_columns(backend):
    changes = {"x": torch.empty(3, 0), "gate_up_proj": torch.empty(5, 4, 0, 64), "down_proj": torch.empty(5, 0, 20, 64)}
    assert_raises(backend, "moe_experts", small_call(backend), changes, ".*positive.*")


# Registration.


@dtypes
@skips
def test_opcheck(cpu, skip_identity, dtype):
    opcheck("moe_experts", small_call(cpu, dtype, T=9) | {"skip_identity": skip_identity})


def test_compiles_once_for_all_lengths(cpu):
    assert_compiles_once("moe_experts", small_call(cpu, T=33), small_call(cpu, T=50))
