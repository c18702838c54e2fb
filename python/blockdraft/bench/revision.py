"""`blockdraft bench --base REF`: this build beside another revision of the repository, built for the comparison.

Both run as processes of their own, by turns, since two builds of one operator cannot be loaded into one. Each round has
the other side (PyTorch, transformers) as well; compared are the medians of the rounds' ratios.
"""

import importlib.util
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdraft.bench.report import BenchError

ROUNDS = 3
# An editable install comes before PYTHONPATH, by a finder of this kind, and would run this revision twice.
LAUNCH = """
import pathlib, runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
import blockdraft
if not pathlib.Path(blockdraft.__file__).is_relative_to({folder!r}):
    sys.exit(f"imported {{blockdraft.__file__}}")
sys.argv[0] = "blockdraft bench"
runpy.run_module("blockdraft.bench", run_name="__main__", alter_sys=True)
"""

Report = dict[str, Any]


@dataclass(frozen=True)
class Build:
    """How a revision's bench is started; folder None: this one's."""

    name: str
    folder: Path | None = None

    def measure(self, options: Sequence[str]) -> Report:
        """One run. A result that does not match counts, too: the other revision's are not judged here."""
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, "result.json")
            done = subprocess.run(
                self.command(options, path), env=self.environment(), stdout=subprocess.PIPE, text=True
            )
            if not path.exists():
                raise BenchError(f"--base: the bench of {self.name} ended with status {done.returncode}")
            report: Report = json.loads(path.read_text())
            return report

    def command(self, options: Sequence[str], path: Path) -> list[str]:
        start = ["-c", LAUNCH.format(folder=str(self.folder))] if self.folder else ["-m", "blockdraft.bench"]
        return [sys.executable, *start, *options, "--json", str(path)]

    def environment(self) -> dict[str, str]:
        return os.environ | ({"PYTHONPATH": str(self.folder)} if self.folder else {})


def compare(ref: str, options: Sequence[str]) -> tuple[Report, Report]:
    """The revision's results and this one's.

    Raises:
        BenchError: There is no such revision, it cannot be built, or it cannot run with these options.
    """
    root = repository()
    commit = commit_of(root, ref)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary).resolve()
        unpack(root, commit, source)
        say(f"building {ref} ({commit[:12]})")
        build(source, "cuda" in options)
        builds = Build(ref, source / "python"), Build("this revision")
        rounds: list[list[Report]] = [[], []]
        for turn in range(2 * ROUNDS):
            side = (turn + turn // 2) % 2  # who begins alternates
            say(f"round {turn // 2 + 1} of {ROUNDS}, {builds[side].name}")
            rounds[side].append(builds[side].measure(options))
    return merged(rounds[0]), merged(rounds[1])


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def repository() -> Path:
    """The checkout that this package is part of."""
    return Path(__file__).resolve().parents[3]


def commit_of(root: Path, ref: str) -> str:
    if shutil.which("git") is None:
        raise BenchError(f"--base {ref}: is no file, and for a revision there is no git")
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"--base {ref}: is neither a file nor a git revision of {root}")
    return done.stdout.strip()


def unpack(root: Path, commit: str, folder: Path) -> None:
    archive = subprocess.run(["git", "-C", str(root), "archive", commit], check=True, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")


def build(source: Path, gpu: bool) -> None:
    """Compiles the libraries and puts them beside the Python files."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    if missing:
        raise BenchError(f"--base: to build a revision there must be {', '.join(missing)}")
    import pybind11

    out = source / "build"
    definitions = {"CMAKE_BUILD_TYPE": "Release", "BLOCKDRAFT_GPU": "auto" if gpu else "none"}
    definitions |= {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}
    configure = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(out)]
    for command in ([*configure, *(f"-D{k}={v}" for k, v in definitions.items())], ["cmake", "--build", str(out)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise BenchError(f"--base: the revision does not build:\n{done.stdout[-2000:]}")
    for library in out.glob("_*.so"):
        shutil.copy(library, source / "python" / "blockdraft")


def merged(reports: Sequence[Report]) -> Report:
    """The last report, each row from the round of the median ratio, with how far the rounds are apart."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in (row for report in reports for row in report["results"]):
        rows.setdefault((row["op"], row["rows"]), []).append(row)
    samples = [sample for report in reports for sample in report["read_samples_gb_s"]]
    limits = {"read_samples_gb_s": samples, "read_limit_gb_s": max(samples)}
    return reports[-1] | limits | {"results": [median_of(own) for own in rows.values()]}


def median_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if any(row["ratio"] is None for row in rows):
        return rows[-1]
    ratios = [row["ratio"] for row in rows]
    middle = statistics.median_low(ratios)
    row = next(row for row in rows if row["ratio"] == middle)
    right = {name: all(own[name] is not False for own in rows) for name in ("match", "same_bits")}
    return row | right | {"ratio_spread": (max(ratios) - min(ratios)) / 2 / middle}
