"""What judges a completion: a command or a Python function, in processes of its own with limits (runner.py)."""

import functools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdraft.errors import RequestError
from blockdraft.passk.estimate import check_integer
from blockdraft.passk.prompts import Record

RUNNER = Path(__file__).with_name("runner.py")
OUTCOMES = ("pass", "fail", "timeout", "memory", "crash")
GRACE_SECONDS = 30.0  # for the supervisor; it needs them only where a checker stopped it
DAY_SECONDS = 86400

CheckFunction = Callable[[Record], bool]


@dataclass(frozen=True)
class Limits:
    """Of one check.

    Attributes:
        timeout: Seconds, with the import of a function's module.
        memory_mb: Address space of each process in 10^6 bytes (RLIMIT_AS); what is reserved counts, touched or not.
    """

    timeout: float = 10.0
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        number = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
        if not number or not 0 < self.timeout <= DAY_SECONDS:
            raise RequestError(f"timeout must be a number of seconds in (0, {DAY_SECONDS}], got {self.timeout!r}")
        check_integer("memory_mb", self.memory_mb, 1, 10**9)


@dataclass(frozen=True)
class Verdict:
    """How one check ended.

    Attributes:
        outcome: "pass", "fail", "timeout", "memory" (an allocation was refused) or "crash" (ended by a signal).
        detail: Why: the last line of its standard error, the exit status, the signal.
        seconds: It took.
    """

    outcome: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class Checker:
    """Judges completions. Make it with `command` or `python`.

    Attributes:
        name: As a report shows it.
        job: The runner's keys for it.
    """

    name: str
    job: dict[str, Any]

    @classmethod
    def command(cls, command: str | Sequence[str]) -> "Checker":
        """A program and its arguments, without a shell. The record is on its standard input; exit status 0 passes."""
        try:
            argv = shlex.split(command) if isinstance(command, str) else list(command)
        except ValueError as error:
            raise RequestError(f"checker must be a command, got {command!r}: {error}") from None
        if not argv or shutil.which(argv[0]) is None:
            raise RequestError(f"checker must be a command that can be run, got {command!r}")
        return cls(shlex.join(argv), {"argv": argv})

    @classmethod
    def python(cls, function: str | CheckFunction) -> "Checker":
        """A function of the record that returns True where the completion passes.

        Args:
            function: "MODULE:FUNCTION", where MODULE may be a path that ends in .py; or a function at the top level of
                a module. The module is imported anew for every check.
        """
        spec = _spec_of(function) if callable(function) else function
        if not isinstance(spec, str) or not all(spec.rpartition(":")):
            raise RequestError(f"checker must be MODULE:FUNCTION, got {spec!r}")
        return cls(spec, {"function": spec, "path": [str(Path.cwd()), *sys.path]})

    def check(self, record: Record | None, limits: Limits) -> Verdict:
        """Runs it on one record; None loads a function and does not call it."""
        job = {"record": record, "timeout": limits.timeout, "memory_bytes": limits.memory_mb * 10**6}
        text = json.dumps({**self.job, **job}).encode()
        command = [sys.executable, "-P", str(RUNNER)]
        try:
            done = subprocess.run(command, input=text, capture_output=True, timeout=limits.timeout + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return Verdict("timeout", "the supervisor of the check does not answer", limits.timeout)
        if done.returncode < 0:
            return Verdict("crash", "the supervisor of the check was killed, too", 0.0)
        if done.returncode:
            raise RuntimeError(f"no check was possible: {done.stderr.decode(errors='replace')[-2000:]}")
        return Verdict(**json.loads(done.stdout))

    def try_load(self, limits: Limits) -> None:
        """Raises RequestError where it is a function that cannot be loaded within the limits."""
        if "function" not in self.job:
            return
        verdict = self.check(None, limits)
        if verdict.outcome != "pass":
            within = f"{limits.timeout:g} s and {limits.memory_mb} MB"
            raise RequestError(f"checker {self.name!r} cannot be loaded within {within}: {verdict.detail}")


def _spec_of(function: CheckFunction) -> str:
    name, module = getattr(function, "__qualname__", ""), sys.modules.get(getattr(function, "__module__", ""))
    found = functools.reduce(lambda place, part: getattr(place, part, None), name.split("."), module)
    if module is None or found is not function:
        raise RequestError(f"checker must be a function at the top level of a module, got {function!r}")
    if module.__name__ != "__main__":
        return f"{module.__name__}:{name}"
    if not getattr(module, "__file__", None):
        raise RequestError(f"checker must be a function in a file, so that a check can import it, got {function!r}")
    return f"{Path(module.__file__).resolve()}:{name}"
