"""Packing the experts of a quarter of a layer, as at load time, beside the reordering in plain PyTorch.

pytest bench/ops/pack_weight.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest
import torch

import blockdraft

E, N, K = 4, 4096, 2048
IMPLEMENTATIONS = {"blockdraft": blockdraft.ops.pack_weight, "torch": blockdraft.reference.pack_weight}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def test_pack_weight(benchmark, implementation):
    weight = torch.randn(E, N, K).bfloat16()
    benchmark.group = f"pack_weight E{E}-N{N}-K{K}"
    benchmark.pedantic(implementation, (weight, 2), rounds=5, warmup_rounds=1)
    benchmark.extra_info["threads"] = torch.get_num_threads()
