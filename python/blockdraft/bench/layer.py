"""`blockdraft bench --layer`: one decoder layer beside transformers' on the same weights.

What runs is a stack of layers, one after the other as in a model, each with weights of its own, so that all are cold
and what a step does once is shared as in a step; the time is that of the stack by the number of its layers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockdraft.bench import report
from blockdraft.bench.measure import Budget, Measured, Prepare, Times, time_sides
from blockdraft.bench.memory import check_memory
from blockdraft.bench.random_model import UNIFORM, RandomWeights, config_of, experts_label, leaf_of
from blockdraft.bench.sides import COMPILED, EXPERTS, Ours, Theirs, has_transformers, their_random_model
from blockdraft.bench.subject import UNIT, Match, Shapes
from blockdraft.bench.subjects.moe_experts import uniform_ids
from blockdraft.model.config import ZayaConfig
from blockdraft.model.decoder import Decoder
from blockdraft.model.expert_formats import expert_bytes
from blockdraft.reference.model import Rows, ZayaReference

VOCAB = 1024  # the embedding is a row each, and the LM head is not measured
LAYER_ROUNDINGS = 8  # to the dtype on a row's way through a layer: norms, q, k, v, attention, o, experts twice


@dataclass(frozen=True)
class LayerRun:
    """What to measure.

    Attributes:
        layers: Of the stack; None: as many as `cold_bytes` takes.
        compiled: torch.compile of transformers' layers, too.
        experts: How ours are stored, None for the dtype; the others' have the same values in the dtype.
    """

    shapes: Shapes
    dtype: torch.dtype
    rows: tuple[int, ...]
    context: int
    routings: tuple[str, ...]
    layers: int | None
    cold_bytes: int
    compiled: bool
    experts: str | None
    budget: Budget

    @property
    def sides(self) -> int:
        return 1 + has_transformers()

    @property
    def depth(self) -> int:
        """Layers such that `cold_bytes` are read before a call meets the same weights again."""
        least = layer_bytes(self.shapes, 1, self.dtype, self.experts)
        return self.layers or max(2, math.ceil(self.cold_bytes / (least * self.sides)))


class Stack:
    """Both sides, and the same in float32 to compare with."""

    def __init__(self, run: LayerRun) -> None:
        shapes, vocab = run.shapes, min(VOCAB, run.shapes.vocab_size)
        self.config = config_of(shapes, run.depth, vocab, run.experts)
        size = run.depth * layer_bytes(shapes, shapes.experts, run.dtype, run.experts)
        size += run.depth * (run.sides - 1) * layer_bytes(shapes, shapes.experts, run.dtype)
        size += layer_bytes(shapes, shapes.experts, torch.float32)  # the reference's layers share their tensors
        check_memory("--layer", size, "--layers or --cold-mb")
        weights = RandomWeights(self.config, run.dtype)
        self.context = torch.randint(self.config.vocab_size, (run.context,)).tolist()
        decoder = Decoder(self.config, weights, run.dtype, torch.device("cpu"), progress=True)
        self.ours = Ours(decoder, self.context, max(run.rows), run.dtype)
        self.theirs = Theirs(their_random_model(weights.widened(), True), self.context) if has_transformers() else None
        self.reference = reference_of(weights.widened())

    def route(self, weights: RandomWeights) -> None:
        self.ours.route(weights)
        if self.theirs:
            self.theirs.route(weights)
        for name, parameter in self.reference.named_parameters():
            if name.endswith(("gate.down_proj.weight", "out_proj.weight")):
                parameter.data = weights.read(name).float()

    def error(self, tokens: Sequence[int]) -> Tensor:
        """Of each row against the reference, relative to the row ``[T]``."""
        ids = torch.tensor([[*self.context, *tokens]])
        exact = self.reference.model(ids, Rows.causal(ids.shape[1]))[0, -len(tokens) :]
        return row_errors(self.ours.hidden_states(tokens), exact)

    def same_bits(self, tokens: Sequence[int]) -> bool:
        return torch.equal(self.ours.hidden_states(tokens)[:1], self.ours.hidden_states(tokens[:1]))


def layer_bytes(shapes: Shapes, experts: int, dtype: torch.dtype, stored: str | None = None) -> int:
    """Matrices of a layer, so many of its experts."""
    attention = shapes.hidden_size * (shapes.qkv_width + shapes.heads * shapes.head_dim)
    convolution = 2 * shapes.channels * shapes.head_dim
    router = shapes.router_hidden_size * (shapes.hidden_size + 2 * shapes.router_hidden_size)
    own = 3 * experts * shapes.hidden_size * shapes.intermediate_size
    return dtype.itemsize * (attention + convolution + router) + int(expert_bytes(stored, dtype.itemsize) * own)


def reference_of(weights: RandomWeights) -> ZayaReference:
    """In float32; layers share the tensors in which they are alike."""
    with torch.device("meta"):
        model = ZayaReference(weights.config)
    kept: dict[str, Tensor] = {}
    tensors = {}
    for name in weights.shapes:
        key = name if "router_mlp.out_proj" in name else leaf_of(name)
        if key not in kept:
            kept[key] = weights.read(name).float()
        tensors[name] = kept[key]
    model.load_state_dict(tensors, assign=True)
    for i, layer in enumerate(model.model.layers):
        attention: Any = layer.self_attn
        attention.frequencies = nn.Buffer(weights.config.inverse_frequencies(i), persistent=False)  # not in the state
    return model


def row_errors(got: Tensor, exact: Tensor) -> Tensor:
    """``|got - exact| / |exact|`` of each row, in the Euclidean norm."""
    got, exact = got.double(), exact.double()
    return ((got - exact).norm(dim=-1) / exact.norm(dim=-1)).nan_to_num(torch.inf, torch.inf)


def match_of(errors: Tensor, routing: str, tolerance: float) -> Match:
    """The worst row; with a random router, where a rounding may change a row's expert, the median."""
    error = float(errors.max() if routing == UNIFORM else errors.median())
    return Match(float(errors.max()), error, tolerance, error <= tolerance)


def tolerance_of(dtype: torch.dtype, config: ZayaConfig) -> float:
    """Roundings of the dtype and float32 sums of each layer; layers err independently."""
    chain = config.hidden_size + config.moe_intermediate_size
    return (LAYER_ROUNDINGS * UNIT[dtype] + chain * 2.0**-24) * config.num_hidden_layers**0.5


def uniform_tokens(config: ZayaConfig, rows: int, turn: int = 0) -> list[int]:
    """Ids that choose as many experts as rows do on average when they choose evenly, others in every turn."""
    E, ids = config.num_experts, uniform_ids(rows, config.num_experts).long()
    ids = (ids + turn * ids.unique().numel()) % E
    return (ids + E * torch.randint(config.vocab_size // E, (rows,))).tolist()


def touched_experts(ids: Sequence[Tensor], experts: int) -> list[int]:
    """How many different ones each layer's rows choose, the skip class left out."""
    return [own[own < experts].unique().numel() for own in ids]


def touched_bytes(decoder: Decoder, experts: Sequence[int], context: int) -> int:
    """Of the layers: weights of so many experts each, all other weights, keys and values."""
    config, total = decoder.config, 0
    key_bytes = 2 * config.num_key_value_heads * config.head_dim * decoder.lm_head.weight.itemsize
    for i, (layer, count) in enumerate(zip(decoder.layers, experts, strict=True)):
        for name, tensor in layer.named_buffers():
            of_experts = "gate_up" in name or "expert_down" in name
            total += tensor.nbytes * count // config.num_experts if of_experts else tensor.nbytes
        total += key_bytes * min(context, config.window(i) or context)
    return total


def measure_all(run: LayerRun) -> Iterator[tuple[str, int, Callable[[], dict[str, Any]]]]:
    stack = Stack(run)
    for routing in run.routings:
        stack.route(RandomWeights(stack.config, run.dtype, routing))
        for rows in run.rows:
            label = f"layer{experts_label(run.experts)}, context {run.context}, {routing} routing"
            yield label, rows, partial(measure, stack, run, routing, rows, label)


def measure(stack: Stack, run: LayerRun, routing: str, rows: int, label: str) -> dict[str, Any]:
    config, layers = stack.config, run.depth
    fixed = torch.randint(config.vocab_size, (rows,)).tolist()

    def tokens(turn: int) -> list[int]:  # a random router's choices must not change after they were counted
        return uniform_tokens(config, rows, turn) if routing == UNIFORM else fixed

    first = tokens(0)
    experts = touched_experts(stack.ours.experts_of(first), config.num_experts)
    match = match_of(stack.error(first), routing, tolerance_of(run.dtype, config))
    sides, failures = their_sides(stack, run, tokens)
    ours, *others = time_sides([lambda turn: stack.ours.layers(tokens(turn)), *sides.values()], run.budget)
    named = {name: times.of_one(layers) for name, times in zip(sides, others, strict=True)}
    fastest = min(named, key=lambda name: named[name].median_ms, default=None)
    measured = Measured(ours.of_one(layers), named.get(fastest), match, stack.same_bits(first), named)
    size = touched_bytes(stack.ours.decoder, experts, run.context) // layers
    cold = size * layers * run.sides >= run.cold_bytes
    notes = [f"experts touched: {sum(experts) / layers:.3g} of {config.num_experts}", *compared(named), *failures]
    return report.result(label, report.Work("; ".join(notes), size, size if cold else 0), rows, measured)


def their_sides(stack: Stack, run: LayerRun, tokens: Any) -> tuple[dict[str, Prepare], list[str]]:
    """What transformers can do here, by name, and what it cannot."""
    theirs = stack.theirs
    if theirs is None:
        return {}, ["transformers is not installed"]
    names, failures = list(EXPERTS), []
    if run.compiled:
        failure = compile_failure(theirs, tokens(0))
        if failure is None:
            names.append(COMPILED)
        else:
            failures.append(f"torch.compile failed: {failure}")
    return {name: partial(their_layers, theirs, tokens, name) for name in names}, failures


def their_layers(theirs: Theirs, tokens: Any, experts: str, turn: int) -> Any:
    return theirs.layers(tokens(turn), experts)


def compile_failure(theirs: Theirs, tokens: Sequence[int]) -> str | None:
    """Compiles for this number of rows; the error's type where that cannot be done."""
    torch._dynamo.config.recompile_limit = 1024  # each layer and number of rows counts as one
    call, arguments = theirs.layers(tokens, COMPILED)
    try:
        call(*arguments)
    except Exception as error:  # of a compiler of many parts
        return type(error).__name__
    return None


def compared(named: dict[str, Times]) -> list[str]:
    """The fastest of several, and what the others took."""
    order = sorted(named, key=lambda name: named[name].median_ms)
    if len(order) < 2:
        return order
    rest = ", ".join(f"{name} {named[name].median_ms:.3f}" for name in order[1:])
    return [f"{order[0]} ({rest})"]
