"""Whether what is to be measured fits, asked before anything is made."""

from pathlib import Path

from blockdraft.bench.report import BenchError

SPARE = 1 << 30  # torch, transformers, activations, the read measurement


def available() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def fits(size: int) -> bool:
    free = available()
    return free is None or size + SPARE <= free


def check_memory(what: str, size: int, remedy: str) -> None:
    """Raises BenchError unless `size` bytes and SPARE are available."""
    if not fits(size):
        wanted, free = (size + SPARE) / 2**30, (available() or 0) / 2**30
        raise BenchError(f"{what}: needs {wanted:.1f} GiB of memory, {free:.1f} are available; lower {remedy}")
