"""LM head and choice beside `F.linear` with argmax, or with softmax and multinomial.

pytest bench/ops/lm_head_choose.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("variant", ["greedy", "temperature 0.8"])
def test_lm_head_choose(measure, variant, rows, implementation):
    measure(f"lm_head_choose {variant}", rows, implementation)
