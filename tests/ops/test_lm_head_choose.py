import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import blockdraft
from blockdraft.reference.lm_head_choose import gumbel, keep, philox
from ops.helpers import (
    U32,
    assert_batch_invariant,
    assert_compiles_once,
    assert_raises,
    assert_within,
    dtypes,
    each_malformed_tensor,
    each_wrong_call,
    opcheck,
    same_bits,
    sum_error,
)
from ops.laws import DTYPES, OFF, assert_follows, each_value_without_a_law, law_columns, law_of, random_laws

DRAWS = 20_000
WORD = 0xFFFFFFFF


@dataclass
class Head:
    """Rows, a head, and the law of each row; laws not given are temperature 1 and no truncation."""

    backend: Any
    hidden_states: Tensor
    weight: Tensor
    laws: dict[str, Any] = field(default_factory=dict)

    def call(self, **laws: Any) -> dict[str, Any]:
        return {
            "hidden_states": self.hidden_states,
            "packed_weight": self.backend.op("pack_weight")(weight=self.weight, halves=1),
            "vocab_size": len(self.weight),
        } | law_columns(len(self.hidden_states), **(self.laws | laws))

    def choose(self, **laws: Any) -> tuple[Tensor, Tensor]:
        tokens, logprobs = self.backend.op("lm_head_choose")(**self.call(**laws))
        assert (tokens.dtype, logprobs.dtype) == (torch.int32, torch.float32)
        return tokens, logprobs

    def in_float64(self, **laws: Any) -> dict[str, Any]:
        packed = blockdraft.reference.pack_weight(self.weight.double())
        return self.call(**laws) | {"hidden_states": self.hidden_states.double(), "packed_weight": packed}

    def logits(self) -> Tensor:
        return self.hidden_states.double() @ self.weight.double().T


def exact_head(backend, T: int, V: int, dtype: torch.dtype, H: int = 9, **laws: Any) -> Head:
    """Sixteenths, so that every logit is exact in any order of summation; many logits are equal."""
    hidden_states, weight = torch.randint(-3, 4, (T, H)), torch.randint(-16, 17, (V, H)) / 16
    return Head(backend, hidden_states.to(dtype), weight.to(dtype), laws)


def normal_head(backend, T: int, V: int, dtype: torch.dtype, H: int = 64, **laws: Any) -> Head:
    return Head(backend, torch.randn(T, H).to(dtype), (3 * torch.randn(V, H) / H**0.5).to(dtype), laws)


# Greedy.


@dtypes
@pytest.mark.parametrize("V", [1, 31, 32, 33, 100, 513, 1100])
def test_greedy_matches_argmax_of_exact_logits(backend, V, dtype):
    head = exact_head(backend, 40, V, dtype, temperature=0.0)
    tokens, _ = head.choose()
    assert torch.equal(tokens.long(), (head.logits() == head.logits().max(-1, keepdim=True).values).int().argmax(-1))
    assert torch.equal(tokens, blockdraft.reference.lm_head_choose(**head.in_float64())[0])


@dtypes
@pytest.mark.parametrize(
    "ids",
    [(0, 1), (5, 40), (15, 16), (31, 32), (511, 512), (3, 900), (1098, 1099)],
    ids=lambda ids: f"{ids[0]}-{ids[1]}",
)
def test_greedy_takes_the_lowest_of_equals(backend, ids, dtype):
    """In one vector, panel or block, and across them."""
    head = exact_head(backend, 5, 1100, dtype, temperature=0.0)
    head.hidden_states[:, 0] = 1
    head.weight[list(ids)] = 0
    head.weight[list(ids), 0] = 64
    assert head.choose()[0].tolist() == [ids[0]] * 5


def test_greedy_ignores_the_rest(backend):
    head = normal_head(backend, 20, 200, torch.float32, temperature=0.0)
    plain = head.choose()
    for law in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}, {"seeds": 5, "samples": 3, "positions": 9}):
        assert all(same_bits(a, b) for a, b in zip(head.choose(**law), plain, strict=True))


@pytest.mark.parametrize(
    "law",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}],
    ids=lambda law: "-".join(f"{n}{x}" for n, x in law.items()),
)
def test_narrow_laws_are_greedy(backend, law):
    head = normal_head(backend, 20, 200, torch.float32, positions=torch.arange(20))
    assert torch.equal(head.choose(**law)[0], head.choose(temperature=0.0)[0])


# Noise.


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011) in plain integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & WORD, p0 >> 32 ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "first"),
    [
        ([0, 0, 0, 0], [0, 0], 0x6627E8D5),
        ([WORD] * 4, [WORD] * 2, 0x408F276D),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], 0xD16CFE09),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, first):
    """Of Random123, examples/kat_vectors."""
    assert philox4x32(counter, key)[0] == first


KEYS = [
    (0, 0, 0),
    (1, 0, 0),
    (-1, 0, 0),
    (-(2**63), 7, 12),
    (2**63 - 1, 2**31 - 1, 2**31 - 1),
    (2**32, 1, 0),
    (12345, 3, 999),
]


def test_reference_noise_is_philox():
    seeds, samples, positions = (torch.tensor(column) for column in zip(*KEYS, strict=True))
    bits = philox(seeds, samples, positions, 70)
    for row, (seed, sample, position) in zip(bits.tolist(), KEYS, strict=True):
        key = [seed & WORD, seed >> 32 & WORD]
        assert row == [philox4x32([token, position, sample, 0], key)[0] for token in range(70)]


@dtypes
@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("V", [1, 31, 33, 100, 1100])
def test_equal_logits_choose_the_smallest_word(backend, V, temperature, dtype):
    """-log(-log(1 - v)) falls with v, so the noise alone takes the id with the smallest word: the kernel's noise in
    integers."""
    random = [tuple(int(torch.randint(-(2**31), 2**31, ())) for _ in range(3)) for _ in range(100)]
    keys = KEYS + [(seed * 4242424242, sample & 0x7FFFFFFF, position & 0x7FFFFFFF) for seed, sample, position in random]
    seeds, samples, positions = (torch.tensor(column) for column in zip(*keys, strict=True))
    T = len(keys)
    head = Head(backend, torch.zeros(T, 4).to(dtype), torch.zeros(V, 4).to(dtype), {"temperature": temperature})
    tokens, logprobs = head.choose(seeds=seeds, samples=samples, positions=positions)
    assert torch.equal(tokens.long(), philox(seeds, samples, positions, V).argmin(-1))
    torch.testing.assert_close(logprobs, torch.full((T,), -math.log(V)))


# Choices.


@dtypes
@pytest.mark.parametrize("V", [5, 77, 1100])
def test_matches_reference(backend, V, dtype):
    """Rows of every kind of law. Equal tokens, but for rows whose two best scores float32 cannot tell apart."""
    T = backend.fewer(600, emulated=120)
    head = exact_head(backend, T, V, dtype, **random_laws(T))
    tokens, _ = head.choose()
    exact = head.in_float64()
    expected, _ = blockdraft.reference.lm_head_choose(**exact)
    law = [exact[name] for name in ("temperature", "top_k", "top_p", "min_p")]
    kept = keep(head.logits(), *law)
    rows, chosen = torch.arange(T), tokens.long()
    assert kept[rows, chosen].all()

    differs = tokens != expected
    noise = gumbel(exact["seeds"], exact["samples"], exact["positions"], V)
    scaled = head.logits() / exact["temperature"].double().clamp_min(1e-9)[:, None]
    scores, size = scaled + noise, 1 + scaled.abs() + noise.abs()
    gap = (scores[rows, expected.long()] - scores[rows, chosen]).abs()
    assert (gap[differs] <= 2e-6 * size[rows, chosen][differs]).all()
    assert differs.sum() <= 1


@dtypes
@pytest.mark.parametrize("V", [1, 2, 31, 33, 100, 513])
@pytest.mark.parametrize(
    "law",
    [{"temperature": 0.0}, {}, {"temperature": 50.0}, {"top_k": 40}, {"top_p": 0.999}, {"min_p": 1e-6}],
    ids=["greedy", "plain", "hot", "top_k", "top_p", "min_p"],
)
def test_never_gives_an_id_of_the_padding(backend, V, law, dtype):
    """All logits are -24, those of the padding would be 0."""
    head = Head(backend, torch.full((50, 8), -1.0).to(dtype), torch.full((V, 8), 3.0).to(dtype))
    tokens, logprobs = head.choose(positions=torch.arange(50), **law)
    assert ((tokens >= 0) & (tokens < V)).all()
    torch.testing.assert_close(logprobs, torch.full((50,), -math.log(V)))


@dtypes
@pytest.mark.parametrize("V", [1, 31, 100, 1100])
def test_logprobs_match_float64(backend, V, dtype):
    """Of the plain law, whatever law the token was chosen by."""
    H, T = 65, 60
    head = normal_head(backend, T, V, dtype, H, **random_laws(T))
    tokens, logprobs = head.choose()
    chosen, logits = tokens.long()[:, None], head.logits()
    error = sum_error(backend.sum_constant, H, head.hidden_states.double().abs() @ head.weight.double().abs().T)
    # Of the logit, of the sum through its terms, and of exp, log and the last additions.
    error = error.gather(1, chosen)[:, 0] + error.max(-1).values + (32 + 2 * logits.logsumexp(-1).abs()) * U32
    assert_within(logprobs, logits.log_softmax(-1).gather(1, chosen)[:, 0], error, "logprobs", zeros=V == 1)


@dtypes
def test_batch_invariance(backend, dtype):
    """Tokens and log-probabilities of every kind of law: neither the row nor its company enters the noise."""
    call = normal_head(backend, 64, 1100, dtype, **random_laws(64)).call()
    per_row = [name for name, x in call.items() if isinstance(x, Tensor) and name != "packed_weight"]

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        return backend.op("lm_head_choose")(**(call | {name: call[name][rows] for name in per_row}))

    assert_batch_invariant(run)


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_bad_row_gets_an_id_in_range_and_stays_alone(backend, value, dtype):
    head = normal_head(backend, 24, 100, dtype, **random_laws(24))
    clean = head.choose()
    bad = torch.arange(24) % 8 < 2  # some of every law
    head.hidden_states[bad, 63] = value
    tokens, logprobs = head.choose()
    assert ((tokens >= 0) & (tokens < 100)).all()
    assert not logprobs[bad].isfinite().any()
    for ours, expected in zip((tokens, logprobs), clean, strict=True):
        assert same_bits(ours[~bad], expected[~bad])


def test_no_rows(backend):
    tokens, logprobs = normal_head(backend, 0, 100, torch.float32).choose()
    assert tokens.shape == logprobs.shape == (0,)


# The law of the choice, by a G-test. The noise is a function of its key, so the outcome is the same on every run.


def draws(backend) -> int:
    return backend.fewer(DRAWS, emulated=500)


def fixed_logits(backend, V: int, **laws: Any) -> Head:
    logits = torch.randint(-24, 9, (V,)) / 8
    logits[[1, V - 1]] = logits[0].clone()  # equals
    return Head(backend, torch.ones(draws(backend), 1), logits[:, None], laws)


KEY = {
    "position": lambda n: {"positions": torch.arange(n)},
    "sample": lambda n: {"samples": torch.arange(n)},
    "seed": lambda n: {"seeds": torch.arange(n)},
    "high-seed": lambda n: {"seeds": torch.arange(n) << 32},
}


@pytest.mark.parametrize("key", KEY)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("V", [11, 40])
def test_law_of_temperature(backend, V, temperature, key):
    head = fixed_logits(backend, V)
    tokens, _ = head.choose(temperature=temperature, **KEY[key](draws(backend)))
    assert_follows(tokens, torch.tensor(law_of(head.weight[:, 0].tolist(), temperature)))


@pytest.mark.parametrize(
    "law",
    [
        {"top_k": 4},
        {"top_k": 1},
        {"top_p": 0.61},
        {"top_p": 0.97, "temperature": 1.7},
        {"min_p": 0.17},
        {"min_p": 0.5, "temperature": 0.6},
        {"top_k": 9, "top_p": 0.83},
        {"top_k": 9, "min_p": 0.21},
        {"top_p": 0.83, "min_p": 0.21},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.14, "temperature": 1.3},
    ],
    ids=lambda law: "-".join(f"{n}{x}" for n, x in law.items()),
)
@pytest.mark.parametrize("V", [11, 40])
def test_law_of_truncation(backend, V, law):
    head = fixed_logits(backend, V)
    tokens, _ = head.choose(positions=torch.arange(draws(backend)), **law)
    assert_follows(tokens, torch.tensor(law_of(head.weight[:, 0].tolist(), **({"temperature": 1.0} | law))))


@pytest.mark.parametrize("key", KEY)
def test_neighbouring_draws_are_independent(backend, key):
    """The joint law of pairs is the product."""
    head = fixed_logits(backend, 7)
    tokens, _ = head.choose(**KEY[key](draws(backend)))
    law = torch.tensor(law_of(head.weight[:, 0].tolist(), 1.0))
    for distance in (1, 2):
        first, second = tokens.unflatten(0, (-1, 2 * distance))[:, [0, distance]].unbind(1)
        assert_follows(7 * first + second, torch.outer(law, law).flatten())


def test_g_test_finds_another_law(cpu):
    """The test can fail: temperature 1.15 is not 1."""
    head = fixed_logits(cpu, 40)
    tokens, _ = head.choose(temperature=1.15, positions=torch.arange(DRAWS))
    with pytest.raises(AssertionError, match="G ="):
        assert_follows(tokens, torch.tensor(law_of(head.weight[:, 0].tolist(), 1.0)))


# Errors.


def small_call(backend) -> dict[str, Any]:
    return normal_head(backend, 3, 40, torch.float32, 6).call()


@each_malformed_tensor("lm_head_choose")
def test_malformed_tensor(backend, changes, message):
    assert_raises(backend, "lm_head_choose", small_call(backend), changes, message)


@each_wrong_call(
    {
        "float64": ({"hidden_states": Tensor.double}, "hidden_states must be Float or BFloat16, got Double"),
        "mixed": ({"hidden_states": Tensor.bfloat16}, "packed_weight must be BFloat16, got Float"),
        "H": ({"hidden_states": torch.zeros(3, 7)}, "pairs of packed_weight must be 4, got 3"),
        "V": ({"vocab_size": 65}, "panels of packed_weight must be 3, got 2"),
        "V0": ({"vocab_size": 0, "packed_weight": torch.zeros(0, 3, 64)}, "vocab_size must be positive, got 0"),
        "V-1": ({"vocab_size": -1, "packed_weight": torch.zeros(0, 3, 64)}, "vocab_size must be positive, got -1"),
    }
    | {
        name: ({name: lambda t: t[:2]}, rf"{name} must be \[T=3\], got \[2\]")
        for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "samples", "positions")
    }
    | {
        "seeds-int32": ({"seeds": Tensor.int}, "seeds must be Long, got Int"),
        "top-k-int64": ({"top_k": Tensor.long}, "top_k must be Int, got Long"),
        "temperature-bfloat16": ({"temperature": Tensor.bfloat16}, "temperature must be Float, got BFloat16"),
    }
)
def test_error_messages(backend, changes, message):
    assert_raises(backend, "lm_head_choose", small_call(backend), changes, message)


@each_value_without_a_law
def test_values_without_a_law(cpu, name, value):
    changes = {name: torch.tensor([OFF[name], value, OFF[name]], dtype=DTYPES.get(name, torch.float32))}
    assert_raises(cpu, "lm_head_choose", small_call(cpu), changes, f"{name} must be .*, got .* at 1")


@each_value_without_a_law
def test_gpu_gives_no_token_by_a_value_without_a_law(gpu, name, value):
    head = normal_head(gpu, 6, 40, torch.bfloat16)
    call = head.call(temperature=torch.tensor([0, 0, 1, 1, 0.5, 0.5]), top_k=5, top_p=0.5)
    clean = gpu.op("lm_head_choose")(**call)
    call[name][::2] = value
    tokens, logprobs = gpu.op("lm_head_choose")(**call)
    assert (tokens[::2] == -1).all()
    assert logprobs[::2].isnan().all()
    for ours, expected in zip((tokens, logprobs), clean, strict=True):
        assert same_bits(ours[1::2], expected[1::2])


# Registration.


@dtypes
def test_opcheck(cpu, dtype):
    opcheck("lm_head_choose", normal_head(cpu, 6, 40, dtype, 7, **random_laws(6)).call())


def test_compiles_once_for_all_lengths(cpu):
    call = normal_head(cpu, 50, 40, torch.float32, 7, **random_laws(50)).call()
    per_row = [name for name, x in call.items() if isinstance(x, Tensor) and name != "packed_weight"]
    assert_compiles_once("lm_head_choose", call | {name: call[name][:33] for name in per_row}, call)
