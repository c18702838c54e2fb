"""The joint projection and the output projection beside `F.linear`.

pytest bench/ops/packed_linear.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("variant", ["qkv 2048->1536", "o 1024->2048"])
def test_packed_linear(measure, variant, rows, implementation):
    measure(f"packed_linear {variant}", rows, implementation)
