"""The supervisor of one check: runs a checker under limits and leaves nothing of it behind.

Started by path (`python -P runner.py`), since importing the package would import torch, seconds and gigabytes of
address space for every check. One job on standard input, one verdict on standard output, both JSON:

    {"argv": [...]} or {"function": "MODULE:NAME", "path": [...]}, and "record", "timeout" (seconds), "memory_bytes"
    {"outcome": "pass", "fail", "timeout", "memory" or "crash", "detail": str, "seconds": float}

A job whose record is null loads the function and does not call it.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# A function's verdict. Not 0: a completion that it executes may end the process by os._exit(0).
PASSED, FAILED, OUT_OF_MEMORY = 87, 1, 88
OUT_OF_MEMORY_WORDS = ("MemoryError", "bad_alloc", "Cannot allocate memory", "OutOfMemoryError", "out of memory")
KEPT_BYTES = 4096  # of standard error: a traceback's end
DETAIL_CHARACTERS = 200
KILLING_SECONDS = 5.0  # a process that is still there then belongs to another user or hangs in the kernel


def load(spec: str) -> Any:
    """The object at "MODULE:NAME"; MODULE may be a path that ends in .py."""
    module, _, name = spec.rpartition(":")
    return functools.reduce(getattr, name.split("."), _module(module))


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def call(job: dict[str, Any]) -> bool:
    sys.path[:] = job["path"]
    function = load(job["function"])
    if not callable(function):
        raise TypeError(f"{job['function']} must be a function, got {function!r}")
    if job["record"] is None:
        return True
    result = function(job["record"])
    if not isinstance(result, bool):
        raise TypeError(f"{job['function']} must return a bool, got {result!r}")
    return result


def limit(kind: int, amount: int) -> None:
    """For this process and, each for itself, those that come from it."""
    _, hard = resource.getrlimit(kind)
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (amount, amount))


def run_checker(job: dict[str, Any], record: int, errors: int) -> NoReturn:
    """The forked child: the function, or the command in its place."""
    status = FAILED
    try:
        for number in (signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores the last two, exec keeps that
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        os.dup2(record, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors, 2)
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_AS, job["memory_bytes"])
        if "argv" in job:
            os.execvp(job["argv"][0], job["argv"])
        status = PASSED if call(job) else FAILED
    except MemoryError:
        status = OUT_OF_MEMORY
    except BaseException:  # sys.exit() of a completion, too
        traceback.print_exc()
    finally:
        os._exit(status)


def start(job: dict[str, Any]) -> tuple[int, int]:
    """Process id of the checker, and the end of the pipe where its standard error comes out."""
    out, into = os.pipe()
    with open(os.memfd_create("record"), "w+b") as record:  # no pipe, which would block where a checker does not read
        if "argv" in job:
            record.write(json.dumps(job["record"]).encode() + b"\n")
            record.seek(0)  # the checker shares this position
        pid = os.fork()
        if pid == 0:
            run_checker(job, record.fileno(), into)
    os.close(into)
    return pid, out


def watch(pid: int, errors: int, timeout: float) -> bytes:
    """Waits for the end of the process, at most `timeout` seconds; the last bytes of its standard error."""
    tail, deadline, process = b"", time.monotonic() + timeout, os.pidfd_open(pid)
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(errors, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        ready = [number for number, _ in poll.poll(left * 1000)]
        if errors in ready:
            data = os.read(errors, 1 << 16)  # all that a pipe holds, so nothing is missing once the process has ended
            tail = (tail + data)[-KEPT_BYTES:]
            if not data:
                poll.unregister(errors)
        if process in ready:
            break
    return tail


def children() -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
            found += [int(path.parent.name)] if int(parent) == os.getpid() else []
    return found


def end_all(pid: int) -> None:
    """Kills the checker's session, then what left it: orphans become children of this process, a subreaper."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        # At once, before it forks again. Its leader is not reaped yet, so no one else can have the id.
        os.killpg(pid, signal.SIGKILL)
    deadline = time.monotonic() + KILLING_SECONDS
    while time.monotonic() < deadline:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            for child in children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.001)


def judge(job: dict[str, Any], end: os.waitid_result | None, tail: bytes) -> tuple[str, str]:
    """Outcome and its reason; `end` is None for a process that had to be stopped."""
    if end is None:
        return "timeout", f"not done after {job['timeout']:g} s"
    lines = tail.decode(errors="replace").strip().splitlines()
    said = lines[-1][:DETAIL_CHARACTERS] if lines else ""
    by_signal = end.si_code != os.CLD_EXITED
    if not by_signal and end.si_status == (0 if "argv" in job else PASSED):
        return "pass", ""
    if end.si_status == OUT_OF_MEMORY and "function" in job and not by_signal:
        return "memory", said or "MemoryError"
    if any(word in tail.decode(errors="replace") for word in OUT_OF_MEMORY_WORDS):
        return "memory", said
    if by_signal:
        return "crash", f"signal {end.si_status}, {signal.strsignal(end.si_status)}"
    return "fail", said or ("" if "function" in job else f"exit status {end.si_status}")


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    begin = time.monotonic()
    pid, errors = start(job)
    try:
        tail = watch(pid, errors, job["timeout"])
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        seconds = time.monotonic() - begin
    finally:
        end_all(pid)
    outcome, detail = judge(job, end, tail)
    return {"outcome": outcome, "detail": detail, "seconds": seconds}


def stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, stop)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # where the caller is killed, the checker goes, too
    try:
        json.dump(supervise(json.load(sys.stdin.buffer)), sys.stdout)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
