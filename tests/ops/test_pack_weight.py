import itertools

import pytest
import torch
from torch import Tensor

import blockdraft
from blockdraft.ops.pack_weight import pack_scales
from blockdraft.reference.pack_weight import unpack_scales, unpack_weight
from ops.helpers import (
    assert_compiles_once,
    assert_raises,
    each_malformed_tensor,
    each_wrong_call,
    opcheck,
    same_bits,
    threads,
)

SHAPES = [(1, 1), (1, 8), (31, 33), (32, 2), (33, 31), (64, 7), (200, 129), (3, 33, 5), (17, 40, 64), (0, 3, 4)]
HALVES = [(2, 1), (2, 8), (62, 33), (64, 2), (66, 31), (3, 130, 9)]
TYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
CASES = [(shape, 1) for shape in SHAPES] + [(shape, 2) for shape in HALVES]

each_shape = pytest.mark.parametrize(
    ("shape", "halves"), CASES, ids=["x".join(map(str, shape)) + f"-halves{halves}" for shape, halves in CASES]
)

dtypes = pytest.mark.parametrize("dtype", TYPES, ids=["float32", "bfloat16", "int8", "fp8"])


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-128, 128, shape).to(dtype) if dtype == torch.int8 else torch.randn(shape).to(dtype)


@dtypes
@each_shape
def test_matches_reference(backend, shape, halves, dtype):
    weight = random(*shape, dtype=dtype)
    packed = backend.op("pack_weight")(weight=weight, halves=halves)
    assert same_bits(packed, blockdraft.reference.pack_weight(weight, halves))
    assert packed.is_contiguous()


@dtypes
@each_shape
def test_unpacks_to_itself(backend, shape, halves, dtype):
    weight = random(*shape, dtype=dtype)
    packed = backend.op("pack_weight")(weight=weight, halves=halves)
    assert same_bits(unpack_weight(packed, *shape[-2:], halves), weight)


def test_layout(backend):
    """Written out once: output c and column k of panel p lie at [p, k // 2, 2 * c + k % 2], in float32 at
    [p, k // 2, 32 * (k % 2) + c]."""
    weight = torch.arange(1.0, 34 * 3 + 1).view(34, 3)

    def interleaved(c: int, k: int) -> int:
        return 2 * c + k % 2

    def apart(c: int, k: int) -> int:
        return 32 * (k % 2) + c

    for dtype, place in ((torch.bfloat16, interleaved), (torch.int8, interleaved), (torch.float32, apart)):
        packed = backend.op("pack_weight")(weight=weight.to(dtype), halves=1)
        assert packed.shape == (2, 2, 64)
        assert all(packed[n // 32, k // 2, place(n % 32, k)] == weight[n, k] for n in range(34) for k in range(3))
        assert (packed != 0).sum() == weight.numel()


@dtypes
def test_copies_every_bit_pattern(backend, dtype):
    """Denormals, -0, infinities and NaN payloads pass as they are."""
    if dtype == torch.bfloat16:
        weight = torch.arange(-(2**15), 2**15).short().view(dtype).view(256, 256)
    else:
        weight = torch.randint(-(2**31), 2**31, (256, 64 * dtype.itemsize)).int().view(dtype)
    assert same_bits(unpack_weight(backend.op("pack_weight")(weight=weight, halves=1), 256, 256), weight)


@dtypes
def test_threads_do_not_matter(backend, dtype):
    weight = random(3, 320, 50, dtype=dtype)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(backend.op("pack_weight")(weight=weight, halves=2))
    assert same_bits(*results)


# Codes of MXFP4, two in a byte, and their scales.

each_code_shape = pytest.mark.parametrize(
    ("shape", "halves"), [((1, 16), 1), ((33, 48), 1), ((2, 32, 256), 1), ((3, 70, 80), 2), ((0, 3, 16), 1)]
)


@each_code_shape
def test_codes_match_reference(backend, shape, halves):
    weight = torch.randint(256, shape, dtype=torch.uint8)
    packed = backend.op("pack_weight")(weight=weight, halves=halves)
    assert same_bits(packed, blockdraft.reference.pack_weight(weight, halves))
    assert same_bits(unpack_weight(packed, *shape[-2:], halves), weight)


def test_codes_layout(backend):
    """Written out once: code (c, k) is nibble k // 2 % 4 of word [k // 8, c, k % 2] of its panel."""
    codes = torch.randint(16, (34, 32))
    packed = backend.op("pack_weight")(weight=(codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), halves=1)
    assert packed.shape == (2, 16, 32)
    words = packed.view(torch.int16).view(2, 4, 32, 2).int()
    for n in range(34):
        for k in range(32):
            assert words[n // 32, k // 8, n % 32, k % 2] >> 4 * (k // 2 % 4) & 15 == codes[n, k]
    assert not words[1, :, 2:].any()


def test_codes_want_whole_blocks(backend):
    message = "weight of Byte, two columns each, must have whole blocks of 32 columns, got 40"
    assert_raises(backend, "pack_weight", {"weight": torch.zeros(4, 20, dtype=torch.uint8), "halves": 1}, {}, message)


@pytest.mark.parametrize(("N", "halves"), [(64, 1), (33, 1), (70, 2)])
def test_scales(N, halves):
    scales = torch.randint(2, 253, (3, N, 5), dtype=torch.uint8)
    packed = pack_scales(scales, halves)
    assert packed.shape == (3, halves * -(-N // halves // 32), 5, 32)
    for e, n, b in itertools.product(range(3), range(N), range(5)):
        half, row = divmod(n, N // halves)
        assert packed[e, row // 32 * halves + half, b, row % 32] == scales[e, n, b]
    assert same_bits(unpack_scales(packed, N, halves), scales)
    assert pack_scales(torch.ones(3, N, 1), halves).shape == (3, N)


@pytest.mark.parametrize("shape", [(40, 16), (3, 40, 48)], ids=["matrix", "stack"])
def test_codes_opcheck(shape):
    opcheck("pack_weight", {"weight": torch.randint(256, shape, dtype=torch.uint8), "halves": 2})


def arguments(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | int]:
    return {"weight": random(*shape, dtype=dtype), "halves": 1}


@each_malformed_tensor("pack_weight")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "pack_weight", arguments(3, 4, 6), changes, message)


@each_wrong_call(
    {
        "vector": ({"weight": lambda t: t[0]}, r"weight must be \[N, K\], got \[6\]"),
        "rank4": ({"weight": lambda t: t[None, None]}, r"weight must be \[N, K\], got \[1, 1, 4, 6\]"),
        "float64": (
            {"weight": Tensor.double},
            "weight must be Float or BFloat16 or Char or Float8_e4m3fn or Byte, got Double",
        ),
        "transposed": ({"weight": Tensor.t}, "weight must be contiguous"),
        "halves0": ({"halves": 0}, "halves must be 1 or 2, got 0"),
        "halves3": ({"halves": 3}, "halves must be 1 or 2, got 3"),
        "odd-N": (
            {"weight": lambda t: t[:3], "halves": 2},
            r"weight must have rows divisible by halves=2 and at least one column, got \[3, 6\]",
        ),
        "K0": (
            {"weight": lambda t: t[:, :0].clone()},
            r"weight must have rows divisible by halves=1 and at least one column, got \[4, 0\]",
        ),
        "N0": (
            {"weight": lambda t: t[:0]},
            r"weight must have rows divisible by halves=1 and at least one column, got \[0, 6\]",
        ),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "pack_weight", arguments(4, 6), changes, message)


@dtypes
@pytest.mark.parametrize("shape", [(40, 5), (3, 40, 5)], ids=["matrix", "stack"])
def test_opcheck(shape, dtype):
    opcheck("pack_weight", arguments(*shape, dtype=dtype) | {"halves": 2})


def test_compiles_once_for_all_sizes():
    assert_compiles_once("pack_weight", arguments(40, 7), arguments(65, 12))
    assert_compiles_once("pack_weight", arguments(3, 40, 7), arguments(5, 65, 12))
