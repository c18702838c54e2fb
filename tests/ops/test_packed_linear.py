import pytest
import torch
from torch import Tensor

import blockdraft
from ops.helpers import (
    assert_batch_invariant,
    assert_compiles_once,
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

# 6 rows are a tile of the CPU kernel, 48 a block of rows, 128 pairs of k a block of the panel.
SIZES = [
    (0, 8, 8),
    (1, 1, 1),
    (1, 64, 33),
    (2, 31, 31),
    (3, 33, 100),
    (5, 2, 32),
    (6, 255, 40),
    (7, 257, 65),
    (13, 600, 7),
    (48, 256, 32),
    (49, 258, 64),
    (97, 513, 33),
]


def make_arguments(backend, x: Tensor, weight: Tensor, out_float32: bool = False) -> dict[str, Tensor | int | bool]:
    packed = backend.op("pack_weight")(weight=weight, halves=1)
    return {"x": x, "packed_weight": packed, "out_features": weight.shape[0], "out_float32": out_float32}


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    packed = blockdraft.reference.pack_weight(weight.double())
    return blockdraft.reference.packed_linear(x.double(), packed, weight.shape[0])


out_types = pytest.mark.parametrize("out_float32", [False, True], ids=["same", "out_float32"])


@dtypes
@out_types
@each_size("T K N", *SIZES, (3, 8192, 33))
def test_matches_integers_exactly(backend, T, K, N, out_float32, dtype):
    """Sums of small integers have no rounding, so that any order gives the rounded sum."""
    x, weight = torch.randint(-4, 5, (T, K)).to(dtype), torch.randint(-4, 5, (N, K)).to(dtype)
    out = backend.op("packed_linear")(**make_arguments(backend, x, weight, out_float32))
    assert out.dtype == (torch.float32 if out_float32 else dtype)
    assert same_bits(out, (exact_product(x, weight) + 0.0).to(out.dtype))


def outlier(x: Tensor) -> Tensor:
    return x.index_fill(-1, torch.tensor([x.shape[-1] // 2]), 100)


@dtypes
@out_types
@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: 1e-4 * x, lambda x: 1e4 * x, outlier], ids=["normal", "small", "large", "outlier"]
)
@each_size("T K N", *SIZES)
def test_matches_float64(backend, T, K, N, change, out_float32, dtype):
    x, weight = change(torch.randn(T, K)).to(dtype), torch.randn(N, K).to(dtype)
    out = backend.op("packed_linear")(**make_arguments(backend, x, weight, out_float32))
    magnitude = x.double().abs() @ weight.double().abs().T
    assert_within(out, exact_product(x, weight), sum_error(backend.sum_constant, K, magnitude))


@dtypes
@out_types
@each_size("K N", (33, 40), (512, 200))
def test_batch_invariance(backend, K, N, out_float32, dtype):
    x = torch.randn(64, K).to(dtype)
    call = make_arguments(backend, x, torch.randn(N, K).to(dtype), out_float32)
    assert_batch_invariant(lambda rows: (backend.op("packed_linear")(**(call | {"x": x[rows]})),))


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nan_stays_in_its_row(backend, value, dtype):
    x, weight = torch.randn(9, 33).to(dtype), torch.randn(40, 33).to(dtype)
    call = make_arguments(backend, x, weight)
    clean = backend.op("packed_linear")(**call)
    x[4, 32] = value
    out = backend.op("packed_linear")(**call)
    assert not out[4].isfinite().any()
    others = torch.arange(9) != 4
    assert same_bits(out[others], clean[others])


def test_nan_weight_stays_in_its_output(backend):
    """Also where it shares a panel with the zeros of missing rows and of an odd last column."""
    x, weight = torch.randn(9, 33), torch.randn(40, 33)
    weight[37, 32] = torch.nan
    out = backend.op("packed_linear")(**make_arguments(backend, x, weight))
    assert out.isnan().all(0).tolist() == [n == 37 for n in range(40)]
    assert out.isnan().sum() == 9


def call(backend) -> dict[str, Tensor | int | bool]:
    return make_arguments(backend, torch.randn(4, 6), torch.randn(40, 6))


@each_malformed_tensor("packed_linear")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "packed_linear", call(backend), changes, message)


@each_wrong_call(
    {
        "rank": ({"x": lambda t: t[0]}, r"x must be \[T, K\], got \[6\]"),
        "float64": ({"x": Tensor.double}, "x must be Float or BFloat16, got Double"),
        "mixed": ({"x": Tensor.bfloat16}, "packed_weight must be BFloat16, got Float"),
        "unpacked": (
            {"packed_weight": lambda t: t[0]},
            r"packed_weight must be \[panels, pairs, 64=64\], got \[3, 64\]",
        ),
        "K": ({"x": torch.randn(4, 7)}, "pairs of packed_weight must be 4, got 3"),
        "N": ({"out_features": 65}, "panels of packed_weight must be 3, got 2"),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "packed_linear", call(backend), changes, message)


def test_no_columns(backend):
    changes = {"x": torch.empty(4, 0), "packed_weight": torch.empty(2, 0, 64)}
    assert_raises(backend, "packed_linear", call(backend), changes, ".*positive.*")


@dtypes
@out_types
def test_opcheck(cpu, out_float32, dtype):
    opcheck(
        "packed_linear", make_arguments(cpu, torch.randn(4, 6).to(dtype), torch.randn(40, 6).to(dtype), out_float32)
    )


@out_types
def test_compiles_once_for_all_lengths(cpu, out_float32):
    weight = torch.randn(40, 6)
    first, then = (make_arguments(cpu, torch.randn(T, 6), weight, out_float32) for T in (33, 50))
    assert_compiles_once("packed_linear", first, then)
