"""Logits processors against plain definitions and transformers' own, and under drafts that hold or do not."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blockdraft import RequestError
from blockdraft.processors import Processors, TokenCounts

V = 40
END = (3, 7)  # end_token_ids of the tests
BAD_WORDS = ((5,), (1, 2), (2, 2, 2), (1, 2, 3, 4), (1, 9))


def not_the_sum(tokens: list[int]) -> list[int]:
    """An allowed_tokens whose answer depends on the whole text."""
    return [t for t in range(V) if (sum(tokens) + t) % 5 != 0]


def as_mask(tokens: list[int]) -> Tensor:
    return torch.isin(torch.arange(V), torch.tensor(not_the_sum(tokens)))


CASES = {
    "none": Processors(),
    "repetition": Processors(repetition_penalty=1.3),
    "repetition-below-1": Processors(repetition_penalty=0.7),
    "frequency": Processors(frequency_penalty=0.4),
    "frequency-negative": Processors(frequency_penalty=-0.4),
    "presence": Processors(presence_penalty=0.6),
    "bias": Processors(logit_bias={0: 2.5, 7: -100, 9: -math.inf, V - 1: 3}),
    "bad-words": Processors(bad_words=BAD_WORDS),
    "min-tokens": Processors(min_tokens=6),
    "allowed": Processors(allowed_tokens=not_the_sum),
    "allowed-mask": Processors(allowed_tokens=as_mask),
    "all": Processors(1.3, 0.4, 0.6, {0: 2.5, 7: -100, 9: -math.inf}, BAD_WORDS, 6, not_the_sum),
}
cases = pytest.mark.parametrize("processors", CASES.values(), ids=CASES)


def literal(p: Processors, logits: Tensor, context: list[int], prompt_length: int) -> Tensor:
    """The definition, a token at a time; float32 all the way, so that bits can be compared."""
    row, output = logits.clone(), context[prompt_length:]
    for token in range(V):
        z = row[token]
        if p.allowed_tokens and token not in not_the_sum(context):
            z = z - math.inf
        for *first, last in p.bad_words:
            if token == last and context[len(context) - len(first) :] == first:
                z = z - math.inf
        if token in END and len(output) < p.min_tokens:
            z = z - math.inf
        z = z + (p.logit_bias or {}).get(token, 0.0)
        if token in context:
            z = z / p.repetition_penalty if z > 0 else z * p.repetition_penalty
        z = z - p.frequency_penalty * torch.tensor(float(output.count(token)))
        row[token] = z - p.presence_penalty * torch.tensor(float(token in output))
    return row


def texts(count: int, alphabet: int = 12) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(alphabet) for _ in range(rng.randint(1, 25))] for _ in range(count)]


@cases
def test_definition(processors):
    rng = random.Random(1)
    for context in texts(12):
        prompt_length, logits = rng.randint(0, len(context)), 3 * torch.randn(V)
        expected = literal(processors, logits, context, prompt_length)
        ours = processors.apply(logits, context, prompt_length, END)
        assert ours.data_ptr() == logits.data_ptr()
        assert torch.equal(ours, expected)


def test_bad_words_at_the_start_of_a_text():
    """Texts shorter than the words, as long, and a little longer, as text and as drafts."""
    processors = CASES["bad-words"]
    for length in range(5):
        for context in itertools.product((1, 2, 3), repeat=length):
            expected = literal(processors, torch.zeros(V), list(context), 0)
            assert torch.equal(processors.apply(torch.zeros(V), context, 0), expected), context
            logits = torch.zeros(length + 1, V)
            rows = processors.apply_block(logits, TokenCounts(), context)
            assert rows <= length or torch.equal(logits[length], expected), context


@cases
def test_zeros_and_infinities(processors):
    """Logits of zero, of both signs, and -inf that was there before give no NaN, and -inf stays."""
    logits = torch.tensor([0.0, -0.0, -math.inf, 1e30, -1e30] * (V // 5))
    ours = processors.apply(logits.clone(), [2, 2, 3, 4, 0, 1], 2, END)
    assert not ours.isnan().any()
    assert (ours[logits == -math.inf] == -math.inf).all()


def theirs(name: str, *args: object) -> object:
    return getattr(pytest.importorskip("transformers").generation.logits_process, name)(*args)


@pytest.mark.parametrize(
    ("processors", "name", "arguments"),
    [
        (Processors(repetition_penalty=1.3), "RepetitionPenaltyLogitsProcessor", (1.3,)),
        (Processors(repetition_penalty=0.8), "RepetitionPenaltyLogitsProcessor", (0.8,)),
        (Processors(min_tokens=12), "MinNewTokensLengthLogitsProcessor", (4, 12, list(END))),
        (Processors(bad_words=BAD_WORDS), "NoBadWordsLogitsProcessor", ([list(word) for word in BAD_WORDS],)),
        (Processors(allowed_tokens=not_the_sum), "PrefixConstrainedLogitsProcessor", None),
    ],
    ids=["repetition", "repetition-below-1", "min-tokens", "bad-words", "allowed"],
)
def test_transformers(processors, name, arguments):
    arguments = arguments or (lambda _, tokens: not_the_sum(tokens.tolist()), 1)
    other, changed = theirs(name, *arguments), 0
    for context in texts(30, alphabet=4):
        context, logits = [0, 1, 2, 1, *context], 3 * torch.randn(V)
        expected = other(torch.tensor([context]), logits[None].clone())[0]
        changed += not torch.equal(expected, logits)
        assert torch.equal(processors.apply(logits, context, 4, END), expected)
    assert changed > 5


@cases
def test_rows_of_a_block(processors):
    """Row i is the row that plain decoding would see after the drafts before it: the same bits."""
    rng, done = random.Random(2), 0
    for context in texts(12):
        prompt_length = rng.randint(0, len(context))
        drafts = [rng.randrange(12, V) if rng.random() < 0.6 else rng.randrange(12) for _ in range(rng.randint(0, 15))]
        logits = 3 * torch.randn(len(drafts) + 1, V)
        counts = TokenCounts(context[:prompt_length])
        counts.extend(context[prompt_length:])
        ours = logits.clone()
        rows = processors.apply_block(ours, counts, drafts, END)
        for i in range(rows):
            expected = processors.apply(logits[i].clone(), context + drafts[:i], prompt_length, END)
            assert torch.equal(ours[i], expected), f"row {i} of {rows}"
        assert rows == len(drafts) + 1 or ours[rows - 1, drafts[rows - 1]] == -math.inf or drafts[rows - 1] in END
        assert torch.equal(ours[rows:], logits[rows:]), "a row that was not done has changed"
        done += rows
    assert done > 24  # the drafts are not all forbidden at once


def test_counts_follow_the_text():
    """Token by token, with blocks in between that count drafts and forget them."""
    rng, processors = random.Random(3), CASES["all"]
    prompt, output = [1, 2, 1, 5], []
    counts = TokenCounts(prompt)
    for _ in range(40):
        drafts = [rng.randrange(10) for _ in range(rng.randint(0, 6))]
        processors.apply_block(torch.randn(len(drafts) + 1, V), counts, drafts, END)
        committed = [rng.randrange(12) for _ in range(rng.randint(0, 3))]
        counts.extend(committed)
        output += committed
        assert counts.tokens == prompt + output
        assert counts.output_length == len(output)
        ids, outputs, seen = counts.before_rows(())
        assert sorted(ids.tolist()) == sorted({*prompt, *output})
        assert outputs[0].tolist() == [output.count(token) for token in ids.tolist()]
        assert seen.all()


def test_counts_before_each_row():
    counts = TokenCounts([8, 9])
    counts.append(9)
    ids, outputs, seen = counts.before_rows([9, 4, 4])
    assert ids.tolist() == [8, 9, 4]
    assert outputs.tolist() == [[0, 1, 0], [0, 2, 0], [0, 2, 1], [0, 2, 2]]
    assert seen.tolist() == [[True, True, False]] * 2 + [[True, True, True]] * 2


# Decoding with a made-up model: the logits are a function of the text.


def model(context: list[int]) -> Tensor:
    return 2 * torch.randn(V, generator=torch.Generator().manual_seed(hash(tuple(context)) % 2**31))


def plain(processors: Processors, prompt: list[int], length: int) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + length and not (len(text) > len(prompt) and text[-1] in END):
        text.append(int(processors.apply(model(text), text, len(prompt), END).argmax()))
    return text


def by_blocks(
    processors: Processors, prompt: list[int], length: int, guesses: list[int], rng: random.Random
) -> list[int]:
    """Drafts are guesses, some of them spoiled; what comes out is verified as the engine does."""
    counts = TokenCounts(prompt)
    while counts.output_length < length and not (counts.output_length and counts.tokens[-1] in END):
        start, room = len(counts.tokens), length - counts.output_length
        drafts = [t if rng.random() < 0.8 else rng.randrange(V) for t in guesses[start : start + min(7, room - 1)]]
        logits = torch.stack([model(counts.tokens + drafts[:i]) for i in range(len(drafts) + 1)])
        rows = processors.apply_block(logits, counts, drafts, END)
        chosen = logits.argmax(-1).tolist()
        accepted = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
        for token in chosen[: min(accepted + 1, rows)]:
            counts.append(token)
            if token in END:
                break
    return counts.tokens


@cases
def test_tokens_do_not_depend_on_drafts(processors):
    rng = random.Random(4)
    for prompt in texts(6):
        expected = plain(processors, prompt, 30)
        assert by_blocks(processors, prompt, 30, expected, rng) == expected


def balanced(tokens: list[int]) -> bool:
    """Whether it is the start of a balanced text of 1 and 2."""
    depths = [tokens[:i].count(1) - tokens[:i].count(2) for i in range(len(tokens) + 1)]
    return set(tokens) <= {1, 2} and min(depths) >= 0


@pytest.mark.parametrize("seed", range(8))
def test_structured_output_is_asked_for_possible_texts_only(seed):
    """Wrong drafts never reach allowed_tokens: not what it forbade, and nothing after the end."""
    calls, rng, prompt = [], random.Random(seed), [1] * (seed + 1)

    def allowed(tokens: list[int]) -> list[int]:
        calls.append(list(tokens))
        may_end = tokens.count(1) == tokens.count(2)
        tokens.clear()  # its own list
        return [1, 3] if may_end else [1, 2]

    processors = Processors(allowed_tokens=allowed)
    expected = plain(processors, prompt, 40)
    guesses = expected + [rng.randrange(4) for _ in range(8)]
    assert by_blocks(processors, prompt, 40, guesses, rng) == expected
    counts, logits = TokenCounts([1]), torch.zeros(4, V)
    assert processors.apply_block(logits, counts, [2, 3, 1], (3,)) == 2  # 3 ends the text
    assert processors.apply_block(logits, counts, [3, 1, 1], ()) == 1  # 3 is forbidden here
    assert processors.apply_block(logits, counts, [2, 1, 2], ()) == 4
    assert counts.tokens == [1]
    assert all(map(balanced, calls))


def fails_after(tokens: list[int], *, at: int, error: Exception | None) -> list[int]:
    if len(tokens) < at:
        return [4, 5]
    if error:
        raise error
    return []


@pytest.mark.parametrize("error", [None, KeyError("state")], ids=["nothing-allowed", "raises"])
def test_failure_counts_only_where_plain_decoding_comes(error):
    processors = Processors(allowed_tokens=lambda tokens: fails_after(tokens, at=3, error=error), presence_penalty=1)
    counts, logits = TokenCounts([1]), torch.zeros(4, V)
    assert processors.apply_block(logits, counts, [4, 5, 4], END) == 2
    assert logits.isneginf().sum(-1).tolist() == [V - 2, V - 2, 0, 0]
    assert logits[:, 4].tolist() == [0, -1, 0, 0]
    counts.extend([4, 5])
    with pytest.raises(KeyError if error else RequestError):
        processors.apply_block(logits, counts, [4, 5, 4], END)


def test_end_after_min_tokens_comes_in_the_middle_of_a_block():
    logits, counts = torch.zeros(4, V), TokenCounts([1, 1, 1])
    counts.append(1)
    Processors(min_tokens=3).apply_block(logits, counts, [1, 1, 1], [3, V + 5])  # a stop id beyond the vocabulary
    assert logits[:, 3].tolist() == [-math.inf, -math.inf, 0, 0]
    assert logits[:, :3].eq(0).all()


def test_order():
    """Bias, then the repetition penalty, which looks at the sign, then what is subtracted; -inf stays."""
    processors = Processors(2.0, 0.5, 0.25, {4: 3.0, 5: 3.0}, [(5,)])
    row = processors.apply(torch.tensor([-1.0] * 10), [4, 4, 4, 5], 1)
    assert row[4] == (-1 + 3) / 2 - 2 * 0.5 - 0.25
    assert row[5] == -math.inf


def test_active():
    assert [name for name, processors in CASES.items() if not processors.active] == ["none"]
    assert not Processors(logit_bias={}).active
    assert not replace(CASES["min-tokens"], min_tokens=0).active


def test_values_cannot_change_under_a_request():
    bias, words = {1: 2.0}, [[1, 2]]
    processors = Processors(logit_bias=bias, bad_words=words)
    bias[1] = math.nan
    words[0].append(-1)
    assert processors == Processors(logit_bias={1: 2.0}, bad_words=((1, 2),))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repetition_penalty": 0}, r"repetition_penalty must be a number in \[0.001, 1000.0\], got 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must be a number"),
        ({"repetition_penalty": "1"}, "repetition_penalty must be a number .* got '1'"),
        ({"frequency_penalty": 2.1}, r"frequency_penalty must be a number in \[-2, 2\], got 2.1"),
        ({"frequency_penalty": True}, "frequency_penalty must be a number"),
        ({"presence_penalty": -math.inf}, "presence_penalty must be a number"),
        ({"presence_penalty": None}, "presence_penalty must be a number"),
        ({"min_tokens": -1}, r"min_tokens must be an integer in \[0, .*\], got -1"),
        ({"min_tokens": 1.0}, "min_tokens must be an integer"),
        ({"logit_bias": [1]}, r"logit_bias must map token ids .*, got \[1\]"),
        ({"logit_bias": {1: math.nan}}, "logit_bias must map .* got 1: nan"),
        ({"logit_bias": {1: math.inf}}, "logit_bias must map .* got 1: inf"),
        ({"logit_bias": {1: -1e10}}, r"numbers in \[-1e9, 1e9\] or -inf, got 1: -10000000000.0"),
        ({"logit_bias": {"1": 2}}, "logit_bias must map .* got '1': 2"),
        ({"logit_bias": {-1: 2}}, "logit_bias must map .* got -1: 2"),
        ({"logit_bias": {2**31: 2}}, "logit_bias must map"),
        ({"bad_words": 5}, "bad_words must be non-empty sequences of token ids, got 5"),
        ({"bad_words": [()]}, r"bad_words must be .*, got \(\)"),
        ({"bad_words": (1, 2)}, "bad_words must be .*, got 1"),
        ({"bad_words": ["no"]}, "bad_words must be .*, got 'no'"),
        ({"bad_words": [[1, -1]]}, r"bad_words must be .*, got \[1, -1\]"),
        ({"allowed_tokens": [1]}, r"allowed_tokens must be callable, got \[1\]"),
    ],
)
def test_values_that_are_refused(values, message):
    with pytest.raises(RequestError, match=message):
        Processors(**values)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "allowed_tokens must allow a token, got none after 2 tokens"),
        (torch.zeros(V, dtype=torch.bool), "allowed_tokens must allow a token, got none"),
        ([3, V], rf"allowed_tokens must return token ids in \[0, {V - 1}\] .*, got {V}"),
        ([-1, 3], "allowed_tokens must return token ids .*, got -1"),
        (torch.tensor([3, V + 2]), f"allowed_tokens must return .*, got {V + 2}"),
        (torch.ones(V - 1, dtype=torch.bool), rf"a bool tensor \[V={V}\], got torch.bool \[{V - 1}\]"),
        (torch.ones(1, V, dtype=torch.bool), rf"got torch.bool \[1, {V}\]"),
        ([0.5], r"allowed_tokens must return .*, got torch.float32 \[1\]"),
        (["a"], r"allowed_tokens must return .*, got \['a'\]"),
        (None, "allowed_tokens must return .*, got None"),
        ([2**70], "allowed_tokens must return"),
    ],
)
def test_answers_that_are_refused(answer, message):
    with pytest.raises(RequestError, match=message):
        Processors(allowed_tokens=lambda _: answer).apply(torch.zeros(V), [1, 2], 1, END)


@pytest.mark.parametrize("answer", [{4, 9}, (4, 9), iter([4, 9, 9]), torch.tensor([9, 4]), {4: 0, 9: 0}])
def test_answers_that_are_taken(answer):
    row = Processors(allowed_tokens=lambda _: answer).apply(torch.zeros(V), [1, 2], 1, END)
    assert row.isfinite().nonzero().flatten().tolist() == [4, 9]


def test_a_mask_stays_its_owners():
    mask = torch.ones(V, dtype=torch.bool)
    row = Processors(allowed_tokens=lambda _: mask, bad_words=[(2,)]).apply(torch.zeros(V), [1], 1)
    assert row[2] == -math.inf
    assert mask.all()


@pytest.mark.parametrize(
    "values",
    [
        {"allowed_tokens": lambda _: END, "min_tokens": 2},
        {"allowed_tokens": lambda _: [5], "bad_words": [(5,)]},
        {"allowed_tokens": lambda _: [9], "logit_bias": {9: -math.inf}},
        {"bad_words": [(t,) for t in range(V)]},
    ],
)
def test_no_token_left(values):
    with pytest.raises(RequestError, match="must leave a token that may come, got none after 2 tokens"):
        Processors(**values).apply(torch.zeros(V), [1, 2], 1, END)


@pytest.mark.parametrize("values", [{"logit_bias": {V: 1}}, {"bad_words": [(1,), (V, 2)]}])
def test_tokens_beyond_the_vocabulary(values):
    name = next(iter(values))
    Processors(**values).check(V + 1)
    for call in (lambda p: p.check(V), lambda p: p.apply(torch.zeros(V), [1], 1)):
        with pytest.raises(RequestError, match=rf"{name} must have token ids in \[0, {V - 1}\], got {V}"):
            call(Processors(**values))


@pytest.mark.parametrize("logits", [torch.zeros(2, V), torch.zeros(3, V).bfloat16(), torch.zeros(V)])
def test_logits_that_are_refused(logits):
    with pytest.raises(RequestError, match=r"logits must be float32 \[n=3, V\], got torch\."):
        CASES["presence"].apply_block(logits, TokenCounts([1]), [1, 2])
