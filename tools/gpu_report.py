#!/usr/bin/env python3
"""Writes report.json and report.md of scripts/gpu_check.sh: the machine, what each stage came to, the measurements.

usage: gpu_report.py OUTDIR

Status 1 unless every stage passed. Says nothing of what did not run but that it did not.
"""

import json
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def said(*command: str) -> str:
    """Last line of what a command says, "unknown" where there is none."""
    if not shutil.which(command[0]):
        return "unknown"
    lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return lines[-1] if lines else "unknown"


def machine() -> dict[str, Any]:
    import torch

    there = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if there else "none",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "nvcc": said("nvcc", "--version"),
        "python": platform.python_version(),
        "commit": said("git", "rev-parse", "HEAD"),
    }


def stages(folder: Path) -> list[dict[str, Any]]:
    rows = [line.split("\t") for line in (folder / "stages.tsv").read_text().splitlines()]
    return [{"stage": name, "result": result, "seconds": int(s), "reason": why} for name, result, s, why in rows]


def tests(folder: Path, stage: str) -> dict[str, int] | None:
    """Number of tests by outcome; None where the run did not come to its end."""
    path = folder / f"{stage}.xml"
    if not path.exists():
        return None
    cases = ElementTree.parse(path).getroot().iter("testcase")
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    return dict(Counter(next((kinds[c.tag] for c in case if c.tag in kinds), "passed") for case in cases))


def bench(folder: Path) -> dict[str, Any] | None:
    path = folder / "bench.json"
    return json.loads(path.read_text()) if path.exists() else None


def told(counts: dict[str, int] | None) -> str:
    return ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) if counts else "no result"


def render(report: dict[str, Any], table: str) -> str:
    facts = report["machine"]
    lines = [f"# GPU check, {facts['date']}", "", "; ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += ["| stage | result | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [f"| {s['stage']} | {s['result']} | {s['seconds']} | {s['reason']} |" for s in report["stages"]]
    not_run = [s["stage"] for s in report["stages"] if s["result"] in ("skipped", "cut off")]
    lines += ["", f"Not run, or not to the end: {', '.join(not_run) or 'none'}.", ""]
    lines += [f"Tests on the GPU: {told(report['tests'])}. Of generation: {told(report['generation'])}.", ""]
    return "\n".join([*lines, table or "No measurements.", ""])


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    report: dict[str, Any] = {"machine": machine(), "stages": stages(folder)}
    report |= {"tests": tests(folder, "tests"), "generation": tests(folder, "generation"), "bench": bench(folder)}
    table = ""
    if report["bench"]:
        from blockdraft.bench.report import render as render_bench

        table = render_bench(report["bench"])
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(render(report, table))
    print(f"gpu_check: {folder / 'report.md'}")
    return int(any(stage["result"] != "passed" for stage in report["stages"]))


if __name__ == "__main__":
    sys.exit(main())
