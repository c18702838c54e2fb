"""Requests as users make them: what is refused and how, where text ends, what a stream shows."""

from dataclasses import replace

import pytest
import torch

from blockdraft import (
    ConfigError,
    RequestError,
    SamplingParams,
    ZayaForCausalLM,
    bundled_model,
)
from blockdraft.text import TextStream
from checkpoints import random_model, save, tiny_config


@pytest.fixture(scope="module")
def model():
    return ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens must be an integer in \[1, .*\], got 0"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"temperature": -0.1}, "temperature must be a number"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_k": 0}, "top_k must be an integer"),
        ({"top_p": 0.0}, "top_p must be greater than 0"),
        ({"top_p": 1.1}, "top_p must be a number"),
        ({"min_p": 2}, "min_p must be a number"),
        ({"seed": -1}, "seed must be an integer"),
        ({"n": 0}, "n must be an integer"),
        ({"mix": 0.5}, "mix must be 0 unless sampler='mixed'.*got 0.5"),
        ({"sampler": "mixed", "mix": 1.5}, r"mix must be a number in \[0, 1\], got 1.5"),
        ({"mix_source": "old"}, "mix_source must be 'draft' or 'fresh', got 'old'"),
        ({"mix_max_kl": -1}, "mix_max_kl must be a number"),
        ({"mix_max_entropy": "a"}, "mix_max_entropy must be a number"),
        ({"lenience": 2.0, "verification": "rejection"}, "lenience must be 1 unless sampler='mixed'"),
        ({"lenience": 2.0, "sampler": "mixed"}, "lenience must be 1 unless .*verification='rejection'"),
        ({"lenience": 0.5}, "lenience must be a number in"),
        ({"groups": -1}, "groups must be an integer in"),
        ({"groups": (1, 40)}, "groups must be an integer in"),
        ({"groups": (1, 1)}, "groups must name each accept length once"),
        ({"denoising_steps": 0}, "denoising_steps must be an integer in"),
        ({"reveal": "all"}, "reveal must be 'confidence'"),
        ({"reveal_threshold": -0.5}, "reveal_threshold must be a number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number"),
        ({"frequency_penalty": 3.0}, "frequency_penalty must be a number"),
        ({"presence_penalty": -3.0}, "presence_penalty must be a number"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias must map"),
        ({"bad_words": [[]]}, "bad_words must be non-empty"),
        ({"min_tokens": -1}, "min_tokens must be an integer"),
        ({"allowed_tokens": 5}, "allowed_tokens must be callable"),
        ({"block_length": 1}, "block_length must be an integer"),
        ({"block_length": 33}, "block_length must be an integer"),
        ({"logprobs": 65}, "logprobs must be an integer in"),
        ({"sampler": "beam"}, "sampler must be 'lossless' or 'ar' or 'mixed' or 'denoise', got 'beam'"),
        ({"verification": "typical"}, "verification must be 'gumbel' or 'rejection' or 'match', got 'typical'"),
        ({"drafter": "eagle"}, "drafter must be 'auto' or 'mask' or 'ngram' or 'none', got 'eagle'"),
        ({"stop": ("",)}, "stop must be non-empty"),
        ({"stop": (1.5,)}, "stop must be non-empty"),
    ],
    ids=lambda value: next(iter(value.items())).__str__() if isinstance(value, dict) else "",
)
def test_parameters_refused(values, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([5, 272], r"token ids must be integers in \[0, 271\], got 272"),
        ([5, -1], "got -1"),
        ([5, 1.0], "got 1.0"),
        ([5] * 2048, "must leave room for a token"),
        ([5] * 3000, "must fit the context of 2048 tokens, got 3000"),
    ],
    ids=["empty", "too-large", "negative", "float", "full-context", "too-long"],
)
def test_prompts_refused(model, prompt, message):
    with pytest.raises(RequestError, match=message):
        model.generate([prompt])


def test_one_bad_prompt_refuses_the_call_before_any_work(model):
    with pytest.raises(RequestError):
        model.stream(["fine", [999]])


def test_number_of_params(model):
    with pytest.raises(RequestError, match="one or one per prompt"):
        model.generate(["a", "b"], [SamplingParams()])


def test_mask_drafting_needs_a_mask_token(tmp_path):
    folder = save(random_model(tiny_config(mask_token_id=None)), tmp_path)
    model = ZayaForCausalLM.from_pretrained(folder, progress=False)
    with pytest.raises(ConfigError, match="mask_token_id.*tidar_mask_token_id"):
        model.generate([[5, 6]], SamplingParams(max_tokens=4, drafter="mask"))
    with pytest.raises(ConfigError, match="mask_token_id"):
        model.generate([[5, 6]], SamplingParams(max_tokens=4, sampler="mixed", mix=0.5))
    assert len(model.generate([[5, 6]], SamplingParams(max_tokens=4, sampler="ar"))[0].token_ids) == 4
    with_id = ZayaForCausalLM.from_pretrained(folder, mask_token_id=4, progress=False)
    assert with_id.generate([[5, 6]], SamplingParams(max_tokens=4, drafter="mask"))[0].stats.drafted > 0


@pytest.mark.parametrize("groups", [None, 0, 3], ids=str)
def test_without_a_mask_token_auto_drafts_by_ngrams(tmp_path, groups):
    folder = save(random_model(tiny_config(mask_token_id=None)), tmp_path)
    model = ZayaForCausalLM.from_pretrained(folder, progress=False)
    params = SamplingParams(
        max_tokens=40, ignore_eos=True, groups=groups
    )  # greedy random models soon repeat themselves
    outputs = model.generate([[5, 6, 7] * 4, [8, 9]], params)
    plain = model.generate([[5, 6, 7] * 4, [8, 9]], replace(params, sampler="ar"))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert sum(o.stats.accepted for o in outputs) > 0
    assert {source for o in outputs for source in o.stats.verified_by} == {"ngram"}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"groups": 3}, "groups must be 0 with draft_layout 'anchor_in_block', got 3"),
        ({"sampler": "denoise"}, "sampler='denoise' needs a mask row for the next position"),
        ({"sampler": "mixed", "mix": 0.5, "mix_source": "fresh"}, "mix_source='fresh' needs a mask row"),
    ],
    ids=["groups", "denoise", "fresh"],
)
def test_what_a_layout_cannot_do(tmp_path, params, message):
    folder = save(random_model(tiny_config(draft_layout="anchor_in_block")), tmp_path)
    model = ZayaForCausalLM.from_pretrained(folder, progress=False)
    with pytest.raises(RequestError, match=message):
        model.generate([[5, 6]], SamplingParams(**params))


def test_processors_with_ids_out_of_range(model):
    for params in ({"logit_bias": {272: 1.0}}, {"bad_words": [[272]]}):
        with pytest.raises(RequestError, match=r"token ids in \[0, 271\], got 272"):
            model.generate(["x"], SamplingParams(**params))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16}, "dtype must be"),
        ({"skip_expert": "drop"}, "skip_expert must be"),
        ({"kv_cache_tokens": 0}, "kv_cache_tokens must be"),
        ({"max_batch_size": -1}, "max_batch_size must be"),
        ({"mask_token_id": 96}, "mask_token_id"),
        ({"device": "meta"}, "device meta: this build has no kernels"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_of_from_pretrained(tiny_folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        ZayaForCausalLM.from_pretrained(tiny_folder, progress=False, **arguments)


def test_skip_identity_differs_and_equals_the_formula(tmp_path):
    """p * x for a skipped row: in float64 by the reference with the skip class as one more expert."""
    reference = random_model(tiny_config())
    folder = save(reference, tmp_path)
    ids = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    zero, identity = (
        ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32, skip_expert=s, progress=False).logits(ids)
        for s in ("zero", "identity")
    )
    for layer in reference.model.layers:
        layer.mlp.experts.forward = _with_identity(layer.mlp.experts)
    with torch.no_grad():
        expected = reference(ids)
    assert (zero - identity).abs().max() > 0.01
    assert (identity - expected).abs().max() <= 5e-6 * expected.abs().max()


def _with_identity(experts):
    plain, skip = type(experts).forward, experts.gate_up_proj.shape[0]

    def forward(x, chosen, weight):
        return plain(experts, x, chosen, weight) + torch.where(chosen == skip, weight, 0.0)[:, None] * x

    return forward


def test_stop_string_inside_a_block(model):
    text = model.generate(["def "], SamplingParams(max_tokens=80))[0].text
    stop = text[20:24]
    for sampler in ("ar", "lossless"):
        output = model.generate(["def "], SamplingParams(max_tokens=80, stop=stop, sampler=sampler))[0]
        assert output.finish_reason == "stop"
        assert output.text == text[: text.index(stop)]


def test_stop_token_and_eos(model):
    tokens = model.generate(["def "], SamplingParams(max_tokens=40))[0].token_ids
    output = model.generate(["def "], SamplingParams(max_tokens=40, stop=(tokens[12],)))[0]
    assert (output.finish_reason, output.token_ids) == ("stop", tokens[: tokens.index(tokens[12]) + 1])
    changed = ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)
    changed.config = changed.config.__class__(**vars(changed.config) | {"eos_token_ids": (tokens[12],)})
    output = changed.generate(["def "], SamplingParams(max_tokens=40))[0]
    assert (output.finish_reason, output.token_ids) == ("eos", tokens[: tokens.index(tokens[12]) + 1])
    assert len(changed.generate(["def "], SamplingParams(max_tokens=40, ignore_eos=True))[0].token_ids) == 40


def test_context_ends_generation(model):
    small = ZayaForCausalLM(model.config, model.decoder, model.tokenizer, model.dtype, model.device, kv_cache_tokens=40)
    for sampler in ("ar", "lossless"):
        output = small.generate([[5] * 30], SamplingParams(max_tokens=100, sampler=sampler, ignore_eos=True))[0]
        assert (output.finish_reason, len(output.token_ids)) == ("context", 10)


def test_streams_add_up(model):
    prompts = ["import ", "class A:\n    def ", "é — "]
    params = SamplingParams(max_tokens=50, seed=1, temperature=0.8, ignore_eos=True)
    outputs = model.generate(prompts, params)
    texts, tokens = ["", "", ""], [[], [], []]
    for event in model.stream(prompts, params):
        texts[event.request] += event.text
        tokens[event.request] += event.token_ids
        assert event.accepted <= len(event.drafted)
        assert (event.drafter in ("mask", "ngram")) == (event.kind == "verify") == bool(event.drafted)
        assert event.drafter == "mask" or event.draft_logprobs == ()
        assert event.kind != "verify" or list(event.drafted[: event.accepted]) == list(
            event.token_ids[: event.accepted]
        )
    assert texts == [o.text for o in outputs]
    assert tokens == [o.token_ids for o in outputs]


@pytest.mark.parametrize("stops", [(), ("\n\n",)])
def test_text_is_the_same_where_nobody_reads_it_on_the_way(model, stops):
    """It is decoded in larger pieces then; characters of several tokens may lie across their ends, and the text's."""
    tokens = model.encode("x = 1 # é — 日本語 🎉🎉🎉\n" * 5 + "\n" + "🎉日" * 20)
    for start in range(20):
        for end in range(len(tokens) - 8, len(tokens)):
            watched, unwatched = (TextStream(model.tokenizer, stops, x) for x in (True, False))
            pieces = [watched.append(token) for token in tokens[start:end]] + [watched.flush()]
            later = [unwatched.append(token) for token in tokens[start:end]] + [unwatched.flush()]
            assert "".join(later) == unwatched.text == watched.text == "".join(pieces)
            assert len([x for x in later if x]) < len([x for x in pieces if x]) / 4 or stops


def test_statistics(model):
    stats = model.generate(["def main("], SamplingParams(max_tokens=60, ignore_eos=True))[0].stats
    assert stats.committed == stats.tokens - 1 == 59  # the first token is decided by the prefill
    assert sum(stats.acceptance_histogram) == sum(stats.verified_by.values()) == stats.verify_forwards
    assert sum(stats.accepted_by.values()) == stats.accepted
    assert sum(i * n for i, n in enumerate(stats.acceptance_histogram)) == stats.accepted
    assert stats.tokens_per_forward == 59 / (stats.draft_forwards + stats.verify_forwards + stats.ar_forwards)
    plain = model.generate(["def main("], SamplingParams(max_tokens=60, ignore_eos=True, sampler="ar"))[0].stats
    assert (plain.ar_forwards, plain.tokens_per_forward, plain.drafted) == (59, 1.0, 0)


def test_drawn_seed_is_reported_and_repeats(model):
    first, second = (model.generate(["x = "], SamplingParams(max_tokens=20, temperature=1.0))[0] for _ in range(2))
    assert first.seed != second.seed
    again = model.generate(["x = "], SamplingParams(max_tokens=20, temperature=1.0, seed=first.seed))[0]
    assert again.token_ids == first.token_ids


def test_drafter_out_of_range(model):
    with pytest.raises(RequestError, match="drafter must return token ids"):
        model.generate(["x"], SamplingParams(max_tokens=20, drafter=lambda tokens, count: [10_000], groups=0))


def test_logits_refusals(model):
    with pytest.raises(RequestError, match=r"input_ids must be integers \[B, T\]"):
        model.logits(torch.randn(2, 3))
    with pytest.raises(RequestError, match="attention_mask must be"):
        model.logits(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4))
    with pytest.raises(RequestError, match="got 272"):
        model.logits(torch.tensor([[5, 272]]))
