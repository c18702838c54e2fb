"""A block of causal rows and its mask groups beside `F.scaled_dot_product_attention` on gathered keys.

pytest bench/ops/block_attention.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("variant", ["context 512", "context 8192"])
def test_block_attention(measure, variant, rows, implementation):
    measure(f"block_attention {variant}", rows, implementation)
