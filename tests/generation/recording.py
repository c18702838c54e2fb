"""A stand-in for CUDA graphs on the CPU: it captures what a graph would, and finds what a graph would not forgive.

Capturing records the operators that a function calls, with the tensors that they are called with, and leaves the memory
as it was. A replay runs these operators again on the same memory, so that a number which Python took from a tensor, or
a tensor that is no longer the one in use, shows as it would with a graph: as a result of the past.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blockdraft import ZayaForCausalLM
from blockdraft.runner import Captured, GraphRunner

READS_A_VALUE = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
MAKES_FROM_VALUES = ("tensor", "as_tensor", "from_numpy")


class CaptureError(Exception):
    """What a GPU refuses while it captures, or would do wrong later."""


def tensors_in(*values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@dataclass
class Call:
    op: Any
    args: Any
    kwargs: dict[str, Any]
    results: list[Tensor]

    def run(self) -> None:
        """Into the memory of the recorded results."""
        for old, new in zip(self.results, tensors_in(self.op(*self.args, **self.kwargs)), strict=True):
            if old.shape != new.shape:
                raise CaptureError(f"{self.op} gave {list(old.shape)} when captured, {list(new.shape)} now")
            if storage(old) != storage(new):
                old.copy_(new)


class NoHost(TorchFunctionMode):
    """Refuses what makes the host wait for the device, or copies from memory that will be gone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        away = name == "to" and any(isinstance(x, torch.device | str) for x in (*args, *(kwargs or {}).values()))
        if away or name in READS_A_VALUE or (name in MAKES_FROM_VALUES and not isinstance(args[0], Tensor)):
            raise CaptureError(f"{name} while a graph is captured")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Records calls, of which every tensor must be fixed memory or a result of this capture."""

    def __init__(self, fixed: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {storage(x) for x in fixed}
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise CaptureError(f"{func} needs values on the host")
        for x in tensors_in(args, kwargs):
            if storage(x) not in self.known:
                raise CaptureError(f"{func} reads a tensor {list(x.shape)} that is neither fixed nor made here")
        out = func(*args, **kwargs)
        results = tensors_in(out)
        self.calls.append(Call(func, args, kwargs, results))
        self.known |= {storage(x) for x in results}
        return out


class RecordingCapture:
    """See the module's text.

    Args:
        fixed: Gives the tensors that a graph may read and write now: weights, cache, buffers.
        nbytes: What to say of a graph's memory; None: what its results take.

    Attributes:
        captures, replays: How many there were.
    """

    def __init__(self, fixed: Callable[[], list[Tensor]], nbytes: int | None = None) -> None:
        self.fixed, self.nbytes = fixed, nbytes
        self.captures = self.replays = 0

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> Captured:
        fixed = list({storage(x): x for x in self.fixed()}.values())
        kept = [x.untyped_storage().clone() for x in fixed]
        tape = Tape(fixed)
        with NoHost(), tape:
            outputs = function()
        for x, bytes_before in zip(fixed, kept, strict=True):
            x.untyped_storage().copy_(bytes_before)
        own = {storage(x): x for call in tape.calls for x in call.results}
        for key in {storage(x) for x in fixed}:
            own.pop(key, None)
        for x in own.values():  # a graph's memory has nothing in it before the first replay
            x.untyped_storage().fill_(0xFF)
        read = {storage(x): x for call in tape.calls for x in tensors_in(call.args, call.kwargs)}
        needed = {key for key in read if key not in own}
        self.captures += 1
        nbytes = sum(x.untyped_storage().nbytes() for x in own.values()) if self.nbytes is None else self.nbytes
        return Captured(lambda: self._replay(tape, needed), outputs, nbytes)

    def _replay(self, tape: Tape, needed: set[int]) -> None:
        if not needed <= {storage(x) for x in self.fixed()}:
            raise CaptureError("the graph reads memory that is no longer in use")
        for call in tape.calls:
            call.run()
        self.replays += 1


def fixed_memory(model: ZayaForCausalLM) -> list[Tensor]:
    """What a graph may read and write."""
    cache, graphs = model.runner.cache, model.runner.graphs.values()
    states = [cache.k_pages, cache.v_pages, cache.conv_states, cache.recurrent_states]
    return [*model.decoder.buffers(), *states, *(graph.buffers.bytes for graph in graphs)]


def use_graphs(model: ZayaForCausalLM, nbytes: int | None = None, **limits: int) -> GraphRunner:
    """With this capture."""
    model.runner = GraphRunner(model, RecordingCapture(lambda: fixed_memory(model), nbytes), **limits)
    return model.runner
