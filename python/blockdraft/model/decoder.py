"""The stack of layers between token ids and the hidden states that the LM head reads."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blockdraft import ops
from blockdraft.cache import Transaction
from blockdraft.errors import ConfigError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.layers import DecoderLayer, LayerCache, PackedLinear, Read, ResidualNorm
from blockdraft.model.memory import new_stack
from blockdraft.model.tensor_names import ADAPTED, SCALES
from blockdraft.model.weights import Checkpoint
from blockdraft.ops.decoder_forward import EXPERT_SCALES, LAYER_WEIGHTS, MODEL_WEIGHTS
from blockdraft.steps import Step

WAYS = ("fused", "modules")


def chosen_way() -> str:
    """How a forward runs: "fused", as one operator, or "modules", by BLOCKDRAFT_DECODER=modules."""
    way = os.environ.get("BLOCKDRAFT_DECODER") or "fused"
    if way not in WAYS:
        raise ConfigError(f"BLOCKDRAFT_DECODER must be fused or modules, got {way!r}")
    return way


class Decoder(nn.Module):
    """ZAYA1 from token ids to normed hidden states; `lm_head` is the tied embedding, packed once for both.

    A forward is one operator, `ops.decoder_forward`, or goes through the modules, which read as the formulas; the bits
    are the same. Hooks run, and modules can be exchanged, with ``fused = False`` only.

    Args:
        config: The model's configuration.
        checkpoint: Its weights; each tensor is read, packed and let go, so that memory peaks at the packed weights and
            one layer.
        dtype: Of weights, activations and cache; the residual stream is float32.
        device: Where it runs.
        skip_identity: What a row of the skip class gives: ``p * x`` instead of 0.
        progress: Show a progress bar.
        adapters: Tensors of `read_adapters`; None or empty: rows that draft have the matrices of the others.

    Attributes:
        fused: Whether a forward is one operator, which knows no adapters: with these, forwards in which no row drafts.
        adapted: Whether there are adapters.
        constants: Arguments of it that are the same in every step.
    """

    def __init__(
        self,
        config: ZayaConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        skip_identity: bool = False,
        progress: bool = False,
        adapters: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        read = _reader(checkpoint, dtype, device)
        self.config = config
        self.fused = chosen_way() == "fused"
        self.adapted = bool(adapters)
        self.lm_head = PackedLinear(read("model.embed_tokens.weight"))
        self.input = ResidualNorm(read, "model.input_", "model.layers.0.input_layernorm.weight", config.rms_norm_eps)
        self.layers = nn.ModuleList()
        stacks: dict[str, Tensor] = {}
        for i in tqdm(range(config.num_hidden_layers), "loading", unit="layer", disable=not progress, leave=False):
            layer = DecoderLayer(config, read, i, skip_identity)
            if adapters:
                layer.self_attn.adapt(_adapters_of(adapters, i, dtype, device))
            _move_into(stacks, layer, i, config.num_hidden_layers)
            self.layers.append(layer)
        sizes = (config.vocab_size, config.moe_intermediate_size)
        scalars = (*sizes, skip_identity, config.head_dim**-0.5, config.rms_norm_eps)
        self.constants = (self._weights(stacks), *self._kinds(), *scalars)

    def _weights(self, stacks: dict[str, Tensor]) -> list[Tensor]:
        own, router_width = [self.get_buffer(name) for name in MODEL_WEIGHTS], self.config.router_hidden_size
        stacks.setdefault("mlp.router_states_scale", own[0].new_empty(0, router_width))  # in a model of one layer
        return own + [stacks[name] for name in (*LAYER_WEIGHTS, *EXPERT_SCALES) if name in stacks]

    def _kinds(self) -> tuple[list[Tensor], list[int], list[int]]:
        """Rotary frequencies and windows of the kinds of layers, and the kind of each layer."""
        types = self.config.layer_types
        kinds = list(dict.fromkeys(types))
        first = [types.index(kind) for kind in kinds]
        frequencies = [self.get_buffer(f"layers.{i}.self_attn.inverse_frequencies") for i in first]
        return frequencies, [self.config.window(i) for i in first], [kinds.index(kind) for kind in types]

    def forward(self, transaction: Transaction) -> Tensor:
        """Hidden states ``[T, H]`` of a step's rows; keys go into the pages, projections into the transaction."""
        fused = self.fused and not (self.adapted and _may_draft(transaction.step))
        x, transaction.projections = self._run_operator(transaction) if fused else self._run_modules(transaction)
        return x

    def _run_operator(self, transaction: Transaction) -> tuple[Tensor, Tensor]:
        step, cache = transaction.step, transaction.cache
        return ops.decoder_forward(
            step.token_ids,
            step.row_parents,
            step.row_positions,
            step.row_states,
            step.row_slots,
            step.row_prefix,
            step.row_group_begin,
            step.row_group_end,
            step.cu_rows,
            step.page_table,
            cache.k_pages,
            cache.v_pages,
            cache.conv_states,
            cache.recurrent_states,
            *self.constants,
        )

    def _run_modules(self, transaction: Transaction) -> tuple[Tensor, Tensor]:
        step, lm_head = transaction.step, self.lm_head
        embedded = ops.packed_embedding(step.token_ids, lm_head.weight, lm_head.out_features, lm_head.in_features)
        x, residual = self.input(embedded, None)
        router_states, projections = None, []
        for i, layer in enumerate(self.layers):
            cache = LayerCache(*transaction.pages(i), *transaction.states(i))
            x, residual, router_states, qkv = layer(x, residual, router_states, step, cache)
            projections.append(qkv)
        return x, torch.stack(projections)


def _may_draft(step: Step) -> bool:
    """Whether rows draft; on a GPU, where nobody shall wait for the answer, they might."""
    return step.token_ids.device.type != "cpu" or bool(step.drafting.any())


def _move_into(stacks: dict[str, Tensor], module: DecoderLayer, layer: int, layers: int) -> None:
    """The module's weights move into tensors of all layers; the module keeps views."""
    for name in (*LAYER_WEIGHTS, *EXPERT_SCALES):
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        weight = getattr(owner, leaf, None)
        if weight is None:  # the router of layer 0 has no state before it
            continue
        if name not in stacks:
            stacks[name] = new_stack(weight, layers - layer)
        setattr(owner, leaf, nn.Buffer(stacks[name][layer - layers].copy_(weight)))


def _adapters_of(
    adapters: Mapping[str, Tensor], layer: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    def part(leaf: str, side: str) -> Tensor:
        return adapters[f"model.layers.{layer}.{leaf}.adapter.{side}"].to(device, dtype)

    return [(part(leaf, "down"), part(leaf, "up")) for leaf in ADAPTED]


def _reader(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Read:
    def read(name: str) -> Tensor:
        tensor = checkpoint.read(name)
        keep = name.endswith(("balancing_biases", *SCALES)) or tensor.itemsize == 1
        return tensor.to(device, tensor.dtype if keep else dtype)

    return read
