"""The experts of a layer, with uniform routing, beside a loop over `F.linear` per expert.

pytest bench/ops/moe_experts.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest

from blockdraft.model.expert_formats import EXPERT_FORMATS


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("label", ["moe_experts", *(f"moe_experts, {experts}" for experts in EXPERT_FORMATS)])
def test_moe_experts(measure, label, rows, implementation):
    measure(label, rows, implementation)
