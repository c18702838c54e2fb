"""The experts of a layer, with uniform routing, beside a loop over `F.linear` per expert.

pytest bench/ops/moe_experts.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_moe_experts(measure, rows, implementation):
    measure("moe_experts", rows, implementation)
