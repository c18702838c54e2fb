"""Checkpoints for tests: a tiny random model in which every part of the architecture matters."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blockdraft.model.config import ZayaConfig
from blockdraft.reference.model import ZayaReference

SKIP_LAYER = 2  # the only layer whose skip class can win; released checkpoints have none
ROPE = {
    "hybrid": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    "hybrid_sliding": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}


def tiny_config(**changes: object) -> ZayaConfig:
    """Four layers, alternately full and with a window of 5; five experts; sizes that fill no tile."""
    values = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 40, "num_experts": 5,
        "router_hidden_size": 24, "layer_types": ("hybrid", "hybrid_sliding") * 2, "sliding_window": 5,
        "rope_parameters": ROPE, "max_position_embeddings": 2048, "bos_token_id": 2, "eos_token_ids": (95,),
        "pad_token_id": 0, "mask_token_id": 4,
    }  # fmt: skip
    return ZayaConfig(**values | changes)


def config_json(config: ZayaConfig) -> dict:
    values = {name: value for name, value in vars(config).items() if name != "eos_token_ids" and value is not None}
    return values | {
        "model_type": "zaya",
        "layer_types": list(config.layer_types),
        "eos_token_id": config.eos_token_ids[0],
    }


@torch.no_grad()
def random_model(config: ZayaConfig, seed: int = 0) -> ZayaReference:
    """Every parameter is far from its initial value: at initialisation temp is 1, scales 1 and biases 0."""
    torch.manual_seed(seed)
    model = ZayaReference(config)
    for name, p in model.named_parameters():
        _randomise(name, p)
    for i, layer in enumerate(model.model.layers):
        bias = torch.linspace(-0.05, 0.05, config.num_experts).roll(i)
        layer.mlp.gate.balancing_biases.copy_(torch.cat([bias, torch.tensor([0.2 if i == SKIP_LAYER else -1.0])]))
    return model


def _randomise(name: str, p: Tensor) -> None:
    if name.endswith("temp"):
        p.uniform_(0.8, 3.0)
    elif "scale" in name or "norm" in name:
        p.uniform_(0.5, 1.5)
    elif name.endswith("bias"):
        p.uniform_(-0.3, 0.3)
    elif "embed_tokens" in name:
        p.normal_(0, 0.8)
    elif "conv_qk" in name:
        p.normal_(0, 0.5)
    elif "router_mlp" in name:
        p.normal_(0, 2.0 if "out_proj" in name else 0.6)
        p -= p.mean(-1, keepdim=True)  # so that routing depends on the token
    else:
        p.normal_(0, p.shape[-1] ** -0.5)


def save(model: ZayaReference, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a native checkpoint; balancing biases stay float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.to(torch.float32 if name.endswith("balancing_biases") else dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_json(model.config)))
    return folder
