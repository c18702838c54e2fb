#!/usr/bin/env python3
"""Turns pytest's JUnit file into a short JSON summary: the machine, and counts and seconds per test file.

usage: test_summary.py JUNIT.xml OUT.json
"""

import json
import os
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OUTCOMES = {"failure": "failed", "error": "errors", "skipped": "skipped"}


def machine() -> dict[str, Any]:
    import torch

    import blockdraft

    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": os.cpu_count(),
        "cpu_isa": blockdraft.cpu_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blockdraft": blockdraft.__version__,
    }


def outcome(case: ElementTree.Element) -> str:
    return next((OUTCOMES[child.tag] for child in case if child.tag in OUTCOMES), "passed")


def count(cases: list[ElementTree.Element]) -> dict[str, Any]:
    totals: dict[str, int] = defaultdict(int)
    for case in cases:
        totals[outcome(case)] += 1
    return {**totals, "seconds": round(sum(float(case.get("time", 0)) for case in cases), 1)}


def summarise(junit: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    by_file: dict[str, list[ElementTree.Element]] = defaultdict(list)
    for case in cases:
        by_file[case.get("classname", "")].append(case)
    bad = [f"{case.get('classname')}::{case.get('name')}" for case in cases if outcome(case) in ("failed", "errors")]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "total": count(cases),
        "not_passed": bad,
        "files": {name: count(cases) for name, cases in sorted(by_file.items())},
    }


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(json.dumps(summarise(Path(sys.argv[1])), indent=2) + "\n")


if __name__ == "__main__":
    main()
