"""A part of the emulated tests of each operator under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulated

ROOT = Path(__file__).parents[2]
ONE_IN = 8  # emulated threads run about three times slower so

OVERRUN = """
import torch
from gpu_emulator import build
build.load(32)
torch.ops.blockdraft_warp32.overrun(torch.zeros(256))
"""


@pytest.fixture(scope="module")
def environment():
    """Of a python whose extension modules may use the sanitizers."""
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.run(["c++", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    libraries = [path.strip() for path in found]
    if not Path(libraries[0]).is_absolute():
        pytest.skip("the compiler has no libasan.so that could be loaded into python; g++ has")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [kept.get("PYTHONPATH")])])
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}  # python itself leaks
    return kept | options | {"LD_PRELOAD": " ".join(libraries), "BLOCKDRAFT_SANITIZE": "address,undefined"}


def run(environment, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def every_eighth_test() -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "emulated", "tests/ops"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    tests = [line for line in lines if "::" in line]
    by_function = groupby(tests, key=lambda test: test.partition("[")[0])
    return [test for _, group in by_function for test in list(group)[::ONE_IN]]


def test_overrun_is_found(environment):
    result = run(environment, "-c", OVERRUN)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr, result.stderr


def test_operators_are_clean(environment, tmp_path):
    tests = every_eighth_test()
    (tmp_path / "tests").write_text("\n".join(tests))
    # -s: pytest's capture would swallow a sanitizer's report.
    options = ["-s", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = run(environment, "-m", "pytest", *options, f"@{tmp_path / 'tests'}")
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-20000:]
    assert f"{len(tests)} passed" in result.stdout
