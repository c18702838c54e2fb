import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import blockdraft
from blockdraft import ZayaForCausalLM
from blockdraft.cache import Cache, Transaction
from blockdraft.model.expert_formats import EXPERT_FORMATS
from blockdraft.ops.decoder_forward import LAYER_WEIGHTS, MODEL_WEIGHTS
from blockdraft.quantize import quantize
from blockdraft.steps import Block, Group, make_step
from checkpoints import ROPE, random_model, save, tiny_config
from ops.helpers import MALFORMED, copies, dtypes, each_wrong_call, opcheck, same_bits, tensor_arguments, threads

PAGES, SLOTS = 11, 5
NAMES = list(inspect.signature(blockdraft.ops.decoder_forward).parameters)
WEIGHTS = (*MODEL_WEIGHTS, *LAYER_WEIGHTS)

HALF_ROTATED = {**ROPE, "hybrid_sliding": {**ROPE["hybrid_sliding"], "partial_rotary_factor": 0.25}}
MODELS = {
    "two-kinds": ({}, "zero"),  # full and sliding layers, one with a skip class that wins
    "skip-identity": ({"rope_parameters": HALF_ROTATED, "hidden_size": 40}, "identity"),
    "int8": ({}, "zero"),
    "fp8": ({}, "zero"),
    "mxfp4": ({"moe_intermediate_size": 64}, "zero"),
    "one-layer": ({"num_hidden_layers": 1, "layer_types": ("hybrid",), "num_experts": 1, "hidden_size": 33}, "zero"),
}
STEPS = {
    "empty": [],
    "prefill": [Block(0, 2, [3, 1], list(range(5, 45)))],
    "small": [Block(30, 1, [8, 0], [5, 6], [Group(1, [4] * 2)])],
    "ar": [Block(33, 4, [7, 2], [9])],
    "verify": [Block(40, 0, [5, 6], list(range(20, 36)))],
    "groups": [Block(30, 1, [8, 0], [5, 6, 7], [Group(0, [4] * 3), Group(2, [4] * 15), Group(-1, [4, 11])])],
    "ragged": [
        Block(33, 3, [7, 2], [9]),
        Block(0, 2, [3, 1], list(range(50, 81))),
        Block(12, 0, [5], [5, 6, 7], [Group(2, [4] * 6)]),
        Block(2, 4, [9], []),
        Block(61, 1, [8, 0, 10], [31, 32]),
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = save(random_model(tiny_config(**MODELS[name][0])), tmp_path_factory.mktemp(name))
            if name in EXPERT_FORMATS:
                quantize(made[name], made[name] / name, progress=False, experts=name)
                made[name] /= name
        return made[name]

    return folder


@pytest.fixture
def load(backend, folders, monkeypatch):
    """Loads a model whose operators are those of the backend."""
    if backend.emulated:
        monkeypatch.setattr(torch.ops, "blockdraft", getattr(torch.ops, backend.namespace))

    def load(name: str, dtype: torch.dtype = torch.float32) -> ZayaForCausalLM:
        return load_model(folders(name), name, dtype, backend.device)

    return load


def load_model(folder: Any, name: str, dtype: torch.dtype, device: str = "cpu") -> ZayaForCausalLM:
    skip = MODELS[name][1]
    return ZayaForCausalLM.from_pretrained(folder, dtype=dtype, device=device, skip_expert=skip, progress=False)


def begin(model: ZayaForCausalLM, step: str) -> Transaction:
    """On a cache in which every value is known, so that a write to a wrong place shows."""
    cache = Cache(model.config, PAGES, SLOTS, model.dtype, model.device)
    torch.manual_seed(1)
    for t in cache_of(cache):
        t.copy_(torch.randn(t.shape))
    return cache.begin(make_step(STEPS[step], cache.page_size).to(model.device), [])


def cache_of(cache: Cache) -> tuple[Tensor, ...]:
    return cache.k_pages, cache.v_pages, cache.conv_states, cache.recurrent_states


def results(model: ZayaForCausalLM, step: str, fused: bool) -> tuple[Tensor, ...]:
    transaction = begin(model, step)
    model.decoder.fused = fused
    x = model.decoder(transaction)
    return x, transaction.projections, *cache_of(transaction.cache)


def make_call(model: ZayaForCausalLM, step: str) -> dict[str, Any]:
    t = begin(model, step)
    rows = [getattr(t.step, name) for name in NAMES[: NAMES.index("k_pages")]]
    return dict(zip(NAMES, (*rows, *cache_of(t.cache), *model.decoder.constants), strict=True))


@dtypes
@pytest.mark.parametrize("name", MODELS)
def test_matches_modules(backend, load, name, dtype):
    """In every bit, with one thread and with two; pages and states included."""
    model = load(name, dtype)
    for step in ["small"] if backend.emulated else STEPS:
        expected = results(model, step, fused=False)
        for count in (1, 2)[: backend.fewer(2, emulated=1)]:
            with threads(count):
                ours = results(model, step, fused=True)
            assert all(same_bits(a, b) for a, b in zip(ours, expected, strict=True)), step
            assert all(t.isfinite().all() for t in ours)


@dtypes
@pytest.mark.parametrize("step", ["ar", "verify", "groups", "ragged"])
def test_joined_kernels_match_modules(gpu, folders, monkeypatch, dtype, step):
    """Of 1, 16, 23 and 43 rows, of which the last are too many; with a skip class that wins, and by identity."""
    monkeypatch.setattr(torch.ops, "blockdraft", getattr(torch.ops, gpu.namespace))
    for name in ("skip-identity", "int8"):
        model = load_model(folders(name), name, dtype, gpu.device)
        expected = results(model, step, fused=False)
        assert all(same_bits(a, b) for a, b in zip(results(model, step, fused=True), expected, strict=True)), name


@pytest.mark.parametrize("name", MODELS)
def test_matches_reference(cpu, folders, name):
    """float32 against float64: some 20 roundings of 2^-24 a layer, worst seen 3e-6 of the largest value."""
    assert_matches_reference(make_call(load_model(folders(name), name, torch.float32), "ragged"))


def assert_matches_reference(call: dict[str, Any]) -> None:
    def wide(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.double() if x.is_floating_point() and x.itemsize > 1 else x
        return [wide(part) for part in x] if isinstance(x, list) else x

    exact_call, own = {name: wide(copies({name: x})[name]) for name, x in call.items()}, copies(call)
    exact = blockdraft.reference.decoder_forward(**exact_call)
    ours = blockdraft.ops.decoder_forward(**own)
    for a, b in zip((*ours, own["k_pages"]), (*exact, exact_call["k_pages"]), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_every_weight_matters(cpu, folders):
    """A weight that is passed in another's place would leave the bits unchanged when it alone changes."""
    call = make_call(load_model(folders("two-kinds"), "two-kinds", torch.float32), "ragged")
    plain = blockdraft.ops.decoder_forward(**copies(call))
    for i, name in enumerate(WEIGHTS):
        weights = list(call["weights"])
        weights[i] = weights[i] * torch.rand_like(weights[i])
        other = blockdraft.ops.decoder_forward(**copies(call | {"weights": weights}))
        assert not all(same_bits(a, b) for a, b in zip(plain, other, strict=True)), name


def test_modules_hold_views_of_the_weights(cpu, folders):
    """Weights are there once, and a change of a layer's is seen by both ways."""
    model = load_model(folders("two-kinds"), "two-kinds", torch.float32)
    before = results(model, "verify", fused=True)
    for layer in model.decoder.layers:
        layer.self_attn.temp *= 1.5
    ours, expected = results(model, "verify", fused=True), results(model, "verify", fused=False)
    assert all(same_bits(a, b) for a, b in zip(ours, expected, strict=True))
    assert not same_bits(before[0], ours[0])


# Malformed calls.


@pytest.fixture(scope="module")
def right_call(folders):
    return make_call(load_model(folders("two-kinds"), "two-kinds", torch.float32), "groups")


@pytest.fixture
def call(cpu, right_call):
    return copies(right_call)


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("name", [n for n in tensor_arguments("decoder_forward") if n in NAMES[:14]])
def test_malformed_tensors_are_refused(call, name, kind):
    change, message = MALFORMED[kind]
    with pytest.raises(RuntimeError, match=f"^decoder_forward: {name} must be {message}"):
        blockdraft.ops.decoder_forward(**call | {name: change(call[name])})


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("name", [*WEIGHTS, "inverse_frequencies"])
def test_malformed_weights_are_refused(call, name, kind):
    """By the names of the list that the modules' buffers are taken by."""
    change, message = MALFORMED[kind]
    argument, i = ("weights", WEIGHTS.index(name)) if name in WEIGHTS else (name, 1)
    changed = list(call[argument])
    changed[i] = change(changed[i])
    with pytest.raises(RuntimeError, match=f"^decoder_forward: {name} must be {message}"):
        blockdraft.ops.decoder_forward(**call | {argument: changed})


@each_wrong_call(
    {
        "few-weights": ({"weights": lambda w: w[:6]}, "decoder_forward: weights must have .*qkv_proj.* at 6, got 6 .*"),
        "more-weights": ({"weights": lambda w: [*w, w[0]]}, "decoder_forward: weights must be 33, got 34"),
        "windows": ({"sliding_windows": [0]}, "decoder_forward: length of sliding_windows must be 2, got 1"),
        "negative-window": ({"sliding_windows": [0, -1]}, "block_attention: sliding_window must be .*, got -1"),
        "kinds": ({"layer_kinds": [0, 1, 2, 0]}, r"decoder_forward: layer_kinds must be in \[0, 1\], got 2"),
        "no-kinds": ({"layer_kinds": []}, "decoder_forward: layer_kinds must have an entry for each layer, got none"),
        "layers": ({"layer_kinds": [0, 1]}, r"decoder_forward: self_attn.conv_qk_grouped must be \[L=2.*"),
        "vocab": ({"vocab_size": 200}, "decoder_forward: panels of lm_head.weight must be 7, got 3"),
        "inner": ({"intermediate_size": 0}, "decoder_forward: .*intermediate_size must be positive, got .* 0"),
        "rotary": (
            {"inverse_frequencies": lambda f: [f[0], torch.ones(9)]},
            "cca_mix: inverse_frequencies must have at most D / 2 entries, got 9",
        ),
        "token": ({"token_ids": lambda t: t + 96}, r"decoder_forward: token_ids must be in \[0, 95\], got .*"),
        "parent": ({"row_parents": lambda t: t + 50}, "decoder_forward: row_parents must be in .*"),
        "state": ({"row_states": lambda t: t + 9}, r"decoder_forward: row_states must be in \[0, 5\], got 10 at 0"),
        "slot": ({"row_slots": lambda t: t + 999}, "decoder_forward: row_slots must be in .*"),
        "page": ({"page_table": lambda t: t + PAGES}, "block_attention: page_table must be in .*"),
        "prefix": ({"row_prefix": lambda t: t + 99}, "block_attention: row_prefix must be in .*"),
        "cu-rows": ({"cu_rows": lambda t: t + 1}, "block_attention: cu_rows must run from 0 .*"),
    }
)
def test_error_messages(call, changes, message):
    changed = {name: change(call[name]) if callable(change) else change for name, change in changes.items()}
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        blockdraft.ops.decoder_forward(**call | changed)


@pytest.mark.parametrize("name", EXPERT_FORMATS)
def test_quantized_experts_need_scales(cpu, folders, name):
    call = make_call(load_model(folders(name), name, torch.float32), "ar")
    with pytest.raises(
        RuntimeError, match="^decoder_forward: weights must have mlp.expert_down_scales at 34, got 34 t"
    ):
        blockdraft.ops.decoder_forward(**call | {"weights": call["weights"][:-1]})


# Registration.


@dtypes
def test_opcheck(cpu, folders, dtype):
    opcheck("decoder_forward", make_call(load_model(folders("two-kinds"), "two-kinds", dtype), "groups"))
