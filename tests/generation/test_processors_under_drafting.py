"""Every logits processor gives the same tokens under drafting as under plain decoding."""

from dataclasses import replace

import pytest
import torch

from blockdraft import RequestError, SamplingParams, ZayaForCausalLM, bundled_model
from bundled_prompts import held_out_prompts

PROCESSORS = {
    "repetition": {"repetition_penalty": 1.3},
    "repetition-below-1": {"repetition_penalty": 0.8},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 1.1},
    "bias": {"logit_bias": {40: 4.0, 50: -3.0, 60: float("-inf")}},
    "bad-words": {"bad_words": ["self", [40, 41], "):"]},
    "min-tokens": {"min_tokens": 30, "stop": (15, 40, 66)},
    "allowed": {"allowed_tokens": lambda tokens: range(20 + tokens[-1] % 7, 200)},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "all": {
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "logit_bias": {44: 2.0},
        "bad_words": ["import"],
        "min_tokens": 20,
        "top_p": 0.95,
    },
}
WAYS = {
    "mask": {"groups": 0},
    "mask-groups": {"groups": 3},
    "planner": {},
    "mask-planner": {"drafter": "mask"},
    "ngram": {"drafter": "ngram", "groups": 0},
    "match": {"verification": "match", "groups": 0},
    "logprobs": {"logprobs": 3, "groups": 0},
}


@pytest.fixture(scope="module")
def model():
    return ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)


@pytest.fixture(scope="module")
def prompts():
    return [p[: 40 + 20 * i] for i, p in enumerate(held_out_prompts(4))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_tokens_are_those_of_plain_decoding(model, prompts, processor, way):
    params = SamplingParams(max_tokens=48, temperature=0.8, seed=9, **PROCESSORS[processor])
    laws = [replace(params, temperature=t) for t in (0.0, 0.8, 0.8, 0.0)]
    plain = model.generate(prompts, [replace(p, sampler="ar") for p in laws])
    drafted = model.generate(prompts, [replace(p, **WAYS[way]) for p in laws])
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    assert [o.finish_reason for o in drafted] == [o.finish_reason for o in plain]
    assert "planner" in way or sum(o.stats.drafted for o in drafted) > 0


@pytest.mark.parametrize("processor", ["repetition", "frequency", "presence", "bias", "bad-words", "allowed"])
def test_processors_change_the_text(model, prompts, processor):
    """Otherwise the test above would compare nothing."""
    params = SamplingParams(max_tokens=48, temperature=0.8, seed=9)
    free = model.generate(prompts, params)
    bound = model.generate(prompts, replace(params, **PROCESSORS[processor]))
    assert [o.token_ids for o in free] != [o.token_ids for o in bound]


def test_bad_words_do_not_appear(model, prompts):
    params = SamplingParams(max_tokens=96, ignore_eos=True)
    text = "".join(o.text for o in model.generate(prompts, params))
    words = [word for word in ("the", "test", "self", "return", "context") if word in text]
    assert words
    encode = lambda word: tuple(model.tokenizer.encode(word, add_special_tokens=False).ids)  # noqa: E731
    forbidden = [encode(s) for word in words for s in (word, " " + word)]
    for output in model.generate(prompts, replace(params, bad_words=words)):
        tokens = tuple(output.token_ids)
        assert not any(tokens[i : i + len(w)] == w for w in forbidden for i in range(len(tokens)))


def test_min_tokens(model, prompts):
    free = model.generate(prompts[0], SamplingParams(max_tokens=60))[0].token_ids
    stop = (free[5],)
    short = model.generate(prompts[0], SamplingParams(max_tokens=60, stop=stop))[0]
    long = model.generate(prompts[0], SamplingParams(max_tokens=60, stop=stop, min_tokens=25))[0]
    assert len(short.token_ids) <= 6
    assert len(long.token_ids) >= 25


@pytest.mark.parametrize("width", [2, 3, 5])
def test_stop_strings_across_blocks(model, prompts, width):
    """Every place of a short text as a stop string, so that some straddle the end of a block."""
    params = SamplingParams(max_tokens=40, ignore_eos=True, sampler="ar")
    text = model.generate(prompts[1], params)[0].text
    for start in range(1, len(text) - width, 3):
        stop = text[start : start + width]
        for groups in (0, 3):
            plain, drafted = (
                model.generate(prompts[1], replace(params, stop=stop, sampler=sampler, groups=groups))[0]
                for sampler in ("ar", "lossless")
            )
            assert (drafted.text, drafted.token_ids) == (plain.text, plain.token_ids)
            assert drafted.finish_reason == "stop"
            assert stop not in drafted.text


def test_n_samples_with_processors(model, prompts):
    params = SamplingParams(max_tokens=32, temperature=1.0, seed=2, n=4, repetition_penalty=1.2, presence_penalty=0.5)
    plain = model.generate(prompts[:2], replace(params, sampler="ar"))
    drafted = model.generate(prompts[:2], replace(params, groups=3))
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    assert len({tuple(o.token_ids) for o in drafted}) == 8


def test_failing_callback(model, prompts):
    def nothing(tokens):
        return []

    with pytest.raises(RequestError, match="allowed_tokens must allow a token"):
        model.generate(prompts[0], SamplingParams(max_tokens=5, allowed_tokens=nothing))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_log_probabilities(model, prompts, temperature):
    """Both laws against a teacher-forced pass, and the most probable tokens of each position."""
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=4, logprobs=4, groups=3, top_k=30)
    for output in model.generate(prompts, params):
        ids = output.prompt_token_ids + output.token_ids
        logits = model.logits(torch.tensor([ids]))[0, len(output.prompt_token_ids) - 1 : -1]
        law, chosen = logits.log_softmax(-1), torch.tensor(output.token_ids)[:, None]
        assert torch.allclose(torch.tensor(output.logprobs), law.gather(1, chosen)[:, 0], atol=2e-5, rtol=0)
        top = law.topk(4)
        assert [[t for t, _ in row] for row in output.top_logprobs] == top.indices.tolist()
        values = torch.tensor([[v for _, v in row] for row in output.top_logprobs])
        assert torch.allclose(values, top.values, atol=2e-5, rtol=0)
        if temperature == 0:
            assert output.drawn_logprobs == [0.0] * len(output.token_ids)
        else:
            kept = logits.masked_fill(logits < logits.topk(30).values[:, -1:], -torch.inf) / temperature
            drawn = kept.log_softmax(-1).gather(1, chosen)[:, 0]
            assert torch.allclose(torch.tensor(output.drawn_logprobs), drawn, atol=5e-5, rtol=0)


def test_a_forward_reads_the_head_once_for_all_logits(model, prompts, monkeypatch):
    """Four samples with processors cost one head call a forward for what they decide, not one each."""
    calls: list[int] = []
    target_logits = model.heads.target_logits
    monkeypatch.setattr(
        model.heads, "target_logits", lambda states: (calls.append(len(states)), target_logits(states))[1]
    )
    params = SamplingParams(max_tokens=12, presence_penalty=1.0, sampler="ar", ignore_eos=True)
    outputs = model.generate(prompts, params)
    forwards = max(o.stats.ar_forwards + o.stats.prefill_forwards for o in outputs)
    assert len(calls) == forwards == 12
    assert calls[1:] == [4] * 11
