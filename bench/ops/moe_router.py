"""The router of a layer beside its linear layers, norm and softmax in PyTorch.

pytest bench/ops/moe_router.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_moe_router(measure, rows, implementation):
    measure("moe_router", rows, implementation)
