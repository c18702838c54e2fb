"""Loads a checkpoint of ZAYA1-8B's shape with random weights, and reports time and peak memory; then decodes a little.

    python bench/machine/load_8b.py [--folder DIR] [--tokens 8] [--layers 40]

Needs 18 GB of disk (a temporary folder unless --folder is given, which is kept) and 20 GB of memory. The text means
nothing, and random routing touches few experts: the speed is printed to see that it works, not to be quoted.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from blockdraft import SamplingParams, ZayaConfig, ZayaForCausalLM
from blockdraft.model.weights import expected_shapes

ROPE = {"hybrid": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}}


def config_of(layers: int) -> dict:
    return {
        "model_type": "zaya", "architectures": ["ZayaForCausalLM"], "dtype": "bfloat16", "vocab_size": 262272,
        "hidden_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 2048,
        "router_hidden_size": 256, "layer_types": ["hybrid"] * layers, "rope_parameters": ROPE,
        "max_position_embeddings": 131072, "bos_token_id": 2, "eos_token_id": 106, "pad_token_id": 0,
        "mask_token_id": 4,
    }  # fmt: skip


def tensor_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("balancing_biases"):
        return torch.tensor([0.0] * (shape[0] - 1) + [-1.0])
    if name.endswith("scale") or "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16) * 0.03


def write_checkpoint(folder: Path, layers: int) -> int:
    """One shard per layer; returns the bytes of all tensors."""
    data = config_of(layers)
    (folder / "config.json").write_text(json.dumps(data))
    shapes = expected_shapes(ZayaConfig.from_dict(data))
    layer_of = {name: name.split(".")[2] if ".layers." in name else "rest" for name in shapes}
    index, size, kept = {}, 0, {}
    for shard in dict.fromkeys(layer_of.values()):
        names = [name for name in shapes if layer_of[name] == shard]
        tensors = {}
        for name in names:  # all layers share their random numbers, which are slow to draw
            key = name.replace(f".{shard}.", ".")
            if key not in kept:
                kept[key] = tensor_of(name, shapes[name])
            tensors[name] = kept[key]
        file = f"model-{shard}.safetensors"
        save_file(tensors, folder / file)
        index |= dict.fromkeys(names, file)
        size += sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return size


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load_and_decode(folder: Path, size: int, tokens: int) -> None:
    before, start = peak_bytes(), time.perf_counter()
    model = ZayaForCausalLM.from_pretrained(folder)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    print(f"weights {size / 2**30:.2f} GiB, loaded in {seconds:.1f} s ({size / seconds / 1e9:.2f} GB/s)")
    print(f"peak memory {peak / 2**30:.2f} GiB, before loading {before / 2**30:.2f} GiB")
    print(f"{(peak - size) / 2**30:+.2f} GiB over the weights")
    for sampler in ("ar", "lossless"):
        params = SamplingParams(max_tokens=tokens, sampler=sampler, ignore_eos=True)
        output = model.generate([[2, 9259, 236888, 2088]], params)[0]
        print(f"{sampler:9} {output.stats.tokens_per_second:.2f} tokens/s  {output.token_ids}")
    print(f"peak memory after decoding {peak_bytes() / 2**30:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="kept, and used again if it has a config.json")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--write-only", action="store_true", help="so that another process loads with a clean peak")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "model.safetensors.index.json").exists():
            write_checkpoint(folder, args.layers)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        if not args.write_only:
            load_and_decode(folder, size, args.tokens)
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
