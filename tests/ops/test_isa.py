"""The CPU kernels are compiled once per instruction set, and the best one of the machine runs in all other tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import blockdraft

REPOSITORY = Path(__file__).parents[2]
ISAS = ["base", "avx2", "avx512", "avx512bf16"]
LOWER = ISAS[: ISAS.index(blockdraft.cpu_isa())]


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BLOCKDRAFT_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.skipif(not LOWER, reason="this machine has the lowest instruction set alone")
@pytest.mark.parametrize("isa", LOWER)
def test_agreement_on_lower_isa(isa):
    """The agreement and invariance tests of every operator, in a process with this instruction set."""
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_*.py")) if path != Path(__file__)]
    chosen = "(matches or batch_invariance or law_of) and not warp32 and not warp64 and not gpu"
    result = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.parametrize("isa", ISAS)
def test_variable_lowers_and_never_raises(isa):
    result = run(isa, "-c", "import blockdraft; print(blockdraft.cpu_isa())")
    assert result.stdout.strip() == min(isa, blockdraft.cpu_isa(), key=ISAS.index)


PACK = "import torch, blockdraft; blockdraft.ops.pack_weight(torch.ones({rows}, 64), 1)"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import blockdraft; blockdraft.cpu_isa()", id="cpu_isa"),
        pytest.param(PACK.format(rows=4), id="operator"),
        pytest.param(PACK.format(rows=4096), id="operator-in-threads"),
    ],
)
def test_unknown_isa_raises(code):
    result = run("sse9", "-c", code)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        "RuntimeError: BLOCKDRAFT_CPU_ISA must be base, avx2, avx512 or avx512bf16, got sse9"
    )


def test_empty_variable_is_none():
    assert run("", "-c", "import blockdraft; print(blockdraft.cpu_isa())").stdout.strip() == blockdraft.cpu_isa()
