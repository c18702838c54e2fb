"""Acceptance of drafts beside comparison and cumprod in PyTorch.

pytest bench/ops/verify_tokens.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_verify_tokens(measure, rows, implementation):
    measure("verify_tokens", rows, implementation)
