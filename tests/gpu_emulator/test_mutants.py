"""The operators' tests must fail where a barrier is missing, on a copy of the kernels from which it was taken.

Each mutant costs a build of one operator for one warp size, and its tests up to the first failure.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulated

ROOT = Path(__file__).parents[2]
BARRIER = re.compile(r"^(?!\s*//)(.*)__syncthreads\(\);", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A barrier to remove.

    Attributes:
        operator: Of which `csrc/gpu/<operator>.cu` is built and the tests are run; None for the emulator's own tests.
        file: In csrc/gpu.
        barrier: Which `__syncthreads();` of the file, counted from 1.
        warp: Threads of a warp.
        tests: What to select of the tests, as pytest's -k; all by default.
    """

    operator: str | None
    file: str
    barrier: int
    warp: int = 32
    tests: str = ""

    def __str__(self) -> str:
        return f"{self.operator or 'emulator'}-{self.file}-{self.barrier}-warp{self.warp}"


MUTANTS = [
    Mutant("residual_norm", "device/reduce.cuh", 1),
    Mutant("residual_norm", "device/reduce.cuh", 1, warp=64),
    Mutant(None, "device/reduce.cuh", 2, tests="block_sum"),  # residual_norm takes one sum only
    Mutant(None, "device/reduce.cuh", 2, warp=64, tests="block_sum"),
    # Without the first barrier of arrive.cuh the second one still orders what is written in a block.
    Mutant(None, "device/arrive.cuh", 2, tests="arrives"),
    Mutant(None, "device/arrive.cuh", 2, warp=64, tests="arrives"),
    Mutant("packed_linear", "device/panel.cuh", 2),  # the first is for operators that give their rows in parts
    Mutant("packed_linear", "device/panel.cuh", 2, warp=64),
    Mutant("moe_experts", "moe_experts.cu", 1),
    Mutant("moe_experts", "moe_experts.cu", 2, warp=64),
    Mutant("moe_experts", "device/panel.cuh", 1),
    Mutant("cca_mix", "cca_mix.cu", 1),
    Mutant("cca_mix", "cca_mix.cu", 2, warp=64),
    Mutant("cca_mix", "cca_mix.cu", 3),
    Mutant("cca_mix", "cca_mix.cu", 4, warp=64),
    Mutant("choose_tokens", "device/reduce.cuh", 2, tests="reference"),
    Mutant("reject_drafts", "device/token_law.cuh", 1, warp=64, tests="reference"),
    Mutant("reject_drafts", "device/token_law.cuh", 2, tests="reference"),
    Mutant("moe_router", "moe_router.cu", 1),
    Mutant("moe_router", "moe_router.cu", 2, warp=64),
    Mutant("moe_router", "moe_router.cu", 3),
    Mutant("moe_router", "moe_router.cu", 4, warp=64),
    Mutant("lm_head_choose", "device/panel.cuh", 2),
    Mutant("lm_head_choose", "device/reduce.cuh", 2, warp=64),
    Mutant("block_attention", "block_attention.cu", 4),
    Mutant("block_attention", "block_attention.cu", 8),
    Mutant("block_attention", "block_attention.cu", 9, warp=64),
    Mutant("block_attention", "block_attention.cu", 11, warp=64),
    Mutant("block_attention", "block_attention.cu", 13, tests="batch_invariance"),
]


def without_barrier(text: str, number: int) -> str:
    found = list(BARRIER.finditer(text))
    assert 1 <= number <= len(found), f"there is no barrier {number}, there are {len(found)}"
    at = found[number - 1]
    return text[: at.start()] + at[1] + "(void)0;" + text[at.end() :]


def copy_sources(folder: Path, operator: str | None) -> None:
    for part in ("common", "ops", "gpu/device"):
        shutil.copytree(ROOT / "csrc" / part, folder / "csrc" / part)
    if operator:
        shutil.copy(ROOT / "csrc" / "gpu" / f"{operator}.cu", folder / "csrc" / "gpu")


def selection_of(mutant: Mutant) -> list[str]:
    file = f"tests/ops/test_{mutant.operator}.py" if mutant.operator else "tests/gpu_emulator/test_emulator.py"
    return [file, "-k", " and ".join([f"warp{mutant.warp}", *filter(None, [mutant.tests])])]


def run_tests(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Until the first failure, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"BLOCKDRAFT_EMULATED_COPY": str(folder), "BLOCKDRAFT_SANITIZE": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *tests,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_tests_fail_without_the_barrier(mutant, tmp_path):
    copy_sources(tmp_path, mutant.operator)
    file = tmp_path / "csrc" / "gpu" / mutant.file
    original = file.read_text()
    file.write_text(without_barrier(original, mutant.barrier))
    result = run_tests(tmp_path, selection_of(mutant))
    failed = re.search(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
    assert failed, f"no test failed without the barrier\n{result.stdout}{result.stderr}"

    # And for no other reason.
    file.write_text(original)
    result = run_tests(tmp_path, [failed[1]])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout
