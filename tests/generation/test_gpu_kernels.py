"""A whole model on the GPU kernels: on the CPU emulator everywhere, and on the GPU where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockdraft import SamplingParams, ZayaForCausalLM, bundled_model, gpu_launches
from blockdraft.quantize import quantize
from blockdraft.runner import EagerRunner, GraphRunner, decode, forward
from blockdraft.steps import Block, make_step
from conftest import BACKENDS, load_backend, marked
from generation.conftest import DTYPES
from generation.recording import Tape, storage, tensors_in, use_graphs
from generation.test_runner import inputs_of, late_inputs_of, whole

GENERATOR = torch.Generator().manual_seed(11)
PROMPTS = [torch.randint(5, 95, (n,), generator=GENERATOR).tolist() for n in (19, 1, 7)]


@pytest.fixture(params=[marked(name) for name in BACKENDS if name != "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a model whose operators are the GPU kernels of a backend."""
    backend = load_backend(request.param)
    if backend.emulated:
        monkeypatch.setattr(torch.ops, "blockdraft", getattr(torch.ops, backend.namespace))
    assert torch.ops.blockdraft.moe_experts.default.namespace == backend.namespace
    return backend.device


def load(folder: Path, dtype: str, device: str) -> ZayaForCausalLM:
    return ZayaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], device=device, progress=False)


def graphs_of(model: ZayaForCausalLM) -> GraphRunner:
    """The model's own, or on the CPU a stand-in's."""
    return model.runner if isinstance(model.runner, GraphRunner) else use_graphs(model)


def tokens(model: ZayaForCausalLM, params: list[SamplingParams]) -> list[list[int]]:
    return [output.token_ids for output in model.generate(PROMPTS, params)]


WAYS = {
    "mask": {},
    "mask-R1": {"groups": 1},
    "ngram": {"drafter": "ngram"},
    "wrong": {"drafter": lambda known, count: [known[-1]] * count},
    "short-blocks": {"block_length": 5, "groups": 5},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_lossless_equals_plain_decoding(device, tiny_folder, dtype, way):
    """Greedy, sampled and truncated requests in one batch."""
    model = load(tiny_folder, dtype, device)
    laws = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.2, "top_p": 0.8, "seed": 4}]
    plain = [SamplingParams(sampler="ar", max_tokens=12, **law) for law in laws]
    blocks = [SamplingParams(sampler="lossless", max_tokens=12, **law, **WAYS[way]) for law in laws]
    assert tokens(model, blocks) == tokens(model, plain)


def test_lossless_equals_plain_decoding_with_experts_of_int8(device, tiny_folder, tmp_path):
    quantize(tiny_folder, tmp_path / "int8", progress=False)
    model = load(tmp_path / "int8", "bfloat16", device)
    plain = [SamplingParams(sampler="ar", max_tokens=8, temperature=0.9, seed=seed) for seed in range(3)]
    blocks = [SamplingParams(max_tokens=8, temperature=0.9, seed=seed, groups=1) for seed in range(3)]
    assert tokens(model, blocks) == tokens(model, plain)


def test_float32_tokens_are_those_of_the_cpu(device, tiny_folder, monkeypatch):
    params = [SamplingParams(temperature=0.0, max_tokens=12), *[SamplingParams(seed=i, max_tokens=12) for i in (1, 2)]]
    ours = tokens(load(tiny_folder, "float32", device), params)
    monkeypatch.undo()
    assert ours == tokens(load(tiny_folder, "float32", "cpu"), params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejection_runs_and_is_greedy_where_asked(device, tiny_folder, dtype):
    model = load(tiny_folder, dtype, device)
    rejecting = SamplingParams(temperature=0.0, verification="rejection", max_tokens=8)
    sampled = SamplingParams(temperature=1.0, verification="rejection", max_tokens=8, seed=1)
    ours = tokens(model, [rejecting, sampled, rejecting])
    plain = tokens(model, [SamplingParams(sampler="ar", temperature=0.0, max_tokens=8)] * 3)
    assert [ours[0], ours[2]] == [plain[0], plain[2]]
    assert len(ours[1]) == 8 or ours[1][-1] == 95


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_graphs_give_the_tokens_of_steps_as_they_come(device, tiny_folder, dtype):
    """Twice, so that shapes come again; padding goes through the kernels as well."""
    model = load(tiny_folder, dtype, device)
    ways = [{"sampler": "ar"}, {"groups": 1, "block_length": 6}, {"groups": 0, "block_length": 4, "logprobs": 0}]
    params = [SamplingParams(max_tokens=7, temperature=5.0, seed=i, **way) for i, way in enumerate(ways)]
    others = [params[0], params[1], params[0]]
    graphs = graphs_of(model)
    model.runner = EagerRunner(model)
    plain = tokens(model, params), tokens(model, others)
    model.runner = graphs
    assert (tokens(model, params), tokens(model, others)) == plain
    assert any(graph.captured for graph in graphs.graphs.values())


@pytest.fixture
def nano(device) -> ZayaForCausalLM:
    return ZayaForCausalLM.from_pretrained(bundled_model(), device=device, progress=False)


def launches(device: str) -> int:
    return torch.ops.blockdraft.launches() if device == "cpu" else gpu_launches()


PER_LAYER = {
    "packed_linear": 2,
    "cca_mix": 1,
    "block_attention": 2,
    "residual_norm": 2,
    "moe_router": 2,
    "moe_experts": 2,
}
PER_FORWARD = {"packed_embedding": 1, "residual_norm": 1}
JOINED = 1  # of them in a forward of up to 32 rows: the norm after attention


@pytest.mark.parametrize(
    ("rows", "late"), [(1, False), (16, False), (16, True), (33, False)], ids=["ar", "verify", "late", "many"]
)
def test_launches_of_a_step(device, nano, rows, late):
    """Of the operators, and of PyTorch: a gather of rows, two joins, and another gather.

    Drafts that are chosen after verification: the head again, and a sum and four gathers that find its rows.
    """
    cache = nano.new_cache(64, 1)
    sequence = cache.allocate(40)
    step = make_step([Block(0, sequence.slot, sequence.pages, [7] * rows)], cache.page_size)
    x = (late_inputs_of if late else inputs_of)(step, rows).to(nano.device)
    with torch.inference_mode():
        before = launches(device)
        forward(nano, cache, x)
        layers = launches(device) - before
        before, tape = launches(device), Tape([*nano.decoder.buffers(), *whole(cache), *vars(x).values()])
        with tape:
            decode(nano, cache, x)
    per_layer = sum(PER_LAYER.values()) - (JOINED if rows <= 32 else 0)
    assert layers == per_layer * nano.config.num_hidden_layers + sum(PER_FORWARD.values())
    assert launches(device) - before == layers + 4 + 2 * late  # two of the head, verification, commit
    ours = [call for call in tape.calls if call.op.namespace == "aten"]
    views = [call for call in ours if storage(call.results[0]) in map(storage, tensors_in(call.args))]
    assert len(ours) - len(views) == 4 + 5 * late


@pytest.mark.parametrize(("rows", "dtype"), [(9, "bfloat16"), (32, "bfloat16"), (9, "float32")])
def test_joined_kernels_give_the_bits_of_single_ones(device, dtype, rows):
    """Where a kernel goes on with what follows, in shapes like those of real models; against operator by operator."""
    model = ZayaForCausalLM.from_pretrained(bundled_model(), dtype=DTYPES[dtype], device=device, progress=False)
    found = []
    for fused in (True, False):
        cache = model.new_cache(80, 1)
        sequence = cache.allocate(64)
        tokens = [(37 * i) % 500 for i in range(rows)]
        step = make_step([Block(0, sequence.slot, sequence.pages, tokens)], cache.page_size).to(model.device)
        model.decoder.fused = fused
        with torch.inference_mode():
            found.append([*forward(model, cache, step), *forward(model, cache, step), *whole(cache)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].isfinite().all()


def test_launches_of_each_operator(device, nano):
    cache = nano.new_cache(64, 1)
    sequence = cache.allocate(40)
    step = make_step([Block(0, sequence.slot, sequence.pages, [7])], cache.page_size).to(nano.device)
    counts = {}
    with torch.inference_mode(), Counting(device, counts):
        nano.decoder.fused = False
        forward(nano, cache, step)
    layers = nano.config.num_hidden_layers
    expected = {name: count * layers for name, count in PER_LAYER.items()}
    assert counts == expected | {name: expected.get(name, 0) + count for name, count in PER_FORWARD.items()}


class Counting(TorchDispatchMode):
    """Launches by operator."""

    def __init__(self, device: str, counts: dict[str, int]) -> None:
        super().__init__()
        self.device, self.counts = device, counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = launches(self.device)
        out = func(*args, **(kwargs or {}))
        if count := launches(self.device) - before:
            name = func._schema.name.partition("::")[2]
            self.counts[name] = self.counts.get(name, 0) + count
        return out
