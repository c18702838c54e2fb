import math
from typing import Any

import pytest
import torch
from torch import Tensor

import blockdraft
from blockdraft.reference.choose_tokens import log_law
from blockdraft.reference.lm_head_choose import gumbel
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
    threads,
)
from ops.laws import (
    DTYPES,
    OFF,
    assert_follows,
    each_value_without_a_law,
    law_columns,
    law_of,
    random_laws,
)

DRAWS = 20_000
LAW = ("temperature", "top_k", "top_p", "min_p")


def make_call(logits: Tensor, **laws: Any) -> dict[str, Tensor]:
    return {"logits": logits} | law_columns(len(logits), **laws)


def random_logits(T: int, V: int) -> Tensor:
    """Eighths, many of them equal, some ids not allowed."""
    logits = torch.randint(-40, 40, (T, V)) / 8
    return logits.masked_fill((torch.rand(T, V) < 0.1) & (torch.arange(V) > 0), -math.inf)


# The same tokens as lm_head_choose.


@dtypes
@each_size("V", (1,), (5,), (16,), (31,), (33,), (100,), (513,), (1100,))
def test_matches_lm_head_choose(backend, V, dtype):
    """Bit for bit: the same logits, so the same limits and scores, and no near ties to allow for."""
    H, T = 16, backend.fewer(400, emulated=60)
    hidden_states, weight = torch.randn(T, H).to(dtype), (3 * torch.randn(V, H) / H**0.5).to(dtype)
    packed, laws = backend.op("pack_weight")(weight=weight, halves=1), random_laws(T)
    logits = backend.op("packed_linear")(x=hidden_states, packed_weight=packed, out_features=V, out_float32=True)
    expected, _ = backend.op("lm_head_choose")(
        hidden_states=hidden_states, packed_weight=packed, vocab_size=V, **law_columns(T, **laws)
    )
    tokens, _ = backend.op("choose_tokens")(**make_call(logits, **laws))
    assert tokens.dtype == torch.int32
    assert torch.equal(tokens, expected)


# Tokens and log-probabilities.


@each_size("V", (1,), (2,), (15,), (16,), (17,), (77,), (511,), (513,), (1100,))
def test_matches_reference(backend, V):
    """Rows of every kind of law. Equal tokens, but for rows whose two best scores float32 cannot tell apart."""
    T = backend.fewer(600, emulated=120)
    call = make_call(random_logits(T, V), **random_laws(T))
    tokens, logprobs = backend.op("choose_tokens")(**call)
    expected, _ = blockdraft.reference.choose_tokens(**call)
    log_p = log_law(call["logits"], *(call[name] for name in LAW))
    rows, chosen = torch.arange(T), tokens.long()
    exact = log_p[rows, chosen]
    assert exact.isfinite().all(), "an id without probability was chosen"
    scores = log_p + gumbel(call["seeds"], call["samples"], call["positions"], V)
    size = 1 + call["logits"][rows, chosen].abs() / call["temperature"].clamp_min(0.3)
    differs = tokens != expected
    assert ((scores[rows, expected.long()] - scores[rows, chosen])[differs] <= 4e-6 * size[differs]).all()
    assert differs.sum() <= 1
    # (logit - highest) / temperature rounds twice; exp, log and the product with log's exponent 8 units, 16 in all.
    error = (2 * exact.abs() + 2 * (call["logits"].amax(-1) / call["temperature"].clamp_min(0.3)).abs() + 16) * U32
    assert_within(logprobs, exact, error, "logprobs", zeros=True)
    assert (logprobs[call["temperature"] == 0] == 0).all()


@pytest.mark.parametrize(
    "law", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}], ids=lambda law: "-".join(law)
)
def test_never_gives_a_masked_id(backend, law):
    T = backend.fewer(300, emulated=50)
    logits = torch.zeros(T, 50)
    logits[:, ::2] = -math.inf
    tokens, _ = backend.op("choose_tokens")(**make_call(logits, positions=torch.arange(T), **law))
    assert (tokens % 2 == 1).all()
    logits[:, [i for i in range(50) if i != 33]] = -math.inf
    tokens, logprobs = backend.op("choose_tokens")(**make_call(logits, positions=torch.arange(T), **law))
    assert (tokens == 33).all()
    assert (logprobs == 0).all()


@pytest.mark.parametrize(
    "law", [{}, {"top_k": 3}, {"top_k": 10}, {"top_p": 0.8}, {"min_p": 0.2, "temperature": 1.4}], ids=str
)
def test_law_of_masked_logits(backend, law):
    """top_k counts the allowed ids alone; 10 is more than there are."""
    logits = torch.tensor([0.5, -math.inf, 1.0, -1.0, -math.inf, 0.0, 1.0, -0.5, -math.inf, -2.0, 0.25])
    T = backend.fewer(DRAWS, emulated=500)
    call = make_call(logits.expand(T, -1).contiguous(), positions=torch.arange(T), **law)
    law_values = torch.tensor(law_of(logits.tolist(), **({"temperature": 1.0} | law)))
    tokens, logprobs = backend.op("choose_tokens")(**call)
    assert_follows(tokens, law_values)
    torch.testing.assert_close(logprobs, law_values.log()[tokens.long()], rtol=0, atol=1e-6)


def test_zeros_are_equal(backend):
    """0 and -0, whichever comes first: the lowest id is the greedy one, and a limit leaves both."""
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0], [-1.0, 0.0, -0.0, 0.0]]).repeat(50, 1)
    tokens, _ = backend.op("choose_tokens")(**make_call(logits, temperature=0.0))
    assert (tokens == 1).all()
    for law in ({"top_k": 1}, {"top_p": 0.01}):
        tokens, logprobs = backend.op("choose_tokens")(**make_call(logits, positions=torch.arange(100), **law))
        assert [set(tokens[row::2].tolist()) for row in (0, 1)] == [{1, 2, 3}] * 2
        torch.testing.assert_close(logprobs, torch.full([100], -math.log(3)))


@pytest.mark.parametrize("V", [8191, 8193, 262_147])
def test_large_vocabularies(backend, V):
    """The last id is in reach, and equal logits have probability 1 / V."""
    logits = torch.zeros(3, V)
    laws = {"temperature": torch.tensor([0.0, 1.0, 1.0]), "top_p": torch.tensor([1.0, 1.0, 0.5])}
    tokens, logprobs = backend.op("choose_tokens")(**make_call(logits, positions=torch.arange(3), **laws))
    assert tokens[0] == 0
    assert ((tokens >= 0) & (tokens < V)).all()
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -math.log(V), -math.log(V)]))
    logits[:, -1] = 40
    tokens, logprobs = backend.op("choose_tokens")(**make_call(logits, **laws))
    assert tokens.tolist() == [V - 1] * 3
    assert (logprobs == 0).all()


def test_logits_at_the_limits_of_float32(backend):
    """Their ratio to a low temperature is infinite; the highest has all the probability."""
    largest = torch.finfo(torch.float32).max
    rows = [[1e35, 2e35, -1e35], [-2e38, -1e38, -largest], [-largest, largest, 0], [-largest, -largest, -math.inf]]
    for temperature in (1e-6, 1e-3):
        call = make_call(torch.tensor(rows, dtype=torch.float32), temperature=temperature)
        tokens, logprobs = backend.op("choose_tokens")(**call)
        assert tokens[:3].tolist() == [1, 1, 1]
        assert tokens[3] in (0, 1)
        torch.testing.assert_close(logprobs, torch.tensor([0, 0, 0, -math.log(2)]))


def test_gpu_chooses_as_the_cpu(gpu, cpu):
    """The same noise; log and exp differ in their last places, which may decide between two near scores."""
    call = make_call(3 * torch.randn(120, 600), **random_laws(120))
    tokens = [backend.op("choose_tokens")(**call)[0] for backend in (gpu, cpu)]
    assert (tokens[0] != tokens[1]).sum() <= 1


# Rows without a law.


@pytest.mark.parametrize("V", [1, 20, 48])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_bad_row_gets_no_token_and_stays_alone(backend, value, V):
    laws = random_laws(24)
    logits = torch.randn(24, V)
    clean = backend.op("choose_tokens")(**make_call(logits, **laws))
    for place in (0, V // 2, V - 1, slice(None)):
        if value == -math.inf and place != slice(None):
            continue
        bad = torch.arange(24) % 8 < 2  # some of every law
        dirty = logits.clone()
        dirty[bad, place] = value
        tokens, logprobs = backend.op("choose_tokens")(**make_call(dirty, **laws))
        assert (tokens[bad] == -1).all()
        assert logprobs[bad].isnan().all()
        for ours, expected in zip((tokens, logprobs), clean, strict=True):
            assert same_bits(ours[~bad], expected[~bad])
        assert torch.equal(blockdraft.reference.choose_tokens(**make_call(dirty, **laws))[0][bad], tokens[bad])


# Invariance.


def test_batch_invariance(backend):
    call = make_call(random_logits(64, 1100), **random_laws(64))
    assert_batch_invariant(lambda rows: backend.op("choose_tokens")(**{name: x[rows] for name, x in call.items()}))


def test_two_threads(backend):
    """More rows than one thread takes."""
    T = backend.fewer(1000, emulated=50)
    call = make_call(random_logits(T, 50), **random_laws(T))
    with threads(1):
        expected = backend.op("choose_tokens")(**call)
    with threads(2):
        assert all(same_bits(a, b) for a, b in zip(backend.op("choose_tokens")(**call), expected, strict=True))


def test_no_rows(backend):
    tokens, logprobs = backend.op("choose_tokens")(**make_call(torch.zeros(0, 9)))
    assert tokens.shape == logprobs.shape == (0,)


# Errors.


def small_call() -> dict[str, Tensor]:
    return make_call(torch.randn(3, 40))


@each_malformed_tensor("choose_tokens")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "choose_tokens", small_call(), changes, message)


@each_wrong_call(
    {
        "float64": ({"logits": Tensor.double}, "logits must be Float, got Double"),
        "bfloat16": ({"logits": Tensor.bfloat16}, "logits must be Float, got BFloat16"),
        "V0": ({"logits": torch.zeros(3, 0)}, r"V must be in \[1, 2147483647\], got 0"),
    }
    | {name: ({name: lambda t: t[:2]}, rf"{name} must be \[T=3\], got \[2\]") for name in OFF}
    | {
        "seeds-int32": ({"seeds": Tensor.int}, "seeds must be Long, got Int"),
        "top-k-int64": ({"top_k": Tensor.long}, "top_k must be Int, got Long"),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "choose_tokens", small_call(), changes, message)


@each_value_without_a_law
def test_values_without_a_law(cpu, name, value):
    changes = {name: torch.tensor([OFF[name], value, OFF[name]], dtype=DTYPES.get(name, torch.float32))}
    assert_raises(cpu, "choose_tokens", small_call(), changes, f"{name} must be .*, got .* at 1")


@each_value_without_a_law
def test_gpu_gives_no_token_by_a_value_without_a_law(gpu, name, value):
    call = make_call(torch.randn(6, 40), temperature=torch.tensor([0, 0, 1, 1, 0.5, 0.5]), top_k=5, top_p=0.5)
    clean = gpu.op("choose_tokens")(**call)
    call[name][::2] = value
    tokens, logprobs = gpu.op("choose_tokens")(**call)
    assert (tokens[::2] == -1).all()
    assert logprobs[::2].isnan().all()
    for ours, expected in zip((tokens, logprobs), clean, strict=True):
        assert same_bits(ours[1::2], expected[1::2])


# Registration.


def test_opcheck():
    opcheck("choose_tokens", make_call(random_logits(6, 40), **random_laws(6)))


def test_compiles_once_for_all_lengths():
    first, then = (make_call(random_logits(T, 41), **random_laws(T)) for T in (33, 50))
    assert_compiles_once("choose_tokens", first, then)
