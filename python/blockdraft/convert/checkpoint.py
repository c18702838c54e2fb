"""Checkpoints in and out of the trainable model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blockdraft.convert.adapter import adapted, add_adapters
from blockdraft.errors import ConfigError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.config_styles import quantization_config
from blockdraft.model.tensor_names import MARKOV_IN, MARKOV_OUT, OUTPUT, expected_shapes
from blockdraft.model.weights import ADAPTER_FILE, SINGLE_FILE, Checkpoint, read_adapters, resolve_folder
from blockdraft.reference.model import ZayaReference

# What the convolutions of a mask row look back on, and the config's word for it.
MASK_CONTEXTS = {"prefix": "anchor", "mask": "previous", "zero": "none"}
COPIED = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mask_token_id: int | None = None,
    block_length: int | None = None,
    mask_context: str | None = None,
    draft_layout: str | None = None,
    draft_head: str | None = None,
    markov_rank: int | None = None,
) -> ZayaReference:
    """The trainable model of a ZAYA1 checkpoint, of any layout that `ZayaForCausalLM.from_pretrained` reads.

    Args:
        path_or_hub_id: A folder, or ``owner/name``.
        dtype: Of the parameters; balancing biases stay float32.
        device: Where they lie.
        mask_token_id, block_length, draft_layout: Override the config's, which says nothing of them before conversion.
        mask_context: What the convolutions of a mask row look back on: ``prefix``, the last clean token, for every mask
            of a block; ``mask``, the mask before it (the first one: that token); ``zero``, nothing.
        draft_head: Output matrix of the mask rows: ``shared``, ``separate`` or ``markov`` (`ZayaConfig`). Matrices that
            the checkpoint lacks are made such that logits are what they were: a copy of the LM head's, and a bias of 0.
        markov_rank: Of a new Markov head; default 64.

    Raises:
        ConfigError: The config does not describe a model of this class, or an argument contradicts it.
        CheckpointError: The weights cannot be read.
    """
    folder = resolve_folder(path_or_hub_id)
    if mask_context is not None and mask_context not in MASK_CONTEXTS:
        raise ConfigError(f"load: mask_context: wanted one of {', '.join(MASK_CONTEXTS)}, got {mask_context!r}")
    changes = {
        "mask_token_id": mask_token_id,
        "block_length": block_length,
        "mask_parent": MASK_CONTEXTS[mask_context] if mask_context else None,
        "draft_layout": draft_layout,
        "draft_head": draft_head,
        "markov_rank": markov_rank,
    }
    changed = {key: value for key, value in changes.items() if value is not None}
    stored = ZayaConfig.from_folder(folder)
    config = replace(stored, **changed)  # type: ignore[arg-type]
    if config.quantized_experts:
        wanted = "none, for quantized weights cannot be trained"
        raise ConfigError(f"{folder}: quantization_config: wanted {wanted}, got {config.quantized_experts}")
    if stored.draft_head == "markov" == config.draft_head and stored.markov_rank != config.markov_rank:
        raise ConfigError(f"{folder}: markov_rank: wanted the stored {stored.markov_rank}, got {config.markov_rank}")
    with Checkpoint(folder, stored) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    model = _model_of(config, _with_draft_head(tensors, config), dtype)
    _load_adapters(model, folder)
    return model.to(device)


def _model_of(config: ZayaConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> ZayaReference:
    with torch.device("meta"):  # no memory but the tensors' own
        model = ZayaReference(config)
    model.load_state_dict({name: value.to(_stored(name, dtype)) for name, value in tensors.items()}, assign=True)
    return model


def _with_draft_head(tensors: dict[str, Tensor], config: ZayaConfig) -> dict[str, Tensor]:
    """The model's tensors: those there are, new matrices of the drafts where they are wanted, and none too many."""
    V, rank = config.vocab_size, config.markov_rank
    new = {
        OUTPUT: lambda: tensors["model.embed_tokens.weight"].clone(),
        MARKOV_IN: lambda: torch.randn(V, rank) * rank**-0.5,
        MARKOV_OUT: lambda: torch.zeros(rank, V),
    }
    return {name: tensors[name] if name in tensors else new[name]() for name in expected_shapes(config)}


def only_draft_head(model: ZayaReference) -> list[nn.Parameter]:
    """Freezes everything but the drafts' own matrices, so that plain decoding keeps its bits.

    Args:
        model: Of `load`, with a draft head of its own.

    Returns:
        The parameters to train.

    Raises:
        ConfigError: The drafts have no matrix of their own.
    """
    if model.config.draft_head == "shared":
        raise ConfigError("only_draft_head: draft_head: wanted 'separate' or 'markov', got 'shared'")
    for name, p in model.named_parameters():
        p.requires_grad_(name in (OUTPUT, MARKOV_IN, MARKOV_OUT))
    return [p for p in model.parameters() if p.requires_grad]


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith("balancing_biases") else dtype


def _load_adapters(model: ZayaReference, folder: Path) -> None:
    tensors = read_adapters(folder, model.config)
    if tensors:
        add_adapters(model, next(value.shape[0] for name, value in tensors.items() if name.endswith(".down")))
        model.load_state_dict(tensors, strict=False)


def _adapter_tensors(model: ZayaReference) -> dict[str, Tensor]:
    modules = [(name, module.adapter) for name, module in adapted(model) if module.adapter is not None]
    return {f"{name}.adapter.{leaf}": p for name, adapter in modules for leaf, p in adapter.named_parameters()}


def save(
    model: ZayaReference,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    files_from: str | Path | None = None,
) -> None:
    """Writes config.json and model.safetensors, for `ZayaForCausalLM.from_pretrained` here and in transformers.

    Adapters go into a file of their own, draft_adapter.safetensors, which `load` and generation read.
    Each file takes the place of an older one at once: an interrupted run leaves no half of it.

    Args:
        model: To write.
        folder: Made where there is none.
        dtype: Of the stored weights; balancing biases stay float32.
        files_from: A model folder whose tokenizer, chat template and generation_config.json are copied.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapters = _adapter_tensors(model)
    weights = {name: value for name, value in model.state_dict().items() if name not in adapters}
    _write_tensors(folder / SINGLE_FILE, weights, dtype)
    if adapters:
        _write_tensors(folder / ADAPTER_FILE, adapters, dtype)
    else:
        (folder / ADAPTER_FILE).unlink(missing_ok=True)  # of another model
    write_text(folder / "config.json", json.dumps(config_dict(model.config, dtype), indent=2) + "\n")
    for pattern in COPIED if files_from is not None else ():
        for file in Path(files_from).glob(pattern):
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)


def _write_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    stored = {name: value.detach().to("cpu", _stored(name, dtype)).contiguous() for name, value in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(stored, partial, metadata={"format": "pt"})
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """As a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def config_dict(config: ZayaConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The config.json of a model, in the native style, which transformers reads too."""
    values = {name: value for name, value in vars(config).items() if name != "eos_token_ids"}
    eos = list(config.eos_token_ids)
    if config.draft_head != "markov":
        del values["markov_rank"]
    if experts := values.pop("quantized_experts"):
        values["quantization_config"] = quantization_config(experts)
    return values | {
        "architectures": ["ZayaForCausalLM"],
        "model_type": "zaya",
        "dtype": str(dtype).removeprefix("torch."),
        "layer_types": list(config.layer_types),
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "num_experts_per_tok": 1,
        "cca_time0": 2,
        "cca_time1": 2,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "lm_head_bias": False,
    }
