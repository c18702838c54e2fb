"""The stack of layers between token ids and the hidden states that the LM head reads."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blockdraft import ops
from blockdraft.cache import Transaction
from blockdraft.model.config import ZayaConfig
from blockdraft.model.layers import DecoderLayer, LayerCache, PackedLinear, Read, ResidualNorm
from blockdraft.model.tensor_names import SCALES
from blockdraft.model.weights import Checkpoint


class Decoder(nn.Module):
    """ZAYA1 from token ids to normed hidden states; `lm_head` is the tied embedding, packed once for both.

    Args:
        config: The model's configuration.
        checkpoint: Its weights; each tensor is read, packed and let go, so that memory peaks at the packed weights and
            one tensor.
        dtype: Of weights, activations and cache; the residual stream is float32.
        device: Where it runs.
        skip_identity: What a row of the skip class gives: ``p * x`` instead of 0.
        progress: Show a progress bar.
    """

    def __init__(
        self,
        config: ZayaConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        skip_identity: bool = False,
        progress: bool = False,
    ) -> None:
        super().__init__()
        read = _reader(checkpoint, dtype, device)
        self.config = config
        self.lm_head = PackedLinear(read("model.embed_tokens.weight"))
        self.input = ResidualNorm(read, "model.input_", "model.layers.0.input_layernorm.weight", config.rms_norm_eps)
        layers = tqdm(range(config.num_hidden_layers), "loading", unit="layer", disable=not progress, leave=False)
        self.layers = nn.ModuleList(DecoderLayer(config, read, i, skip_identity) for i in layers)

    def forward(self, transaction: Transaction) -> Tensor:
        """Hidden states ``[T, H]`` of a step's rows; keys go into the pages, projections into the transaction."""
        step, lm_head = transaction.step, self.lm_head
        embedded = ops.packed_embedding(step.token_ids, lm_head.weight, lm_head.out_features, lm_head.in_features)
        x, residual = self.input(embedded, None)
        router_states, projections = None, []
        for i, layer in enumerate(self.layers):
            cache = LayerCache(*transaction.pages(i), *transaction.states(i))
            x, residual, router_states, qkv = layer(x, residual, router_states, step, cache)
            projections.append(qkv)
        transaction.projections = torch.stack(projections)
        return x


def _reader(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Read:
    def read(name: str) -> Tensor:
        tensor = checkpoint.read(name)
        keep = name.endswith(("balancing_biases", *SCALES)) or not tensor.is_floating_point()
        return tensor.to(device, tensor.dtype if keep else dtype)

    return read
