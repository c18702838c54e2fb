"""Rows of the tied embedding, packed as the LM head reads it, beside `F.embedding` of the plain matrix.

pytest bench/ops/packed_embedding.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import blockdraft

V, H = 262272, 2048


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    plain = torch.empty(V, H, dtype=torch.bfloat16).normal_()
    return {"blockdraft": blockdraft.ops.pack_weight(plain), "torch": plain}


def blockdraft_rows(ids: Tensor, weight: Tensor) -> Tensor:
    return blockdraft.ops.packed_embedding(ids, weight, V, H)


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_packed_embedding(benchmark, weights, rows, implementation):
    """New random ids for every call, so that their rows are cold."""
    weight, call = weights[implementation], {"blockdraft": blockdraft_rows, "torch": F.embedding}[implementation]

    def arguments() -> tuple[tuple[Tensor, Tensor], dict]:
        return (torch.randint(V, (rows,), dtype=torch.int32), weight), {}

    benchmark.group = f"packed_embedding, {rows} rows"
    with torch.inference_mode():
        benchmark.pedantic(call, setup=arguments, rounds=100, warmup_rounds=2)
    benchmark.extra_info["threads"] = torch.get_num_threads()
