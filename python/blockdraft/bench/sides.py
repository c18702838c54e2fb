"""A decoder and transformers' on the same weights, at the same place of the same text, and what both are to do."""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from blockdraft import ops
from blockdraft.bench.random_model import RandomWeights
from blockdraft.bench.subjects.lm_head_choose import settings
from blockdraft.cache import Cache, Transaction
from blockdraft.model.config import ZayaConfig
from blockdraft.model.decoder import Decoder
from blockdraft.model.weights import Checkpoint
from blockdraft.steps import Block, make_step

Call = tuple[Callable[..., Any], tuple[Any, ...]]
CHUNK = 512  # rows of a prefill forward
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies an expert for each row: 7.6 s a layer at 16 rows
COMPILED = "compiled"


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


class Ours:
    """A decoder with `tokens` committed, which every call leaves as they are.

    Args:
        decoder: The layers and the LM head.
        tokens: The context.
        most_rows: Of a call.
    """

    def __init__(self, decoder: Decoder, tokens: Sequence[int], most_rows: int, dtype: torch.dtype) -> None:
        self.decoder = decoder
        self.tokens, room = list(tokens), len(tokens) + most_rows
        self.cache = Cache(decoder.config, -(-room // 32), 1, dtype, torch.device("cpu"))
        self.sequence = self.cache.allocate(room)
        self.fill()

    def fill(self) -> None:
        """Starts over: the weights may have changed."""
        self.sequence.length = 0
        self.cache.conv_states.zero_()
        self.cache.recurrent_states.zero_()
        for first in range(0, len(self.tokens), CHUNK):
            chunk = self.tokens[first : first + CHUNK]
            transaction = self.begin(chunk)
            self.decoder(transaction)
            transaction.commit([len(chunk)], torch.tensor([len(chunk) - 1], dtype=torch.int32))

    def route(self, weights: RandomWeights) -> None:
        """Takes the routers of these weights."""
        for i, layer in enumerate(self.decoder.layers):
            mlp: Any = layer.mlp
            for name, packed in zip(router_names(i), (mlp.down_proj, mlp.out_proj), strict=True):
                packed.copy_(ops.pack_weight(weights.read(name)))
        self.fill()

    def begin(self, tokens: Sequence[int]) -> Transaction:
        sequence = self.sequence
        step = make_step([Block(sequence.length, sequence.slot, sequence.pages, list(tokens))], self.cache.page_size)
        return self.cache.begin(step, [sequence])

    def layers(self, tokens: Sequence[int]) -> Call:
        """Embedding and layers, up to the last norm."""
        return self.decoder, (self.begin(tokens),)

    def step(self, tokens: Sequence[int]) -> Call:
        """Laying the rows out, layers, LM head and greedy choice."""
        columns = settings(len(tokens), 0.0)
        return lambda: self.choose(self.decoder(self.begin(tokens)), columns), ()

    def choose(self, states: Tensor, columns: tuple[Tensor, ...]) -> list[int]:
        head = self.decoder.lm_head
        return ops.lm_head_choose(states, head.weight, head.out_features, *columns)[0].tolist()

    def hidden_states(self, tokens: Sequence[int]) -> Tensor:
        """``[T, H]``, normed."""
        return self.decoder(self.begin(tokens))

    def experts_of(self, tokens: Sequence[int]) -> list[Tensor]:
        """The class that each row chooses ``[T]``, layer by layer; E is skip."""
        fused, self.decoder.fused = self.decoder.fused, False  # nothing is seen of what happens inside one operator
        try:
            with RecordExperts() as record:
                self.hidden_states(tokens)
        finally:
            self.decoder.fused = fused
        return record.ids


class RecordExperts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.blockdraft.moe_experts.default:
            self.ids.append(args[1].clone())
        return func(*args, **(kwargs or {}))


class Theirs:
    """The ZAYA of transformers with the same `tokens` in its cache.

    Args:
        model: `transformers.ZayaForCausalLM`.
        tokens: The context.
    """

    def __init__(self, model: Any, tokens: Sequence[int]) -> None:
        self.model, self.base, self.tokens = model, model.model, list(tokens)
        self.fill()

    def fill(self) -> None:
        self.use(EXPERTS[0])
        self.cache = self.base(torch.tensor([self.tokens]), use_cache=True).past_key_values

    def use(self, experts: str) -> None:
        """set_experts_implementation without its walk over all modules, so that a timed call may begin with it."""
        self.base.config._experts_implementation = "grouped_mm" if experts == COMPILED else experts

    def route(self, weights: RandomWeights) -> None:
        for i, layer in enumerate(self.base.layers):
            gate = layer.mlp.gate
            for name, linear in zip(router_names(i), (gate.down_proj, gate.router_mlp.out_proj), strict=True):
                linear.weight.data.copy_(weights.read(name))
        self.fill()

    @cached_property
    def compiled(self) -> list[Any]:
        return [torch.compile(layer, dynamic=False) for layer in self.base.layers]

    def layers(self, tokens: Sequence[int], experts: str) -> Call:
        """The layers alone: embedding, masks, rotary angles and the last norm are not timed."""
        layers = self.compiled if experts == COMPILED else self.base.layers
        return self.run_layers, (experts, layers, self.embedded(tokens), self.layer_arguments(tokens))

    def run_layers(self, experts: str, layers: Sequence[Any], x: Tensor, arguments: dict[str, Any]) -> Tensor:
        self.use(experts)
        router_states = None
        for layer in layers:
            x, router_states = layer(x, router_states, **arguments)
        return x

    def embedded(self, tokens: Sequence[int]) -> Tensor:
        base = self.base
        x = base.embed_tokens(torch.tensor([list(tokens)]))
        return ((x + base.input_hidden_states_bias) * base.input_hidden_states_scale).float()

    def layer_arguments(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What the model passes to each layer beside the two states, with a cache of its own; all are of one type."""
        seen: dict[str, Any] = {}

        def stop(_: Any, __: Any, arguments: dict[str, Any]) -> None:
            seen.update(arguments)
            raise StopForward

        hook = self.base.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        with suppress(StopForward):
            self.base(torch.tensor([list(tokens)]), past_key_values=copy.deepcopy(self.cache), use_cache=True)
        hook.remove()
        return seen

    def step(self, tokens: Sequence[int], experts: str) -> Call:
        """A forward with the logits of all rows, and their maxima."""
        cache, ids = copy.deepcopy(self.cache), torch.tensor([list(tokens)])

        def run() -> list[int]:
            self.use(experts)
            return self.model(ids, past_key_values=cache, use_cache=True).logits.argmax(-1).tolist()

        return run, ()

    def hidden_states(self, tokens: Sequence[int]) -> Tensor:
        cache, ids = copy.deepcopy(self.cache), torch.tensor([list(tokens)])
        return self.base(ids, past_key_values=cache, use_cache=True).last_hidden_state[0]


class StopForward(Exception):
    pass


def router_names(layer: int) -> tuple[str, str]:
    """The tensors in which UNIFORM and RANDOM weights differ."""
    gate = f"model.layers.{layer}.mlp.gate."
    return gate + "down_proj.weight", gate + "router_mlp.out_proj.weight"


def their_random_model(weights: RandomWeights, progress: bool) -> Any:
    """`transformers.ZayaForCausalLM` with these weights, without drawing its own first."""
    from transformers import ZayaForCausalLM
    from transformers.models.zaya.modeling_zaya import ZayaRotaryEmbedding

    config = their_config(weights.config)
    with torch.device("meta"):
        model = ZayaForCausalLM(config).eval()
    bars = tqdm(weights.shapes, "loading transformers", unit="tensor", disable=not progress, leave=False)
    model.load_state_dict({name: weights.read(name) for name in bars}, strict=False, assign=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = ZayaRotaryEmbedding(config)  # no part of the state
    unset = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if unset:
        raise RuntimeError(f"transformers has tensors that a checkpoint has not: {', '.join(unset[:4])}")
    return model


def their_config(config: ZayaConfig) -> Any:
    from transformers import ZayaConfig as TheirConfig

    shared = {f.name for f in fields(config)} & set(vars(TheirConfig()))
    values = {name: getattr(config, name) for name in shared}
    return TheirConfig(**values | {"layer_types": list(config.layer_types)})


def their_model(folder: Path, config: ZayaConfig, dtype: torch.dtype) -> Any:
    """Of a folder, with its own balancing biases: transformers 5.23 sets the skip class's to -1 after loading."""
    from transformers import ZayaForCausalLM

    model = ZayaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with Checkpoint(folder, config) as checkpoint:
        for i, layer in enumerate(model.model.layers):
            layer.mlp.gate.balancing_biases.copy_(checkpoint.read(f"model.layers.{i}.mlp.gate.balancing_biases"))
    return model
