"""The conversion to block diffusion against slow, literal definitions, with mutants that these must catch."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from blockdraft import ConfigError, RequestError, ZayaForCausalLM, convert
from blockdraft.cache import Cache
from blockdraft.convert import batch as batch_module
from blockdraft.convert import losses as losses_function
from blockdraft.errors import CheckpointError
from blockdraft.reference import model as model_module
from blockdraft.reference.model import Rows
from blockdraft.steps import Block, Group, make_step
from checkpoints import random_model, save, tiny_config
from generation.stepping import prefilled

losses_module = sys.modules["blockdraft.convert.losses"]  # the package's `losses` is the function
LAYOUTS = ("extra_first_mask", "masks_after_anchor", "anchor_in_block")
SHAPES = [(12, 4, 0), (13, 4, 3), (9, 16, 5), (17, 2, 1)]  # T, block_length, offset
CASES = [(parent, layout) for layout in LAYOUTS for parent in ("previous", "anchor", "none")]
CASES = [(parent, layout) for parent, layout in CASES if layout != "anchor_in_block" or parent == "previous"]
MASK = 4


# Slow and literal: one row after the other, by the words of docs/convert.md


def block_of(t, length, block_length, offset):
    """Positions of the block that t is in."""
    start = t
    while start > 0 and (start - offset) % block_length:
        start -= 1
    end = start + 1
    while end < length and (end - offset) % block_length:
        end += 1
    return list(range(start, end))


def literal_row(t, length, block_length, offset, mask_parent, draft_layout):
    """Parent and visible rows of the row that drafts token t."""
    block = block_of(t, length, block_length, offset)
    clean = set(range(block[0]))
    members = block[1:] if draft_layout == "masks_after_anchor" else block
    chained = t in members and t != members[0]
    follows = {"anchor": block[0] - 1, "none": -1, "previous": length + t - 1 if chained else block[0] - 1}
    return follows[mask_parent], clean | {length + m for m in members} | {length + t}


def check_rows(module, mask_parent="previous", draft_layout="extra_first_mask"):
    for length, block_length, offset in SHAPES:
        rows = module.doubled_rows(length, block_length, offset, mask_parent, draft_layout)
        assert rows.first_mask == length
        assert rows.positions.tolist() == [*range(length), *range(length)]
        for t in range(length):
            assert rows.parents[t] == t - 1
            assert set(rows.visible[t].nonzero().flatten().tolist()) == set(range(t + 1))
            parent, visible = literal_row(t, length, block_length, offset, mask_parent, draft_layout)
            assert rows.parents[length + t] == parent
            assert set(rows.visible[length + t].nonzero().flatten().tolist()) == visible


def check_losses(module, draft_layout="extra_first_mask"):
    generator = torch.Generator().manual_seed(1)
    for length, block_length, offset in SHAPES:
        config = tiny_config(block_length=block_length, draft_layout=draft_layout)
        tokens, labels = torch.randint(7, (2, 3, length), generator=generator)
        batch = convert.doubled_batch(tokens, config, offset, labels, decay=0.5)
        logits = torch.randn(3, 2 * length, 7, generator=generator)
        ar, diffusion = module.losses(logits, batch, 2)
        log_probs = logits.log_softmax(-1)
        nats = [-log_probs[b, t, tokens[b, t + 1]] for b in range(2) for t in range(length - 1)]
        assert ar.item() == pytest.approx(sum(nats).item() / len(nats), rel=1e-5)
        total = weights = 0.0
        for b in range(3):
            for t in range(1, length):
                idle = draft_layout != "extra_first_mask" and block_of(t, length, block_length, offset)[0] == t
                weight = 0.0 if idle else 0.5 ** ((t - offset) % block_length)
                total += weight * -log_probs[b, length + t, labels[b, t]]
                weights += weight
        assert diffusion.item() == pytest.approx(total.item() / weights, rel=1e-5)


@torch.no_grad()
def check_decoding(folder, module, mask_parent="previous", draft_layout="extra_first_mask"):
    """A block of the doubled sequence is what a drafting forward of the kernels computes; its logits agree."""
    T, B, start = 24, 8, 16
    # block_attention counts a group's positions from its prefix on, so a window must be longer than a block.
    config = tiny_config(mask_parent=mask_parent, draft_layout=draft_layout, block_length=B, sliding_window=12)
    reference = random_model(config)
    model = ZayaForCausalLM.from_pretrained(save(reference, folder), dtype=torch.float32, progress=False)
    tokens = torch.randint(5, 90, (T,), generator=torch.Generator().manual_seed(2))
    batch = module.doubled_batch(tokens[None], config)
    logits = reference(batch.input_ids, batch.rows)[0]
    causal = reference(tokens[None], Rows.causal(T))[0]
    scale = logits.abs().max()
    assert (logits[:T] - causal).abs().max() <= 1e-5 * scale  # masks do not touch clean rows
    first = start + (draft_layout == "masks_after_anchor")
    drafted = draft_logits(model, tokens[:start].tolist(), tokens[start].item(), draft_layout)
    assert (drafted - logits[T + first : T + start + B]).abs().max() <= 1e-5 * scale


def draft_logits(model: ZayaForCausalLM, prefix: list[int], anchor: int, draft_layout: str) -> torch.Tensor:
    """Of the rows that draft after `prefix`, as `blockdraft.schedule` lays them out."""
    cache: Cache = model.new_cache(64, 1)
    B, mask = model.config.block_length, model.config.mask_token_id
    if draft_layout == "anchor_in_block":
        tokens, group = [], Group(-1, [anchor] + [mask] * (B - 1))
    else:
        prefix, tokens = prefix[:-1], prefix[-1:]
        skip = int(draft_layout == "masks_after_anchor")
        group = Group(0, [mask] * (B - skip), skip)
    sequence = prefilled(model, cache, prefix, 32)
    block = Block(sequence.length, sequence.slot, sequence.pages, tokens, [group])
    step = make_step([block], cache.page_size, model.config.mask_parent)
    return model.decoder.lm_head(model.decoder(cache.begin(step, [sequence])), out_float32=True)[len(tokens) :]


def check_adapter(module):
    """Whatever the adapters hold, clean rows keep their bits, and mask rows do not."""
    config = tiny_config(block_length=8)
    plain = random_model(config)
    model = module.ZayaReference(config)
    model.load_state_dict(plain.state_dict())
    tokens = torch.randint(5, 90, (2, 40), generator=torch.Generator().manual_seed(3))
    batch = convert.doubled_batch(tokens, config, 3)
    for m in model.modules():
        if isinstance(m, module.Linear) and m.in_features == config.hidden_size and m.bias is None:
            m.adapter = convert.LowRank(m.in_features, m.out_features, 4)
    with torch.no_grad():
        before = model(batch.input_ids, batch.rows)
        for name, p in model.named_parameters():
            if name.endswith("adapter.up"):
                p.normal_()
        after = model(batch.input_ids, batch.rows)
    assert torch.equal(after[:, :40], before[:, :40])
    assert not torch.equal(after[:, 40:], before[:, 40:])
    assert torch.equal(before, plain(batch.input_ids, batch.rows))


@pytest.mark.parametrize(("mask_parent", "draft_layout"), CASES)
def test_rows(mask_parent, draft_layout):
    check_rows(batch_module, mask_parent, draft_layout)


@pytest.mark.parametrize("draft_layout", LAYOUTS)
def test_losses(draft_layout):
    check_losses(losses_module, draft_layout)


@pytest.mark.parametrize(("mask_parent", "draft_layout"), CASES)
def test_training_rows_are_decoding_rows(tmp_path, mask_parent, draft_layout):
    check_decoding(tmp_path, batch_module, mask_parent, draft_layout)


def test_adapters_leave_clean_rows_bit_equal():
    check_adapter(model_module)


# What the checks above must catch: the real source with one rule broken


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
    changed = ModuleType(module.__name__)
    exec(compile(source.replace(old, new), module.__file__, "exec"), changed.__dict__)
    return changed


MASK_RULES = {
    "masks see the clean tokens of their block": ("block[:, None] > block", "block[:, None] >= block"),
    "masks do not see the block before": ("block[:, None] > block", "block[:, None] > block + 1"),
    "masks see earlier masks": ("own = block[:, None] == block", "own = block[:, None] >= block"),
    "masks are causal in their block": ("= own\n", "= own.tril()\n"),
    "clean rows see the next token": ("position[:, None] >= position\n", "position[:, None] + 1 >= position\n"),
    "clean rows see masks": ("visible[length:, length:] = own", "visible[:, length:] = own.repeat(2, 1)"),
    "masks follow one token too early": ("start - 1, position - 1 +", "start - 2, position - 1 +"),
    "a flat convolution": ("torch.where(position <= first, start - 1, position - 1 + len(position))",
                           "position - 1 + len(position)"),
}  # fmt: skip
POSITION_RULES = {
    "positions go on": ("position.repeat(2)", "torch.arange(2 * length, device=device)"),
    "masks one position late": ("position.repeat(2)", "torch.cat([position, position + 1])"),
}
SHIFT_RULES = {
    "clean labels not shifted": (".tokens[:ar_sequences, 1:]", ".tokens[:ar_sequences, :-1]"),
    "draft labels shifted": ("batch.labels.flatten()", "batch.labels.roll(-1, 1).flatten()"),
    "own text teaches the AR loss": ("logits[:ar_sequences, ", "logits[:ar_sequences].roll(1, 0)[:, "),
}


@pytest.mark.parametrize("rule", MASK_RULES | POSITION_RULES)
def test_broken_rows_are_caught(rule, tmp_path):
    broken = mutant(batch_module, *(MASK_RULES | POSITION_RULES)[rule])
    with pytest.raises(AssertionError):
        check_rows(broken)
    with pytest.raises(AssertionError):  # and by what decoding computes, with no word of the rules
        check_decoding(tmp_path, broken)


@pytest.mark.parametrize("rule", SHIFT_RULES)
def test_broken_losses_are_caught(rule):
    with pytest.raises(AssertionError):
        check_losses(mutant(losses_module, *SHIFT_RULES[rule]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[y[:, :first_mask], y[:, first_mask:] + self.adapter(x[:, first_mask:])], 1", "[y + self.adapter(x)], 1"),
        ("[y[:, :first_mask], y[:, first_mask:] + self.adapter(x[:, first_mask:])], 1", "[y], 1"),
    ],
    ids=["on all rows", "on none"],
)
def test_broken_adapters_are_caught(old, new):
    with pytest.raises(AssertionError):
        check_adapter(mutant(model_module, old, new))


# Learning, checkpoints, errors


def test_training_lowers_both_losses():
    config = tiny_config(block_length=8)
    model = random_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = (torch.arange(48) % 7 + 5).expand(2, -1)
    history = []
    for step in range(20):
        batch = convert.doubled_batch(tokens, config, step % 8)
        ar, diffusion = convert.losses(model(batch.input_ids, batch.rows), batch)
        optimizer.zero_grad()
        convert.objective(ar, diffusion).backward()
        optimizer.step()
        history.append((ar.item(), diffusion.item()))
    assert history[-1][0] < 0.5 * history[0][0]
    assert history[-1][1] < 0.5 * history[0][1]


def test_bfloat16_trains(tmp_path):
    model = convert.load(save(random_model(tiny_config(block_length=8)), tmp_path), dtype=torch.bfloat16)
    tokens = torch.randint(5, 90, (2, 40), generator=torch.Generator().manual_seed(6))
    batch = convert.doubled_batch(tokens, model.config, 5)
    exact = convert.losses(convert.load(tmp_path)(batch.input_ids, batch.rows), batch)
    rounded = convert.losses(model(batch.input_ids, batch.rows), batch)
    convert.objective(*rounded).backward()
    for a, b in zip(exact, rounded, strict=True):
        assert abs(a - b) < 0.05 * a  # logits to 20 with 8 bits, and some rows with another expert
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].mlp.gate.balancing_biases.dtype == torch.float32


def test_nothing_imports_it():
    code = "import sys, blockdraft; assert 'blockdraft.convert' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_objective(alpha):
    assert convert.objective(torch.tensor(2.0), torch.tensor(4.0), alpha) == (alpha * 2 + 4) / (1 + alpha)


def test_trained_adapters_come_back_and_plain_decoding_keeps_its_bits(tmp_path):
    config = tiny_config(block_length=8)
    source = save(random_model(config), tmp_path / "source")
    model = convert.load(source)
    parameters = convert.add_adapters(model, 4)
    assert len(parameters) == 2 * 5 * config.num_hidden_layers
    assert sum(p.requires_grad for p in model.parameters()) == len(parameters)
    tokens = torch.randint(5, 90, (2, 40), generator=torch.Generator().manual_seed(4))
    batch = convert.doubled_batch(tokens, config)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    history = []
    for _ in range(10):
        diffusion = convert.losses(model(batch.input_ids, batch.rows), batch)[1]
        optimizer.zero_grad()
        diffusion.backward()
        optimizer.step()
        history.append(diffusion.item())
    assert history[-1] < 0.9 * history[0]
    convert.save(model, tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        again = convert.load(tmp_path / "out")(batch.input_ids, batch.rows)
        assert torch.equal(again, model(batch.input_ids, batch.rows))
    before = ZayaForCausalLM.from_pretrained(source, dtype=torch.float32, progress=False)
    after = ZayaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, progress=False)
    assert torch.equal(before.logits(tokens), after.logits(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_there_and_back(tmp_path, dtype):
    config = tiny_config(block_length=8, mask_parent="anchor")
    model = random_model(config)
    convert.save(model, tmp_path, dtype=dtype)
    again = convert.load(tmp_path)
    assert again.config == config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a if name.endswith("balancing_biases") else a.to(dtype).float(), b)
    tokens = torch.randint(5, 90, (1, 9))
    assert torch.isfinite(again(tokens)).all()
    assert not list(tmp_path.glob("*.partial"))


def test_options_of_load_are_the_config_s(tmp_path):
    folder = save(random_model(tiny_config(mask_token_id=None)), tmp_path / "a")
    with pytest.raises(ConfigError, match="mask_token_id: wanted a token id in the config, got None"):
        convert.doubled_batch(torch.zeros(1, 8, dtype=torch.int64), convert.load(folder).config)
    options = {"mask_token_id": 7, "block_length": 8, "draft_layout": "masks_after_anchor"}
    for context, mask_parent in {"prefix": "anchor", "mask": "previous", "zero": "none"}.items():
        model = convert.load(folder, mask_context=context, **options)
        assert {key: getattr(model.config, key) for key in options} == options
        assert model.config.mask_parent == mask_parent
        convert.save(model, tmp_path / "b", files_from=folder)
        assert convert.load(tmp_path / "b").config == model.config
    with pytest.raises(ConfigError, match="mask_context: wanted one of prefix, mask, zero, got 'left'"):
        convert.load(folder, mask_context="left")


def test_tokenizer_files_come_along(tmp_path):
    model = random_model(tiny_config())
    source = save(model, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (source / name).write_text(name)
    convert.save(model, tmp_path / "out", files_from=source)
    convert.save(model, source, files_from=source)  # in place
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert copied == tokenizer | {"config.json", "model.safetensors"}
    assert (source / "tokenizer.json").read_text() == "tokenizer.json"


def test_transformers_loads_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = tiny_config()
    model = random_model(config)
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[-1] = -1.0  # transformers 5.23 sets it so after loading
    convert.add_adapters(model, 2)
    convert.save(model, tmp_path, dtype=torch.float32)
    theirs, info = transformers.ZayaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, expected = model(tokens), theirs.eval()(tokens, use_cache=False).logits
    assert (ours - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_a_model_saved_without_adapters_takes_older_ones_away(tmp_path):
    model, plain = random_model(tiny_config()), random_model(tiny_config())
    convert.add_adapters(model, 2)
    convert.save(model, tmp_path)
    assert ZayaForCausalLM.from_pretrained(tmp_path, progress=False).decoder.adapted
    convert.save(plain, tmp_path)
    assert not (tmp_path / "draft_adapter.safetensors").exists()
    assert not ZayaForCausalLM.from_pretrained(tmp_path, progress=False).decoder.adapted


def test_damaged_adapters_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_model(tiny_config())
    convert.add_adapters(model, 2)
    convert.save(model, tmp_path)
    path = tmp_path / "draft_adapter.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({name: t for name, t in tensors.items() if name != first}, path)
    for load in (convert.load, ZayaForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="adapters are not those of this model"):
            load(tmp_path)
    down = next(name for name in tensors if name.endswith("down"))
    save_file(tensors | {down: torch.zeros(3, tensors[down].shape[1])}, path)
    with pytest.raises(CheckpointError, match=r"rank: wanted one for all adapters, got \[2, 3\]"):
        convert.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(8, dtype=torch.int64)}, r"tokens must be int64 \[B, T >= 2\], got torch.int64 \[8\]"),
        ({"tokens": torch.zeros(2, 8)}, r"tokens must be int64 \[B, T >= 2\], got torch.float32 \[2, 8\]"),
        ({"labels": torch.zeros(2, 7, dtype=torch.int64)}, r"labels must be int64 \[2, 8\] like tokens, got .*7\]"),
        ({"offset": 16}, r"offset must be an integer in \[0, 15\], got 16"),
        ({"offset": True}, r"offset must be an integer in \[0, 15\], got True"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\], got 0.0"),
    ],
)
def test_wrong_batches_are_refused(arguments, message):
    arguments = {"tokens": torch.zeros(2, 8, dtype=torch.int64), "config": tiny_config()} | arguments
    with pytest.raises(RequestError, match=message):
        convert.doubled_batch(**arguments)


def test_other_errors():
    model = random_model(tiny_config())
    batch = convert.doubled_batch(torch.zeros(2, 8, dtype=torch.int64), model.config)
    with pytest.raises(RequestError, match=r"logits must be \[B=2, 2T=16, V\], got \[2, 8, 96\]"):
        losses_function(torch.zeros(2, 8, 96), batch)
    with pytest.raises(RequestError, match="rank must be a positive integer, got 0"):
        convert.add_adapters(model, 0)
    convert.add_adapters(model, 1)
    with pytest.raises(RequestError, match=r"model.layers.0.self_attn.qkv_proj.q_proj has an adapter already"):
        convert.add_adapters(model, 1)
