"""`blockdraft bench --device cuda`: the same cases with all their tensors on the GPU, timed without launch gaps.

A timed unit is a CUDA graph of CALLS calls, each with the weights of the next turn; what PyTorch does with a
synchronisation inside cannot be captured and is timed call after call.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from blockdraft import gpu_launches, ops
from blockdraft.bench.measure import WARMUP, Budget, Measured, Times
from blockdraft.bench.subject import Case

DEVICE = "cuda"
CALLS = 40  # in a graph

Unit = Callable[[], None]  # CALLS calls


def has_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"blockdraft::{op}", "CUDA")


def machine() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(DEVICE)
    return {"gpu": device.name, "gpu_l2_bytes": device.L2_cache_size, "cuda": torch.version.cuda or torch.version.hip}


def unit(call: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]]) -> tuple[Unit, bool]:
    """The calls and whether they are a graph."""
    turns = [arguments(turn) for turn in range(CALLS)]

    def run() -> None:
        for turn in turns:
            call(*turn)

    try:
        return graph(run), True
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False


def graph(run: Unit) -> Unit:
    """run as one launch. It runs once before, because a first call may load code and take memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def seconds_of(run: Unit) -> float:
    """On the GPU's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def time_both(case: Case, budget: Budget) -> tuple[Times, Times]:
    """Of one call of the operator and of PyTorch, whose units run by turns."""
    ours, _ = unit(getattr(ops, case.op), case.arguments)
    theirs, captured = unit(case.pytorch, case.torch_arguments)
    if not captured:
        case.note = "; ".join(filter(None, [case.note, "PyTorch without a graph"]))
    times: tuple[list[float], list[float]] = ([], [])
    deadline = time.perf_counter() + budget.seconds
    while len(times[0]) < WARMUP + budget.most:
        if len(times[0]) >= WARMUP + budget.least and time.perf_counter() > deadline:
            break
        for kept, run in zip(times, (ours, theirs), strict=True):
            kept.append(seconds_of(run) / CALLS)
    return Times.of(times[0][WARMUP:]), Times.of(times[1][WARMUP:])


def launches_of(case: Case) -> int:
    """Kernels that one call of the operator launches."""
    before = gpu_launches()
    case.run(case.arguments(0))
    return gpu_launches() - before


def measure(case: Case, budget: Budget) -> Measured:
    match, same_bits = case.match(), case.same_bits()
    return Measured(*time_both(case, budget), match, same_bits, launches=launches_of(case))


def copy_bandwidth(size: int) -> float:
    """GB/s, bytes read and bytes written, of copying `size` bytes on the device: median of 10."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    seconds = [seconds_of(lambda: target.copy_(source)) for _ in range(10 + WARMUP)]  # type: ignore[func-returns-value]
    return 2 * size / statistics.median(seconds[WARMUP:]) * 1e-9
