"""`blockdraft bench --base`: what became slower since a saved run, or beside another revision.

Compared are ratios to the other side of the same run, so that another machine or a slow hour changes little. What looks
slower is measured again, twice if need be, and counts if it looks so every time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdraft.bench import report
from blockdraft.bench.report import BenchError

AGAIN = 2
ALIKE = ("kind", "dtype", "shapes_name", "device")  # settings without which rows mean something else
DEFAULTS = {"kind": report.OPERATORS, "device": "cpu"}  # of files from before there was a choice
HEADINGS = ("op", "rows", "ratio before", "ratio now", "slower by %", "allowed %")

Row = dict[str, Any]


@dataclass(frozen=True)
class Slower:
    """A row that lost more than is allowed; shares, not percent."""

    row: Row
    base_ratio: float
    lost: float
    allowed: float

    def cells(self) -> tuple[str, ...]:
        ratios = (f"{self.base_ratio:.2f}", f"{self.row['ratio']:.2f}")
        return self.row["op"], str(self.row["rows"]), *ratios, f"{100 * self.lost:.0f}", f"{100 * self.allowed:.0f}"


@dataclass(frozen=True)
class Gate:
    """The rows of the earlier run by operator and number of rows.

    Attributes:
        tolerance: Share of time that may be added before a row counts as slower, beside what the spread explains.
    """

    path: Path
    base: dict[tuple[str, int], Row]
    tolerance: float

    @staticmethod
    def load(path: Path, tolerance: float, settings: dict[str, Any]) -> "Gate":
        """Raises BenchError for a file that is no such result, or one of another kind, type, shape or device."""
        return Gate.of(path, report.read(path), tolerance, settings)

    @staticmethod
    def of(path: Path, earlier: dict[str, Any], tolerance: float, settings: dict[str, Any]) -> "Gate":
        theirs = DEFAULTS | earlier["settings"]
        for name in ALIKE:
            if theirs.get(name) != settings[name]:
                wanted, got = settings[name], theirs.get(name)
                raise BenchError(f"--base {path}: {name} must be {wanted!r} as in this run, got {got!r}")
        rows = {(row["op"], row["rows"]): row for row in earlier["results"] if row["ratio"] is not None}
        return Gate(path, rows, tolerance)

    def slower(self, row: Row) -> Slower | None:
        before = self.base.get((row["op"], row["rows"]))
        if before is None or row["ratio"] is None:
            return None
        lost = before["ratio"] / row["ratio"] - 1
        allowed = self.tolerance + math.hypot(*uncertainties(before), *uncertainties(row))
        return Slower(row, before["ratio"], lost, allowed) if lost > allowed else None

    def settle(self, measure: Callable[[], Row]) -> Row:
        """Measures; of several attempts the best ratio, since what disturbs a side rarely does so three times."""
        row = measure()
        for _ in range(AGAIN):
            if self.slower(row) is None:
                break
            row = max(row, measure(), key=lambda r: r["ratio"])
        return row

    def report(self, rows: list[Row]) -> bool:
        """Prints what became slower; whether anything did. Raises BenchError where nothing can be compared."""
        compared = [row for row in rows if (row["op"], row["rows"]) in self.base and row["ratio"] is not None]
        if not compared:
            raise BenchError(f"--base {self.path}: has none of this run's rows, or one of both has no other side")
        found = [slower for row in compared if (slower := self.slower(row))]
        allowed = f"{100 * self.tolerance:g}% and the spread of both runs"
        print(f"\n{len(found)} of {len(compared)} rows slower than {self.path.name} by more than {allowed}")
        if found:
            print("\n".join(report.aligned([HEADINGS, *(slower.cells() for slower in found)])))
        return bool(found)


def uncertainties(row: Row) -> tuple[float, ...]:
    """Relative: about the standard errors of both medians, as quartiles lie 1.35 deviations apart, and of rounds."""
    scale, rounds = row["repeats"] ** -0.5, row.get("ratio_spread", 0.0)
    return scale * row["iqr_ms"] / row["median_ms"], scale * row["torch_iqr_ms"] / row["torch_median_ms"], rounds
