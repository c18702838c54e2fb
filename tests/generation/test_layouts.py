"""The same weights in the native layout, in the older one of half-layers, whole and in shards: the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockdraft import ZayaForCausalLM
from checkpoints import ROPE, random_model, save, tiny_config
from model.test_weights import to_legacy

IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
LEGACY = {
    "model_type": "zaya", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_query_groups": 2, "head_dim": 16, "ffn_hidden_size": 80, "num_experts": 5,
    "zaya_mlp_expansion": 24, "moe_router_topk": 1, "norm_epsilon": 1e-5, "rope_theta": 5e6,
    "partial_rotary_factor": 0.5, "rope_scaling": False, "max_position_embeddings": 2048, "bos_token_id": 2,
    "eos_token_id": 95, "pad_token_id": 0, "zaya_use_mod": True, "zaya_use_eda": True, "residual_in_fp32": True,
}  # fmt: skip


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def native(request, tmp_path_factory):
    config = tiny_config(layer_types=("hybrid",) * 4, sliding_window=None, rope_parameters={"hybrid": ROPE["hybrid"]})
    folder = save(random_model(config), tmp_path_factory.mktemp("native"), request.param)
    return folder, request.param, logits(folder, request.param)


def logits(folder, dtype):
    return ZayaForCausalLM.from_pretrained(folder, dtype=dtype, progress=False).logits(IDS)


def test_half_layers(native, tmp_path):
    folder, dtype, expected = native
    weights = {k: v.contiguous() for k, v in to_legacy(load_file(folder / "model.safetensors"), 4).items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LEGACY))
    assert torch.equal(logits(tmp_path, dtype), expected)


def test_shards(native, tmp_path):
    folder, dtype, expected = native
    weights = load_file(folder / "model.safetensors")
    index = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(weights)}
    for file in set(index.values()):
        save_file({name: weights[name] for name in weights if index[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(logits(tmp_path, dtype), expected)
