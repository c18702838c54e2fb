"""What the tests of the operators share.

Numbers are compared with float64 on the already rounded inputs, within a bound that follows from the roundings:

    |actual - exact| <= 1.01 * u * |exact| + error

u is the largest relative error of one rounding to the result's dtype, and error what the float32 evaluation before it
may be off; for a sum of K products, c * 2^-24 * sqrt(K) * |A| |B| (`sum_error`).
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import blockdraft

U32 = 2.0**-24
ROUNDING = {torch.float32: U32, torch.bfloat16: 2.0**-8}
assert all(torch.finfo(dtype).eps / 2 == u for dtype, u in ROUNDING.items())

dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=["float32", "bfloat16"])


def each_size(names: str, *sizes: tuple[int, ...]) -> pytest.MarkDecorator:
    """Parametrizes over sizes; a case is named by them, as T3-H15."""
    letters = names.split()
    ids = ["-".join(f"{letter}{n}" for letter, n in zip(letters, case, strict=True)) for case in sizes]
    return pytest.mark.parametrize(letters, sizes, ids=ids)


# Agreement.


def sum_error(c: float, K: int, magnitude: Tensor) -> Tensor:
    """Error of float32 sums of K products whose absolute values add up to magnitude."""
    return c * U32 * K**0.5 * magnitude


def assert_within(actual: Tensor, exact: Tensor, error: Tensor | float, name: str = "out", zeros: bool = False) -> None:
    """The bound above for every element. A failure says where, how far, and how many.

    Zeros for the most part are no evidence, so they must be announced.
    """
    assert actual.shape == exact.shape, f"{name}: {list(actual.shape)} instead of {list(exact.shape)}"
    assert actual.is_contiguous(), f"{name}: strides {actual.stride()}"
    if exact.numel() == 0:
        return
    assert exact.isfinite().all(), f"{name}: the definition is not finite"
    if exact.numel() >= 32 and not zeros:
        assert (exact != 0).double().mean() >= 0.5, f"{name}: most of the definition is 0"
        assert exact.std() > 0, f"{name}: the definition is constant"
    got = actual.double()
    bound = 1.01 * ROUNDING[actual.dtype] * exact.abs() + error
    beyond = ~((got - exact).abs() <= bound)
    if beyond.any():
        excess = ((got - exact).abs() / bound).nan_to_num(torch.inf)
        place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        pytest.fail(
            f"{name}: {int(beyond.sum())} of {beyond.numel()} beyond the bound; worst at {place}: {got[place]:.9g} "
            f"instead of {exact[place]:.9g}, {excess[place]:.2f} bounds; {int(got.isnan().sum())} NaN"
        )


def assert_no_worse_than_eager(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """For fused operators, whose derived bounds are wide: errors like those of plain PyTorch in the same dtype, and as
    much again as exact + 0.3 - 0.3 loses. Few numbers have no largest and mean error worth comparing. The baseline
    instruction set rounds each product before it is added, which PyTorch does not: half as much more there."""
    if exact.numel() < 512:
        return
    error, eager_error = ((x.double() - exact).abs() for x in (actual, eager))
    rounded = exact.to(actual.dtype)
    unfused = 1.5 if blockdraft.cpu_isa() == "base" else 1.0
    most = 2 * unfused * eager_error.max() + 2 * (rounded + 0.3 - 0.3 - rounded).abs().max()
    assert error.max() <= most, f"largest error {error.max():.3g}, eager {eager_error.max():.3g}"
    assert error.mean() <= 1.5 * unfused * eager_error.mean(), (
        f"mean error {error.mean():.3g}, eager {eager_error.mean():.3g}"
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Like torch.equal, but a NaN equals itself and 0 is not -0."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def untouched(*size: int, dtype: torch.dtype) -> Tensor:
    """Memory that no one has written, not even NaN: of a huge tensor only what a test touches takes room."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return torch.empty(size, dtype=dtype)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


# Invariance.


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_batch_invariant(run: Callable[[Tensor], tuple[Tensor, ...]], total: int = 64) -> None:
    """run(indices) computes those rows (or sequences) together, result i belonging to indices[i]. Each has the bits it
    has alone, wherever it stands in batches of any size, with one thread and with two."""
    with threads(1):
        alone = [torch.stack(column) for column in zip(*(take_one(run, i) for i in range(total)), strict=True)]
    for count, size in itertools.product([1, 2], [2, 3, 7, 16, 64]):
        indices = torch.randperm(total)[:size]
        with threads(count):
            together = run(indices)
        for part, (ours, expected) in enumerate(zip(together, alone, strict=True)):
            differs = [i for i in range(size) if not same_bits(ours[i], expected[indices[i]])]
            assert not differs, f"result {part}, {count} threads: rows {differs} of a batch of {size} differ"


def take_one(run: Callable[[Tensor], tuple[Tensor, ...]], index: int) -> list[Tensor]:
    return [result[0] for result in run(torch.tensor([index]))]


# Malformed calls.


def tensor_arguments(operator: str) -> list[str]:
    arguments = getattr(torch.ops.blockdraft, operator).default._schema.arguments
    return [argument.name for argument in arguments if "Tensor" in str(argument.type)]


MALFORMED = {
    "rank": (lambda t: t[None], r"\[.*\], got \[1, .*\]"),
    "dtype": (lambda t: t.half() if t.is_floating_point() else t.short(), r"(Float|Int|Long).*, got (Half|Short)"),
    "strided": (lambda t: t.repeat_interleave(2, -1)[..., ::2], "contiguous"),
}


def each_malformed_tensor(operator: str) -> pytest.MarkDecorator:
    """Parametrizes over every tensor of the operator, with a rank, a dtype and a layout that it does not take."""
    names = tensor_arguments(operator)
    cases = {
        f"{name}-{kind}": ({name: f}, f"{name} must be {m}") for name in names for kind, (f, m) in MALFORMED.items()
    }
    return each_wrong_call(cases)


def each_wrong_call(cases: dict[str, tuple[dict[str, Any], str]]) -> pytest.MarkDecorator:
    """Parametrizes over (changes, message) by name; see assert_raises."""
    return pytest.mark.parametrize(("changes", "message"), list(cases.values()), ids=list(cases))


def assert_raises(backend: Any, operator: str, call: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """A change is a new value of an argument, or a function of the right one. Operator and message must match whole."""
    changed = {name: change(call[name]) if callable(change) else change for name, change in changes.items()}
    with pytest.raises(RuntimeError, match=f"^{operator}: {message}$"):
        backend.op(operator)(**(call | changed))


# Registration.


def copies(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(operator: str, arguments: dict[str, Any]) -> None:
    values = tuple(arguments.values())
    has_fp8 = any(isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn for x in values)
    checks = OPCHECKS[has_fp8:]  # the first one calculates with its arguments, which torch cannot do in float8
    torch.library.opcheck(getattr(torch.ops.blockdraft, operator).default, values, test_utils=checks)


def assert_compiles_once(operator: str, first: dict[str, Any], then: dict[str, Any]) -> None:
    """One graph without breaks serves both calls, with the results and the mutations of the plain operator. The calls
    differ in the sizes that are to be dynamic; such a size of `first` must not equal any other of its sizes."""
    op = getattr(blockdraft.ops, operator)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(**copies(first))
    with torch.compiler.set_stance("fail_on_recompile"):
        ours, expected = copies(then), copies(then)
        results = [f(**arguments) for f, arguments in ((compiled, ours), (op, expected))]
    for a, b in zip(*(tree_leaves(r) for r in results), strict=True):
        assert a is b is None or same_bits(a, b)
    for name, x in expected.items():
        assert not isinstance(x, Tensor) or same_bits(ours[name], x), f"{name} differs after the call"
