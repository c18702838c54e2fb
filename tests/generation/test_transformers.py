"""Against transformers' own ZAYA, teacher-forced and generating."""

import pytest
import torch
from safetensors.torch import load_file

from blockdraft import SamplingParams, ZayaForCausalLM, bundled_model
from checkpoints import SKIP_LAYER, random_model, save, tiny_config
from generation.stepping import forward

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
CHUNKS = (6, 1, 3, 1, 1, 1, 1)
LEFT_PAD = 3
RELATIVE = 5e-6  # of the largest logit: float32 sums in another order


def load(folder, dtype=torch.float32):
    """transformers 5.23 sets the skip class's bias to -1 after loading: here it is what the checkpoint says."""
    model = transformers.ZayaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    stored = load_file(folder / "model.safetensors")
    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate.balancing_biases.copy_(stored[f"model.layers.{i}.mlp.gate.balancing_biases"])
    return model


@pytest.fixture(scope="module", params=[0, 3, 6], ids=lambda seed: f"seed{seed}")
def both(request, tmp_path_factory):
    folder = save(random_model(tiny_config(), request.param), tmp_path_factory.mktemp("hf"))
    theirs = load(folder)
    with torch.no_grad():
        expected = theirs(IDS, use_cache=False).logits
    return ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32, progress=False), theirs, expected


def assert_close(ours, expected):
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error <= RELATIVE, f"{error:.2e} of the largest logit"


def test_full_pass(both):
    ours, _, expected = both
    assert expected.std() > 1  # not a vacuous model
    assert_close(ours.logits(IDS), expected)


def test_chunks_and_single_tokens(both):
    ours, _, expected = both
    cache = ours.new_cache(128, 2)
    for ids, wanted in zip(IDS.tolist(), expected, strict=True):
        sequence, first, parts = cache.allocate(14), 0, []
        for size in CHUNKS:
            parts += forward(ours, cache, [(sequence, ids[first : first + size], 0)], [size])
            first += size
        assert_close(torch.cat(parts), wanted)


def test_left_padding(both):
    ours, theirs, expected = both
    padded = torch.cat([torch.zeros(2, LEFT_PAD, dtype=torch.long), IDS], 1)
    mask = torch.ones_like(padded)
    mask[:, :LEFT_PAD] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        wanted = theirs(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logits = ours.logits(padded, mask)
    assert_close(logits[:, LEFT_PAD:], wanted[:, LEFT_PAD:])
    assert torch.equal(logits[:, LEFT_PAD:], ours.logits(IDS))
    assert not logits[:, :LEFT_PAD].any()


def test_ragged_batch(both):
    """Sequences of different lengths in one forward, against each alone in transformers."""
    ours, theirs, _ = both
    cache = ours.new_cache(256, 5)
    prompts = [IDS[0, :n].tolist() for n in (1, 2, 14, 5, 9)]
    logits = forward(ours, cache, [(cache.allocate(14), prompt, 0) for prompt in prompts])
    for prompt, part in zip(prompts, logits, strict=True):
        with torch.no_grad():
            assert_close(part, theirs(torch.tensor([prompt]), use_cache=False).logits[0])


def test_skip_class_is_chosen(both):
    """Otherwise the comparison would not cover it."""
    _, theirs, _ = both
    gate = theirs.model.layers[SKIP_LAYER].mlp.gate
    seen = []
    hook = gate.register_forward_hook(lambda _m, _a, out: seen.append(out[0].float().softmax(-1)))
    with torch.no_grad():
        theirs(IDS, use_cache=False)
    hook.remove()
    chosen = (seen[0] + gate.balancing_biases).argmax(-1)
    assert (chosen == theirs.config.num_experts).any()


def test_bfloat16(tmp_path):
    """Both against float64 with the same bfloat16 weights: ours may err at most 1.25 times as much."""
    folder = save(random_model(tiny_config()), tmp_path, torch.bfloat16)
    reference = random_model(tiny_config())
    reference.load_state_dict(
        {k: v.bfloat16().float() if "biases" not in k else v for k, v in reference.state_dict().items()}
    )
    ids = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = reference.double()(ids).double()
        theirs = load(folder, torch.bfloat16)(ids, use_cache=False).logits.double()
    ours = ZayaForCausalLM.from_pretrained(folder, progress=False).logits(ids).double()
    errors = [(x - exact).abs().mean(-1) for x in (ours, theirs)]  # [B, T]; a changed expert shows in a whole row
    assert errors[0].median() <= 1.25 * errors[1].median()
    assert errors[0].mean() <= 1.25 * errors[1].mean()
    agree = [(x.argmax(-1) == exact.argmax(-1)).float().mean() for x in (ours, theirs)]
    assert agree[0] >= agree[1] - 0.02


@pytest.fixture(scope="module")
def prompts():
    from bundled_prompts import held_out_prompts

    return held_out_prompts(20)


def test_bundled_model_logits(prompts):
    """As it is shipped, by the plain calls: nothing is missing or left over, and AR logits agree.

    Its balancing biases reach 12.5, so that the sums which choose an expert are rounded to 2^-20, and some rows choose
    between equals: from the first of these on another expert may be taken.
    """
    theirs, info = transformers.ZayaForCausalLM.from_pretrained(
        bundled_model(), dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    margins = []
    for layer in theirs.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, _, out: margins.append(margin(out[0], gate.balancing_biases)))
    ours = ZayaForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32, progress=False)
    untied = 0
    for prompt in prompts:
        ids = torch.tensor([ours.encode(prompt)])
        margins.clear()
        with torch.no_grad():
            expected = theirs(ids, use_cache=False).logits
        assert expected.std() > 1
        error = (ours.logits(ids) - expected).abs().amax(-1)[0] / expected.abs().max()  # [T]
        tied = (torch.stack(margins).amin(0) <= 2**-20).cumsum(0) > 0
        assert (error <= torch.where(tied, 10 * RELATIVE, RELATIVE)).all()
        untied += int((~tied).sum())
    assert untied > 800


def margin(router_logits, balancing_biases):
    best = (router_logits.float().softmax(-1) + balancing_biases).topk(2).values
    return best[:, 0] - best[:, 1]


def test_bundled_model_greedy_text(prompts):
    ours = ZayaForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32, progress=False)
    theirs = load(bundled_model())
    outputs = ours.generate(prompts, SamplingParams(max_tokens=48, ignore_eos=True))
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        with torch.no_grad():
            generated = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=48,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert generated[0, ids.shape[1] :].tolist() == output.token_ids
        assert ours.tokenizer.decode(generated[0, ids.shape[1] :].tolist()) == output.text
