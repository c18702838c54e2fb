"""Training of the drafts' own output matrices: against slow, literal sums, through a checkpoint, and into decoding."""

from dataclasses import replace

import pytest
import torch

from blockdraft import ConfigError, RequestError, SamplingParams, ZayaForCausalLM, convert
from blockdraft.steps import Block, Group, make_step
from checkpoints import random_model, save, tiny_config
from generation.stepping import prefilled
from test_convert import LAYOUTS, SHAPES, block_of

RANK = 12
KINDS = ("separate", "markov")
PROMPT = torch.randint(5, 90, (21,), generator=torch.Generator().manual_seed(8)).tolist()


def head_config(kind, **changes):
    return tiny_config(draft_head=kind, markov_rank=RANK, block_length=8, sliding_window=12, **changes)


def random_tokens(T=40, B=2, seed=4):
    return torch.randint(5, 90, (B, T), generator=torch.Generator().manual_seed(seed))


def literal_previous(tokens, labels, t, block_length, offset, draft_layout):
    """What stands before the token that row t drafts, while decoding: text up to the block, then the block's drafts."""
    if t % 16 == 0:
        return 0
    block = block_of(t, len(tokens), block_length, offset)
    known = block[0] + (draft_layout == "anchor_in_block")
    return (tokens if t - 1 < known else labels)[t - 1].item()


@pytest.mark.parametrize("draft_layout", LAYOUTS)
def test_previous_tokens(draft_layout):
    for length, block_length, offset in [*SHAPES, (40, 8, 3)]:
        config = tiny_config(block_length=block_length, draft_layout=draft_layout)
        tokens, labels = random_tokens(length), random_tokens(length, seed=5)
        previous = convert.doubled_batch(tokens, config, offset, labels).previous
        for b in range(2):
            expected = [
                literal_previous(tokens[b], labels[b], t, block_length, offset, draft_layout) for t in range(length)
            ]
            assert previous[b].tolist() == expected


@pytest.mark.parametrize("draft_layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_loss_is_the_literal_one(kind, draft_layout):
    model = random_model(head_config(kind, draft_layout=draft_layout))
    tokens, labels, offset, decay = random_tokens(), random_tokens(seed=5), 3, 0.7
    batch = convert.doubled_batch(tokens, model.config, offset, labels, decay)
    ar, diffusion = convert.losses(model(batch.input_ids, batch.rows, batch.previous), batch)
    states, weights = model.model(batch.input_ids, batch.rows).double(), {}
    for name, value in model.state_dict().items():
        weights[name] = value.double()
    B, T = tokens.shape
    total = sum_of_weights = clean = 0.0
    for b in range(B):
        for t in range(1, T):
            logits = weights["model.embed_tokens.weight"] @ states[b, t - 1]
            clean -= logits.log_softmax(-1)[tokens[b, t]].item()
            if draft_layout != "extra_first_mask" and block_of(t, T, 8, offset)[0] == t:
                continue
            law = weights["diffusion_output_layer.weight"] @ states[b, T + t]
            if kind == "markov":
                before = literal_previous(tokens[b], labels[b], t, 8, offset, draft_layout)
                w1, w2 = weights["diffusion_markov_head.w1"], weights["diffusion_markov_head.w2"]
                law = law + w1[before] @ w2
            weight = decay ** ((t - offset) % 8)
            total -= weight * law.log_softmax(-1)[labels[b, t]].item()
            sum_of_weights += weight
    assert ar.item() == pytest.approx(clean / (B * (T - 1)), rel=1e-5)
    assert diffusion.item() == pytest.approx(total / sum_of_weights, rel=1e-5)


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """Folders of a model without a head of the drafts' own and with one that alone was trained; losses on the way."""
    out = tmp_path_factory.mktemp(request.param)
    source = save(random_model(head_config("shared")), out / "source")
    model = convert.load(source, draft_head=request.param, markov_rank=RANK)
    parameters = convert.only_draft_head(model)
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    batch, history = convert.doubled_batch(random_tokens(), model.config), []
    for _ in range(10):
        diffusion = convert.losses(model(batch.input_ids, batch.rows, batch.previous), batch)[1]
        optimizer.zero_grad()
        diffusion.backward()
        optimizer.step()
        history.append(diffusion.item())
    convert.save(model, out / "trained", dtype=torch.float32)
    return source, out / "trained", model, history


def test_training_the_head_alone(trained):
    source, folder, model, history = trained
    assert history[-1] < 0.7 * history[0]
    old, new = convert.load(source).state_dict(), convert.load(folder).state_dict()
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    assert own == new.keys() - old.keys()
    assert len(own) == (1 if model.config.draft_head == "separate" else 3)


@torch.no_grad()
def test_a_trained_head_comes_back(trained):
    _, folder, model, _ = trained
    again, batch = convert.load(folder), convert.doubled_batch(random_tokens(seed=6), model.config)
    assert replace(again.config, markov_rank=RANK) == model.config  # which a separate head has no use for
    inputs = batch.input_ids, batch.rows, batch.previous
    assert torch.equal(again(*inputs), model(*inputs))


def test_plain_decoding_keeps_its_bits(trained):
    source, folder, _, _ = trained
    before, after = (ZayaForCausalLM.from_pretrained(f, dtype=torch.float32, progress=False) for f in (source, folder))
    assert torch.equal(before.logits(random_tokens()), after.logits(random_tokens()))
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=3, ignore_eos=True, groups=1)
    plain = replace(params, sampler="ar")
    expected = before.generate([PROMPT], plain)[0].token_ids
    drafted = after.generate([PROMPT], params)[0]
    assert after.generate([PROMPT], plain)[0].token_ids == drafted.token_ids == expected
    assert drafted.stats.drafted > 0


@torch.no_grad()
def test_drafts_of_decoding_are_those_of_training(trained):
    """A block from position 24 on after 24 tokens, 32 among its positions: bias and reset are those of the engine."""
    _, folder, reference, _ = trained
    model, T, B, start = ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32, progress=False), 40, 8, 28
    tokens = random_tokens(T, 1)
    batch = convert.doubled_batch(tokens, reference.config, start % B)
    expected = reference(batch.input_ids, batch.rows, batch.previous)[0, T + start : T + start + B]
    known = tokens[0].tolist()
    cache = model.new_cache(64, 1)
    sequence = prefilled(model, cache, known[: start - 1], 32)
    block = Block(start - 1, sequence.slot, sequence.pages, known[start - 1 : start], [Group(0, [4] * B)])
    states = model.decoder(cache.begin(make_step([block], cache.page_size, model.config.mask_parent), [sequence]))[1:]
    logits = model.heads.add_markov(
        model.heads.base_draft_logits(states), known[start - 1 : start + B - 1], range(start, start + B)
    )
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (model.heads.target_logits(states) - expected).abs().max() > 0.05 * expected.abs().max()


@torch.no_grad()
def test_a_new_head_changes_nothing_at_first(tmp_path):
    folder = save(random_model(head_config("shared")), tmp_path)
    batch = convert.doubled_batch(random_tokens(), tiny_config(block_length=8))
    expected = convert.load(folder)(batch.input_ids, batch.rows)
    for kind in KINDS:
        logits = convert.load(folder, draft_head=kind)(batch.input_ids, batch.rows, batch.previous)
        assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_matrices_that_are_not_wanted_go(tmp_path):
    convert.save(random_model(head_config("markov")), tmp_path, dtype=torch.float32)
    stored = convert.load(tmp_path).state_dict()
    for kind, missing in {"separate": 2, "shared": 3}.items():
        model = convert.load(tmp_path, draft_head=kind)
        assert model.config.draft_head == kind
        assert len(stored) - len(model.state_dict()) == missing
        assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_errors(tmp_path):
    model = random_model(head_config("markov"))
    convert.save(model, tmp_path)
    batch = convert.doubled_batch(random_tokens(), model.config)
    with pytest.raises(RequestError, match="a Markov head needs previous, .* got None"):
        model(batch.input_ids, batch.rows)
    with pytest.raises(ConfigError, match="markov_rank: wanted the stored 12, got 5"):
        convert.load(tmp_path, markov_rank=5)
    with pytest.raises(ConfigError, match="draft_head: wanted one of shared, separate, markov, got 'own'"):
        convert.load(tmp_path, draft_head="own")
    with pytest.raises(ConfigError, match="draft_head: wanted 'separate' or 'markov', got 'shared'"):
        convert.only_draft_head(convert.load(tmp_path, draft_head="shared"))
