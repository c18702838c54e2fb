from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

import blockdraft
from ops.helpers import (
    U32,
    assert_batch_invariant,
    assert_compiles_once,
    assert_raises,
    assert_within,
    dtypes,
    each_malformed_tensor,
    each_size,
    each_wrong_call,
    opcheck,
    same_bits,
    sum_error,
)

EPS = 1e-5
MATRICES = ("down_proj", "fc1", "fc2", "out_proj")


@dataclass
class Router:
    """A router with random weights and the states of the layer before."""

    backend: Any
    T: int
    H: int
    R: int
    E: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        shapes = ((self.R, self.H), (self.R, self.R), (self.R, self.R), (self.E + 1, self.R))
        self.matrices = {n: 3 * torch.randn(s) / s[1] ** 0.5 for n, s in zip(MATRICES, shapes, strict=True)}
        self.matrices = {name: weight.to(self.dtype) for name, weight in self.matrices.items()}
        self.x = torch.randn(self.T, self.H).to(self.dtype)
        self.states = {"router_states": torch.randn(self.T, self.R), "router_states_scale": torch.randn(self.R)}
        names = ("down_proj_bias", "norm_weight", "fc1_bias", "fc2_bias")
        self.vectors = {name: torch.randn(self.R) for name in names} | {"balancing_biases": torch.randn(self.E + 1) / 4}

    def call(self) -> dict[str, Any]:
        packed = {n: self.backend.op("pack_weight")(weight=w, halves=1) for n, w in self.matrices.items()}
        given = {"x": self.x, **self.states, **packed, **self.vectors, "eps": EPS}
        schema = torch.ops.blockdraft.moe_router.default._schema
        return {argument.name: given[argument.name] for argument in schema.arguments}

    def in_float64(self) -> dict[str, Any]:
        exact = {n: x.double() if isinstance(x, Tensor) else x for n, x in self.call().items()}
        return exact | {n: blockdraft.reference.pack_weight(w.double()) for n, w in self.matrices.items()}

    def route(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.backend.op("moe_router")(**self.call())

    def probabilities(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of every class ``[T, E + 1]`` in float64, from a given state z; and what float32 may be off. Errors that a
        matrix adds up are taken as independent, as those within a sum are."""
        c, a = self.backend.sum_constant, {n: x.double() for n, x in (self.matrices | self.vectors).items()}
        h = z * (z.square().mean(-1, keepdim=True) + EPS).rsqrt() * a["norm_weight"]
        error, of_norm = 3 * U32 * h.abs(), (c / 2 * self.R**0.5 + 2) * U32
        for layer in ("fc1", "fc2", "out_proj"):
            weight = a[layer]
            error = c * (error.square() @ weight.square().T).sqrt() + sum_error(c, self.R, h.abs() @ weight.abs().T)
            h = h @ weight.T
            if layer == "fc1":
                error += of_norm * h.abs()  # the same factor for all of a row
            if layer != "out_proj":
                h = h + a[f"{layer}_bias"]
                error = 1.13 * (error + 2 * U32 * h.abs()) + 4 * U32 * h.abs()  # the slope of gelu, its own roundings
                h = gelu(h)
        spread = h.max(-1, keepdim=True).values - h
        probs = h.softmax(-1)
        return probs, probs * (2 * error.max(-1, keepdim=True).values + (2 * spread + 24) * U32) + 1e-37


def assert_matches_float64(router: Router) -> None:
    """The state, then the choice from the state as it came out."""
    ids, weights, z = router.route()
    assert (ids.dtype, weights.dtype, z.dtype) == (torch.int32, torch.float32, torch.float32)
    exact = router.in_float64()
    _, _, z64 = blockdraft.reference.moe_router(**exact)
    size = exact["x"].abs() @ router.matrices["down_proj"].double().abs().T
    addends = size + exact["down_proj_bias"].abs()
    if exact["router_states"] is not None:
        addends = addends + (exact["router_states"] * exact["router_states_scale"]).abs()
    assert_within(
        z, z64, sum_error(router.backend.sum_constant, router.H, size) + 3 * U32 * addends, "router_states_out"
    )

    # The definition once more, with z as its input: an identity for down_proj.
    identity = blockdraft.reference.pack_weight(torch.eye(router.R).double())
    from_z = {"x": z.double(), "down_proj": identity, "router_states": None, "router_states_scale": None}
    from_z["down_proj_bias"] = torch.zeros(router.R).double()
    expected_ids, expected_weights, _ = blockdraft.reference.moe_router(**(exact | from_z))
    probs, error = router.probabilities(z.double())
    torch.testing.assert_close(probs.gather(1, expected_ids.long()[:, None])[:, 0], expected_weights)
    chosen = ids.long()[:, None]
    assert_within(weights, probs.gather(1, chosen)[:, 0], error.gather(1, chosen)[:, 0], "topk_weights")

    biased, margin = probs + exact["balancing_biases"], error + U32 * (probs + exact["balancing_biases"]).abs()
    least = (biased - margin).max(-1).values  # some class has at least this score
    assert ((biased + margin).gather(1, chosen)[:, 0] >= least).all(), "a class was chosen that cannot be the largest"
    decided = ((biased + margin) >= least[:, None]).sum(-1) == 1
    assert torch.equal(ids[decided], expected_ids[decided])
    assert (~decided).sum() <= 1 + len(ids) // 20


@dtypes
@pytest.mark.parametrize("states", [True, False], ids=["states", "layer0"])
@each_size(
    "T H R E",
    (0, 8, 8, 4),
    (1, 1, 1, 1),
    (3, 33, 31, 5),
    (7, 64, 33, 15),
    (16, 100, 32, 16),
    (5, 31, 64, 17),
    (33, 256, 65, 33),
    (50, 128, 256, 16),
    (9, 64, 544, 5),
    (9, 40, 32, 300),
)
def test_matches_float64(backend, T, H, R, E, states, dtype):
    router = Router(backend, T, H, R, E, dtype)
    if not states:
        router.states = dict.fromkeys(router.states)
    assert_matches_float64(router)


@dtypes
@pytest.mark.parametrize("states", [True, False], ids=["states", "layer0"])
@each_size("T H R", (20, 301, 40), (3, 2080, 64), (70, 96, 64))
def test_state_of_integers_is_exact(backend, T, H, R, states, dtype):
    """2080 are more steps of k than the warps of a GPU kernel have on their way, 70 rows three of its blocks."""
    router = Router(backend, T, H, R, 5, dtype)
    router.x, router.matrices["down_proj"] = (torch.randint(-4, 5, s).to(dtype) for s in ((T, H), (R, H)))
    router.vectors["down_proj_bias"] = torch.randint(-4, 5, (R,)).float()
    router.states = {n: torch.randint(-4, 5, x.shape).float() for n, x in router.states.items()}
    if not states:
        router.states = dict.fromkeys(router.states)
    _, _, expected = blockdraft.reference.moe_router(**router.in_float64())
    assert torch.equal(router.route()[2], expected.float())


# The choice.


@dtypes
@pytest.mark.parametrize("E", [1, 5, 16, 17, 40])
def test_equal_classes_give_the_lowest(backend, E, dtype):
    router = Router(backend, 9, 40, 32, E, dtype)
    router.matrices["out_proj"].zero_(), router.vectors["balancing_biases"].zero_()
    ids, weights, _ = router.route()
    assert not ids.any()
    torch.testing.assert_close(weights, torch.full((9,), 1 / (E + 1)))


@dtypes
@each_size("low high", (0, 17), (3, 4), (0, 1), (15, 16), (16, 17))
def test_tie_of_two_gives_the_lower(backend, low, high, dtype):
    router = Router(backend, 9, 40, 32, 17, dtype)
    router.matrices["out_proj"][high] = router.matrices["out_proj"][low]
    router.vectors["balancing_biases"][[low, high]] = 2
    assert (router.route()[0] == low).all()


@dtypes
@pytest.mark.parametrize("winner", [0, 7, 16], ids=["first", "middle", "skip"])
def test_biases_choose_and_do_not_weigh(backend, winner, dtype):
    """16 is the skip class. The weight stays the plain probability."""
    router = Router(backend, 9, 40, 32, 16, dtype)
    router.vectors["balancing_biases"][winner] = 3
    ids, weights, z = router.route()
    assert (ids == winner).all()
    probs, error = router.probabilities(z.double())
    assert_within(weights, probs[:, winner], error[:, winner])


@dtypes
def test_nan_never_wins(backend, dtype):
    router = Router(backend, 9, 40, 32, 40, dtype)
    router.vectors["balancing_biases"][[0, 7, 35]] = torch.tensor([torch.nan, 2, torch.nan])
    assert (router.route()[0] == 7).all()


def test_activations_are_not_rounded(backend):
    """To bfloat16, that is, nor to two of it: with weights in bfloat16 the errors are those of float32."""
    router = Router(backend, 50, 128, 256, 16, torch.bfloat16)
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        router.x, router.matrices = router.x.to(dtype), {n: w.to(dtype) for n, w in router.matrices.items()}
        ids, weights, z = router.route()
        probs, _ = router.probabilities(z.double())
        errors[dtype] = (weights - probs.gather(1, ids.long()[:, None])[:, 0]).abs().mean()
    assert errors[torch.bfloat16] <= 3 * errors[torch.float32]


def test_zero_states_are_no_states(backend):
    router = Router(backend, 9, 40, 32, 16, torch.float32)
    router.states["router_states"].zero_()
    with_zeros = router.route()
    router.states = dict.fromkeys(router.states)
    assert all(torch.equal(a, b) for a, b in zip(with_zeros, router.route(), strict=True))


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["x", "router_states"])
def test_bad_row_gets_an_id_in_range_and_stays_alone(backend, where, value, dtype):
    router = Router(backend, 9, 40, 32, 16, dtype)
    clean = router.route()
    (router.x if where == "x" else router.states["router_states"])[4, 31] = value
    results = router.route()
    assert 0 <= results[0][4] <= 16
    assert not results[1][4].isfinite()
    others = torch.arange(9) != 4
    assert all(same_bits(ours[others], expected[others]) for ours, expected in zip(results, clean, strict=True))


@dtypes
@each_size("H R states", (300, 96, False), (320, 128, True))
def test_batch_invariance(backend, H, R, states, dtype):
    router = Router(backend, 64, H, R, 16, dtype)
    if not states:
        router.states = dict.fromkeys(router.states)
    call = router.call()

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        chosen = {"x": call["x"][rows]}
        if states:
            chosen["router_states"] = call["router_states"][rows]
        return backend.op("moe_router")(**(call | chosen))

    assert_batch_invariant(run)


@dtypes
def test_many_rows_have_the_bits_of_few(backend, dtype):
    """More than 64 rows are a kernel of its own on a GPU."""
    router = Router(backend, 100, 192, 64, 16, dtype)
    call, together = router.call(), router.route()
    for begin, end in ((0, 3), (3, 19), (30, 94), (90, 100)):
        rows = {name: call[name][begin:end] for name in ("x", "router_states")}
        few = backend.op("moe_router")(**(call | rows))
        assert all(same_bits(ours[begin:end], expected) for ours, expected in zip(together, few, strict=True))


# Errors.


def small_call(backend) -> dict[str, Any]:
    return Router(backend, 3, 6, 40, 4, torch.float32).call()


@each_malformed_tensor("moe_router")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "moe_router", small_call(backend), changes, message)


TOGETHER = "router_states and router_states_scale must be given together or not at all"


@each_wrong_call(
    {
        "float64": ({"x": Tensor.double}, "x must be Float or BFloat16, got Double"),
        "mixed": ({"x": Tensor.bfloat16}, "down_proj must be BFloat16, got Float"),
        "fc2-bfloat16": ({"fc2": Tensor.bfloat16}, "fc2 must be Float, got BFloat16"),
        "H": ({"x": torch.zeros(3, 8)}, r"down_proj must be \[.*=2, .*=4, .*64\], got \[2, 3, 64\]"),
        "R-of-down": ({"down_proj": lambda t: t[:1]}, r"down_proj must be .*, got \[1, 3, 64\]"),
        "R-of-fc1": ({"fc1": lambda t: t[:, :19].clone()}, r"fc1 must be .*=20.*, got \[2, 19, 64\]"),
        "R-of-fc2": ({"fc2": lambda t: t[:1]}, r"fc2 must be .*, got \[1, 20, 64\]"),
        "E-of-out": ({"out_proj": lambda t: t.repeat(2, 1, 1)}, r"out_proj must be .*=1, .*, got \[2, 20, 64\]"),
        "norm": ({"norm_weight": torch.ones(39)}, r"norm_weight must be \[R=40\], got \[39\]"),
        "fc1-bias": ({"fc1_bias": torch.ones(41)}, r"fc1_bias must be \[R=40\], got \[41\]"),
        "fc2-bias": ({"fc2_bias": torch.ones(41)}, r"fc2_bias must be \[R=40\], got \[41\]"),
        "E": ({"balancing_biases": torch.ones(33)}, r"out_proj must be .*=2, .*, got \[1, 20, 64\]"),
        "states": ({"router_states": torch.ones(2, 40)}, r"router_states must be \[T=3, R=40\], got \[2, 40\]"),
        "states-bfloat16": ({"router_states": Tensor.bfloat16}, "router_states must be Float, got BFloat16"),
        "scale": ({"router_states_scale": torch.ones(39)}, r"router_states_scale must be \[R=40\], got \[39\]"),
        "no-states": ({"router_states": None}, TOGETHER),
        "no-scale": ({"router_states_scale": None}, TOGETHER),
        "R0": ({"down_proj_bias": torch.ones(0)}, "R and E must be positive, got 0 and 4"),
        "E0": ({"balancing_biases": torch.ones(1)}, "R and E must be positive, got 40 and 0"),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "moe_router", small_call(backend), changes, message)


def test_no_columns(backend):
    changes = {"x": torch.empty(3, 0), "down_proj": torch.empty(2, 0, 64)}
    assert_raises(backend, "moe_router", small_call(backend), changes, ".*positive.*")


# Registration.


@dtypes
@pytest.mark.parametrize("states", [True, False], ids=["states", "layer0"])
def test_opcheck(cpu, states, dtype):
    router = Router(cpu, 3, 6, 40, 4, dtype)
    if not states:
        router.states = dict.fromkeys(router.states)
    opcheck("moe_router", router.call())


def test_compiles_once_for_all_lengths(cpu):
    call = Router(cpu, 50, 6, 40, 4, torch.float32).call()
    first = call | {name: call[name][:33] for name in ("x", "router_states")}
    assert_compiles_once("moe_router", first, call)
