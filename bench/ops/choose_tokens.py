"""Choice from logits beside argmax, or softmax and multinomial, in PyTorch.

pytest bench/ops/choose_tokens.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("variant", ["greedy", "temperature 0.8"])
def test_choose_tokens(measure, variant, rows, implementation):
    measure(f"choose_tokens {variant}", rows, implementation)
