"""The commit of the CCA states of all layers beside indexed copies in PyTorch.

pytest bench/ops/commit_states.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_commit_states(measure, rows, implementation):
    measure("commit_states", rows, implementation)
