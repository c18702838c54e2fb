"""scripts/gpu_check.sh without a GPU: that it stops and, with stand-ins for its tools, that it reports what ran."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"

# A python that finds every module and a GPU, and runs the report alone.
PYTHON = """\
#!/bin/bash
case "$*" in
  *torch.version.cuda\\ else*) echo cuda ;;
  *gpu_report.py*) exec {python} "$@" ;;
  -m\\ pytest*) {tests} ;;
esac
"""
CMAKE = '#!/bin/bash\nif [ "$1" = --build ]; then touch "$2"/_{cpu,cuda,host}.so; else mkdir -p "$out/build"; fi\n'


def run(tmp_path, **variables):
    """The script and what it reports; None where it writes no report."""
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    result = subprocess.run([SCRIPT, out], env=environment, capture_output=True, text=True)
    report = out / "report.json"
    return result, json.loads(report.read_text()) if report.exists() else None


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Writes a stand-in into a folder at the front of PATH."""

    def write(name, text):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    write("cmake", CMAKE)
    write("ninja", "#!/bin/sh\n")
    write("compute-sanitizer", "#!/bin/sh\n[ $2 != racecheck ]\n")
    return write


def test_stops_without_a_gpu(tmp_path):
    result, report = run(tmp_path, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert result.stderr.startswith("gpu_check: no GPU that torch can use.")
    assert report is None


def test_stops_without_torch(tmp_path, tools):
    result, report = run(tmp_path, PYTHON=tools("python", "#!/bin/sh\nexit 1\n"))
    assert (result.returncode, report) == (2, None)
    assert result.stderr.rstrip().endswith("has no torch")


def test_says_which_stage_failed(tmp_path, tools):
    result, report = run(tmp_path, PYTHON=tools("python", PYTHON.format(python=sys.executable, tests="exit 3")))
    assert result.returncode == 1, result.stderr
    came_to = {stage["stage"]: stage["result"] for stage in report["stages"]}
    assert came_to.pop("tests") == came_to.pop("generation") == came_to.pop("sanitizer-racecheck") == "failed"
    assert set(came_to) == {"build", "bench", "sanitizer-memcheck", "sanitizer-synccheck", "sanitizer-initcheck"}
    assert set(came_to.values()) == {"passed"}
    assert report["tests"] is None
    assert report["bench"] is None
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| tests | failed |" in text
    assert "Tests on the GPU: no result. Of generation: no result." in text
    assert "No measurements." in text
    assert "Not run, or not to the end: none." in text


def test_cuts_off_and_leaves_out_what_does_not_fit(tmp_path, tools):
    python = tools("python", PYTHON.format(python=sys.executable, tests="exec sleep 60"))
    result, report = run(tmp_path, PYTHON=python, BUDGET="13")
    assert result.returncode == 1, result.stderr
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert stages["tests"]["result"] == "cut off"
    left_out = {name for name, stage in stages.items() if stage["result"] == "skipped"}
    assert left_out == {
        "generation",
        "bench",
        *(f"sanitizer-{tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")),
    }
    assert (
        "Not run, or not to the end: tests, generation, bench, sanitizer-memcheck"
        in (tmp_path / "out" / "report.md").read_text()
    )


def test_without_a_build_nothing_runs(tmp_path, tools):
    tools("cmake", "#!/bin/sh\nexit 1\n")
    result, report = run(tmp_path, PYTHON=tools("python", PYTHON.format(python=sys.executable, tests="exit 0")))
    assert result.returncode == 1, result.stderr
    assert [stage["result"] for stage in report["stages"]] == ["failed"] + ["skipped"] * 7
    assert {stage["reason"] for stage in report["stages"][1:]} == {"not built"}


def test_shell_is_clean():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)


def test_cases_call_every_operator_with_a_kernel(monkeypatch, capsys):
    """With the CPU in the GPU's place."""
    import gpu_cases

    monkeypatch.setattr(gpu_cases, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_cases, "has_kernel", lambda op: op != "cca_mix")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu_cases.main()
    said = capsys.readouterr().out
    assert said.count(" called\n") == 2 * (len(gpu_cases.SUBJECTS) - 1)
    assert said.count("cca_mix") == said.count("has no GPU kernel") == 2
