import math
from typing import Any

import pytest
import torch
from torch import Tensor

import blockdraft
from blockdraft.reference.choose_tokens import log_law
from ops.helpers import (
    U32,
    assert_batch_invariant,
    assert_compiles_once,
    assert_raises,
    assert_within,
    each_malformed_tensor,
    each_size,
    each_wrong_call,
    opcheck,
    same_bits,
    threads,
)
from ops.laws import DTYPES, OFF, WITHOUT_LAW, law_columns, random_laws

LAW = ("temperature", "top_k", "top_p", "min_p")
INT = ("draft_rows", "drafts")


def make_call(logits: Tensor, draft_logits: Tensor, **columns: Any) -> dict[str, Tensor]:
    """By default the drafts are ids 0 as point masses, lenience is 1 and the uniforms are 0.5."""
    T = len(logits)
    laws = {name: columns.pop(name) for name in LAW if name in columns}
    defaults = {"draft_rows": -1, "drafts": 0, "lenience": 1.0, "accept_uniforms": 0.5, "residual_uniforms": 0.5}
    values = {
        name: torch.as_tensor(x, dtype=torch.int32 if name in INT else torch.float32).expand(T).contiguous()
        for name, x in (defaults | columns).items()
    }
    law_values = {name: x for name, x in law_columns(T, **laws).items() if name in LAW}
    call = {"logits": logits, "draft_logits": draft_logits} | values | law_values
    return {name: call[name] for name in ORDER}


ORDER = ["logits", "draft_logits", "draft_rows", "drafts", *LAW, "lenience", "accept_uniforms", "residual_uniforms"]
PER_ROW = [name for name in ORDER if name != "draft_logits"]


def logits_of(*probabilities: float) -> Tensor:
    """A row whose law is these; zeros become -inf."""
    return torch.tensor([probabilities]).log()


def decide(backend, logits: Tensor, draft_logits: Tensor | None = None, **columns: Any) -> list[int]:
    """Tokens for one law and one proposal under several uniforms, drafts or settings."""
    T = max(len(torch.as_tensor(x).reshape(-1)) for x in columns.values())
    rows = {"draft_rows": -1} if draft_logits is None else {"draft_rows": 0}
    proposal = torch.zeros(0, logits.shape[1]) if draft_logits is None else draft_logits
    call = make_call(logits.expand(T, -1).contiguous(), proposal, **(rows | columns))
    tokens, logprobs = backend.op("reject_drafts")(**call)
    assert (tokens.dtype, logprobs.dtype) == (torch.int32, torch.float32)
    return tokens.tolist()


# Against the definition.


def random_call(T: int, V: int) -> dict[str, Tensor]:
    """Every kind of law; drafts drawn from their rows, at random, or as point masses; ids that are not allowed."""
    logits = torch.randint(-24, 24, (T, V)) / 8
    draft_logits = logits[::2] + torch.randn(len(logits[::2]), V)  # a row for two, near to one of them
    logits.masked_fill_((torch.rand(T, V) < 0.1) & (torch.arange(V) > 0), -math.inf)
    draft_rows = torch.where(torch.rand(T) < 0.2, -1, torch.arange(T) // 2)
    likely = torch.multinomial(draft_logits.softmax(-1), 1)[draft_rows, 0]
    laws = {name: x for name, x in random_laws(T).items() if name in LAW}
    return make_call(
        logits,
        draft_logits,
        draft_rows=draft_rows,
        drafts=torch.where(torch.rand(T) < 0.7, likely, torch.randint(V, (T,))),
        lenience=torch.where(torch.rand(T) < 0.8, 1.0, 1 + torch.rand(T)),
        accept_uniforms=torch.rand(T),
        residual_uniforms=torch.rand(T),
        **laws,
    )


@each_size("V", (1,), (2,), (3,), (15,), (16,), (17,), (100,), (513,), (1100,))
def test_matches_reference(backend, V):
    """Equal tokens; a uniform within float32's rounding of a border is not among so few rows."""
    T = backend.fewer(600, emulated=120)
    call = random_call(T, V)
    tokens, logprobs = backend.op("reject_drafts")(**call)
    expected, _ = blockdraft.reference.reject_drafts(**call)
    differs = tokens != expected
    assert differs.sum() <= (1 if V > 500 else 0), f"rows {differs.nonzero()[:, 0].tolist()}"
    accepted = (tokens == call["drafts"]).double().mean()
    assert V < 3 or 0.1 < accepted < 0.9, "kept and rejected drafts are among the rows"
    exact = log_law(call["logits"], *(call[name] for name in LAW))[torch.arange(T), tokens.long()]
    assert exact.isfinite().all(), "an id without probability was given"
    # As in choose_tokens: two roundings of the scaled logit, exp, log and the product with log's exponent.
    error = (4 * exact.abs() + 16) * U32
    assert_within(logprobs, exact, error, "logprobs", zeros=True)


@pytest.mark.parametrize("drawn", [False, True], ids=["point-mass", "drawn"])
def test_matches_running_sums_of_the_real_vocabulary(backend, drawn):
    """262,272 ids: the running sum in float64 around the token encloses the uniform, within the error of exp."""
    V, T = 262_272, 8
    logits, draft_logits = 2 * torch.randn(1, V), torch.randn(1, V)
    logits[0, 7], draft_logits[0, 7] = -30, 20  # the draft: certain to be rejected
    p = logits[0].double().softmax(-1)
    q = draft_logits[0].double().softmax(-1) if drawn else torch.zeros(V).double()
    residual = (p - q).clamp_min(0)
    residual[7] = 0
    running = residual.cumsum(0) / residual.sum()
    uniforms = torch.cat([torch.linspace(0, 1 - 2**-24, T - 2), torch.tensor([2**-24, 1 - 2**-10])])
    tokens = torch.tensor(
        decide(backend, logits, draft_logits if drawn else None, drafts=7, residual_uniforms=uniforms)
    )
    assert (residual[tokens] > 0).all()
    below = running[tokens] - residual[tokens] / residual.sum()
    assert (below <= uniforms + 1e-7).all()
    assert (running[tokens] >= uniforms - 1e-7).all()


def test_exact_running_sums(backend):
    """Equal logits have weight 1, so the id is known for every uniform, to the last of 262,272."""
    V = 262_272
    uniforms = (torch.tensor([0.0, 1, 511, 512, 513, 131_072, 262_142, 262_143]) / 2**18).float()
    logits = torch.zeros(1, V)
    logits[0, 2**18 :] = -math.inf
    drafts = 2**18  # not allowed, so rejected
    assert decide(backend, logits, drafts=drafts, residual_uniforms=uniforms) == (uniforms * 2**18).int().tolist()


# The rule, by hand.


def test_accepts_below_the_ratio(backend):
    """p(d) = 1/4, q(d) = 1/2: kept while u < 1/2. Both laws are exact in float32."""
    p, q = torch.tensor([[0.0, 0, 0, 0]]), torch.tensor([[0.0, 0, -math.inf, -math.inf]])
    uniforms = [0.0, 0.25, 0.5 - 2**-25, 0.5, 0.75, 1 - 2**-24]
    assert decide(backend, p, q, drafts=1, accept_uniforms=uniforms) == [1, 1, 1, 3, 3, 3]


def test_point_mass_is_kept_with_its_probability(backend):
    p = torch.zeros(1, 4)
    uniforms = [0.0, 0.25 - 2**-26, 0.25, 0.9]
    assert decide(backend, p, drafts=2, accept_uniforms=uniforms, residual_uniforms=0.99) == [2, 2, 3, 3]
    # p without the draft has three ids.
    shares = [0.0, 0.3, 0.34, 0.66, 0.67, 0.999]
    assert decide(backend, p, drafts=1, accept_uniforms=0.5, residual_uniforms=shares) == [0, 0, 2, 2, 3, 3]


def test_residual_is_the_positive_part(backend):
    """p - q = [1/4, -1/4, 1/4, -1/4]."""
    p, q = torch.zeros(1, 4), torch.tensor([[-math.inf, 0, -math.inf, 0]])
    shares = [0.0, 0.49, 0.5, 0.51, 0.99]
    assert decide(backend, p, q, drafts=3, accept_uniforms=0.9, residual_uniforms=shares) == [0, 0, 2, 2, 2]


def test_lenience_scales_the_acceptance(backend):
    p = torch.zeros(1, 4)
    leniences = [1.0, 1.9, 2.0, 2.1, 4.0]
    assert decide(backend, p, drafts=2, accept_uniforms=0.5, residual_uniforms=0, lenience=leniences) == [0, 0, 0, 2, 2]
    forbidden = logits_of(0.5, 0.5, 0)
    assert decide(backend, forbidden, drafts=2, accept_uniforms=[0.0, 0.5], lenience=1e30) == [1, 1]


def test_greedy_gives_the_argmax(backend):
    """The lowest of equals, whatever draft, proposal, uniforms or truncation."""
    logits = torch.tensor([[1.0, 3.0, 3.0, -math.inf, 2.0]]).expand(40, -1).contiguous()
    columns = {
        "draft_rows": torch.arange(40) % 3 - 1,
        "drafts": torch.arange(40) % 5,
        "accept_uniforms": torch.rand(40),
        "residual_uniforms": torch.rand(40),
        "top_p": 0.01 + 0.9 * torch.rand(40),
    }
    call = make_call(logits, torch.tensor([[math.nan] * 5, [0.0] * 5]), temperature=0.0, **columns)
    tokens, logprobs = backend.op("reject_drafts")(**call)
    assert tokens.tolist() == [1] * 40
    assert (logprobs == 0).all()


def test_truncation_is_of_both_laws(backend):
    """top_k 2 leaves p = q = [1/2, 1/2, 0, 0] and [0, 1/2, 1/2, 0]."""
    p, q = torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[0.0, 3, 3, 1]])
    assert decide(backend, p, q, drafts=1, top_k=2, accept_uniforms=[0.0, 0.99]) == [1, 1]
    assert decide(backend, p, q, drafts=2, top_k=2, accept_uniforms=[0.0, 0.99], residual_uniforms=0.99) == [0, 0]


# Rows without a law.


@pytest.mark.parametrize("where", ["logits", "draft_logits"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_bad_row_gets_no_token_and_stays_alone(backend, value, where):
    call = random_call(48, 37)
    clean = backend.op("reject_drafts")(**call)
    for place in (0, 36, slice(None)):
        if value == -math.inf and place != slice(None):
            continue
        dirty = {name: x.clone() for name, x in call.items()}
        dirty[where][::3, place] = value
        bad = torch.arange(48) % 3 == 0
        if where == "draft_logits":
            bad = (call["draft_rows"] % 3 == 0) & (call["draft_rows"] >= 0) & (call["temperature"] > 0)
        assert 0 < bad.sum() < 48
        tokens, logprobs = backend.op("reject_drafts")(**dirty)
        assert (tokens[bad] == -1).all()
        assert logprobs[bad].isnan().all()
        for ours, expected in zip((tokens, logprobs), clean, strict=True):
            assert same_bits(ours[~bad], expected[~bad])
        assert torch.equal(blockdraft.reference.reject_drafts(**dirty)[0] == -1, bad)


# Invariance.


def test_batch_invariance(backend):
    call = random_call(64, 1100)
    assert_batch_invariant(
        lambda rows: backend.op("reject_drafts")(**(call | {name: call[name][rows] for name in PER_ROW}))
    )


def test_two_threads(backend):
    """More rows than one thread takes."""
    call = random_call(backend.fewer(1000, emulated=50), 50)
    with threads(1):
        expected = backend.op("reject_drafts")(**call)
    with threads(2):
        assert all(same_bits(a, b) for a, b in zip(backend.op("reject_drafts")(**call), expected, strict=True))


@pytest.mark.parametrize(("T", "M"), [(0, 0), (0, 3), (4, 0)])
def test_no_rows(backend, T, M):
    tokens, logprobs = backend.op("reject_drafts")(**make_call(torch.zeros(T, 9), torch.zeros(M, 9)))
    assert tokens.shape == logprobs.shape == (T,)
    assert (tokens > 0).all()


# Errors.


def small_call() -> dict[str, Tensor]:
    return make_call(torch.randn(3, 40), torch.randn(2, 40), draft_rows=[0, 1, -1])


@each_malformed_tensor("reject_drafts")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "reject_drafts", small_call(), changes, message)


@each_wrong_call(
    {
        "float64": ({"logits": Tensor.double}, "logits must be Float, got Double"),
        "bfloat16": ({"draft_logits": Tensor.bfloat16}, "draft_logits must be Float, got BFloat16"),
        "V": ({"draft_logits": torch.zeros(2, 41)}, r"draft_logits must be \[M=2, V=40\], got \[2, 41\]"),
        "V0": (
            {"logits": torch.zeros(3, 0), "draft_logits": torch.zeros(2, 0)},
            r"V must be in \[1, 2147483647\], got 0",
        ),
        "drafts-int64": ({"drafts": Tensor.long}, "drafts must be Int, got Long"),
    }
    | {name: ({name: lambda t: t[:2]}, rf"{name} must be \[T=3\], got \[2\]") for name in PER_ROW if name != "logits"}
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "reject_drafts", small_call(), changes, message)


def at_1(value: float, other: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([other, value, other], dtype=dtype)


OUT_OF_RANGE = [("lenience", value) for value in (0.0, 1 - 2**-24, -1.0, math.nan, math.inf)]
OUT_OF_RANGE += [("accept_uniforms", value) for value in (-(2**-30), 1.0, math.nan, math.inf)]
OUT_OF_RANGE += [("residual_uniforms", value) for value in (-(2**-30), 1.0, math.nan, -math.inf)]
FINE = {"lenience": 1.0, "accept_uniforms": 0.0, "residual_uniforms": 0.0}


@each_wrong_call(
    {
        f"{name}={value}": (
            {name: at_1(value, OFF[name], DTYPES.get(name, torch.float32))},
            f"{name} must be .*, got .* at 1",
        )
        for name, value in WITHOUT_LAW
    }
    | {
        f"{name}={value}": (
            {name: at_1(value, FINE[name], torch.float32)},
            rf"{name} must be (in \[0, 1\)|finite and at least 1), got .* at 1",
        )
        for name, value in OUT_OF_RANGE
    }
    | {
        f"draft{d}": ({"drafts": at_1(d, 0, torch.int32)}, rf"drafts must be in \[0, 39\], got {d} at 1")
        for d in (-1, 40, 2**31 - 1, -(2**31))
    }
    | {
        f"row{r}": ({"draft_rows": at_1(r, -1, torch.int32)}, rf"draft_rows must be in \[-1, 1\], got {r} at 1")
        for r in (-2, 2, 2**31 - 1)
    }
    | {"no-row": ({"draft_logits": torch.zeros(0, 40)}, r"draft_rows must be in \[-1, -1\], got 0 at 0")}
)
def test_values_out_of_range(cpu, changes, message):
    assert_raises(cpu, "reject_drafts", small_call(), changes, message)


INDICES = [("drafts", value) for value in (-1, 40, 2**31 - 1, -(2**31))]
INDICES += [("draft_rows", value) for value in (-2, 6, 2**31 - 1, -(2**31))]


@pytest.mark.parametrize(("name", "value"), WITHOUT_LAW + OUT_OF_RANGE + INDICES, ids=str)
def test_gpu_gives_no_token_by_a_value_out_of_range(gpu, name, value):
    """Rows that are greedy, have a point mass or a drawn draft; every other one keeps its bits."""
    laws = {"temperature": torch.tensor([0, 0, 1, 1, 0.5, 0.5]), "top_k": 9, "top_p": 0.7}
    call = make_call(torch.randn(6, 40), torch.randn(6, 40), draft_rows=[0, 1, -1, -1, 4, 5], drafts=3, **laws)
    clean = gpu.op("reject_drafts")(**call)
    call[name][::2] = value
    tokens, logprobs = gpu.op("reject_drafts")(**call)
    assert (tokens[::2] == -1).all()
    assert logprobs[::2].isnan().all()
    for ours, expected in zip((tokens, logprobs), clean, strict=True):
        assert same_bits(ours[1::2], expected[1::2])


# Registration.


def test_opcheck():
    opcheck("reject_drafts", random_call(6, 40))


def test_compiles_once_for_all_lengths():
    first, then = random_call(33, 41), random_call(50, 41)
    assert_compiles_once("reject_drafts", first, then)
