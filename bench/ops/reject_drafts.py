"""Rejection sampling of drafts beside softmax, cumsum and searchsorted in PyTorch.

pytest bench/ops/reject_drafts.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_reject_drafts(measure, rows, implementation):
    measure("reject_drafts", rows, implementation)
