"""Writes a trained model as a checkpoint that transformers and blockdraft load, and its loss curve."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from blockdraft.reference.model import ZayaReference


def config_json(model: ZayaReference) -> dict:
    c = model.config
    return {
        "architectures": ["ZayaForCausalLM"], "model_type": "zaya", "dtype": "bfloat16",
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim, "num_experts": c.num_experts, "num_experts_per_tok": 1,
        "moe_intermediate_size": c.moe_intermediate_size, "router_hidden_size": c.router_hidden_size,
        "layer_types": list(c.layer_types), "rope_parameters": c.rope_parameters, "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings, "sliding_window": c.sliding_window,
        "cca_time0": 2, "cca_time1": 2, "hidden_act": "silu", "tie_word_embeddings": True,
        "attention_bias": False, "lm_head_bias": False, "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_ids[0], "pad_token_id": c.pad_token_id,
        "mask_token_id": c.mask_token_id, "block_length": c.block_length, "draft_layout": "extra_first_mask",
        "mask_parent": c.mask_parent,
    }  # fmt: skip


def export(model: ZayaReference, tokenizer: Tokenizer, out: Path) -> None:
    tensors = {}
    for name, value in model.state_dict().items():
        dtype = torch.float32 if name.endswith("balancing_biases") else torch.bfloat16
        tensors[name] = value.detach().to("cpu", dtype).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_json(model), indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    names = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": 2048}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def plot_losses(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, style in (("ar", "-"), ("diffusion", "-"), ("held_out_ar", "o"), ("held_out_diffusion", "o")):
        points = [(e["step"], e[key]) for e in entries if key in e and e[key] < 6]
        axes.plot(*zip(*points, strict=True), style, markersize=3, linewidth=0.8, label=key.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)
