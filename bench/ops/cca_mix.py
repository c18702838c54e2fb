"""Compressed convolutional attention's mixing beside conv1d, norms and rotary embedding in PyTorch.

pytest bench/ops/cca_mix.py --benchmark-columns=median,iqr,rounds --benchmark-json=out.json
"""

import pytest


@pytest.mark.parametrize("implementation", ["blockdraft", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_cca_mix(measure, rows, implementation):
    measure("cca_mix", rows, implementation)
