import torch
from torch import Tensor

import blockdraft
from ops.helpers import (
    assert_batch_invariant,
    assert_compiles_once,
    assert_raises,
    dtypes,
    each_malformed_tensor,
    each_size,
    each_wrong_call,
    opcheck,
    same_bits,
    untouched,
)


def make_arguments(backend, weight: Tensor, token_ids: list[int] | Tensor) -> dict[str, Tensor | int]:
    V, H = weight.shape
    return {
        "token_ids": torch.as_tensor(token_ids, dtype=torch.int32),
        "packed_weight": backend.op("pack_weight")(weight=weight, halves=1),
        "num_embeddings": V,
        "embedding_dim": H,
    }


@dtypes
@each_size("T V H", (0, 5, 4), (1, 1, 1), (3, 31, 33), (40, 33, 64), (7, 100, 7), (65, 262, 2))
def test_matches_reference_and_matrix(backend, T, V, H, dtype):
    weight = torch.randn(V, H).to(dtype)
    token_ids = torch.randint(V, (T,))
    token_ids[:2] = torch.tensor([V - 1, 0])[:T]  # the ends
    out = backend.op("packed_embedding")(**make_arguments(backend, weight, token_ids))
    assert out.shape == (T, H)
    assert same_bits(out, weight[token_ids])
    packed = blockdraft.reference.pack_weight(weight)
    assert same_bits(out, blockdraft.reference.packed_embedding(token_ids, packed, V, H))


@dtypes
def test_batch_invariance(backend, dtype):
    weight, token_ids = torch.randn(100, 33).to(dtype), torch.randint(100, (64,))
    call = make_arguments(backend, weight, token_ids)

    def run(indices: Tensor) -> tuple[Tensor]:
        return (backend.op("packed_embedding")(**(call | {"token_ids": call["token_ids"][indices]})),)

    assert_batch_invariant(run)


@dtypes
def test_nan_stays_in_its_row(backend, dtype):
    weight = torch.randn(40, 6).to(dtype)
    weight[[31, 33]] = torch.nan
    out = backend.op("packed_embedding")(**make_arguments(backend, weight, [30, 31, 32, 33, 34]))
    assert out.isnan().all(-1).tolist() == [False, True, False, True, False]
    assert not out[::2].isnan().any()


@each_malformed_tensor("packed_embedding")
def test_malformed_tensor(backend, changes, message):
    call = make_arguments(backend, torch.randn(40, 6), [1, 2, 3])
    assert_raises(backend, "packed_embedding", call, changes, message)


@each_wrong_call(
    {
        "ids-int64": ({"token_ids": Tensor.long}, "token_ids must be Int, got Long"),
        "ids-matrix": ({"token_ids": lambda t: t[None]}, r"token_ids must be \[T\], got \[1, 3\]"),
        "pair": (
            {"packed_weight": lambda t: t[..., :32].clone()},
            r"packed_weight must be \[.*64.*\], got \[2, 3, 32\]",
        ),
        "panels": ({"num_embeddings": 65}, "panels of packed_weight must be 3, got 2"),
        "pairs": ({"embedding_dim": 7}, "pairs of packed_weight must be 4, got 3"),
    }
)
def test_error_messages(backend, changes, message):
    call = make_arguments(backend, torch.randn(40, 6), [1, 2, 3])
    assert_raises(backend, "packed_embedding", call, changes, message)


@each_wrong_call(
    {
        "negative": ({"token_ids": torch.tensor([0, -1]).int()}, r"token_ids must be in \[0, 39\], got -1 at 1"),
        "V": ({"token_ids": torch.tensor([40]).int()}, r"token_ids must be in \[0, 39\], got 40 at 0"),  # in the panel
        "large": (
            {"token_ids": torch.tensor([2**31 - 1]).int()},
            r"token_ids must be in \[0, 39\], got 2147483647 at 0",
        ),
    }
)
def test_index_errors(cpu, changes, message):
    assert_raises(cpu, "packed_embedding", make_arguments(cpu, torch.randn(40, 6), [1]), changes, message)


@dtypes
def test_gpu_gives_zeros_for_ids_out_of_range(gpu, dtype):
    weight, ids = torch.randn(40, 6).to(dtype), [-1, 3, 40, 63, 64, 2**31 - 1, -(2**31), 39]
    out = gpu.op("packed_embedding")(**make_arguments(gpu, weight, ids))
    assert same_bits(out[[1, 7]], weight[[3, 39]])
    assert same_bits(out[[0, 2, 3, 4, 5, 6]], torch.zeros(6, 6).to(dtype))


def test_row_beyond_32_bits(backend):
    """Of 2^31 elements and more, which are never touched but for the last panel."""
    V, H = 2**20 + 32, 2**11
    packed = untouched(V // 32, H // 2, 64, dtype=torch.bfloat16)
    panel = torch.randn(32, H).bfloat16()
    packed[-1] = blockdraft.reference.pack_weight(panel)[0]
    call = {"token_ids": torch.tensor([V - 1, V - 32], dtype=torch.int32), "packed_weight": packed}
    out = backend.op("packed_embedding")(**call, num_embeddings=V, embedding_dim=H)
    assert same_bits(out, panel[[31, 0]])


@dtypes
def test_opcheck(cpu, dtype):
    opcheck("packed_embedding", make_arguments(cpu, torch.randn(40, 6).to(dtype), [1, 2, 3]))


def test_compiles_once_for_all_lengths(cpu):
    weight = torch.randn(40, 6)
    first, then = (make_arguments(cpu, weight, torch.arange(T)) for T in (33, 37))
    assert_compiles_once("packed_embedding", first, then)
