"""Writes a trained model as a checkpoint that transformers and blockdraft load, and its loss curve."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from blockdraft import convert
from blockdraft.reference.model import ZayaReference

SPECIAL = {name: f"<{name.removesuffix('_token')}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}


def export(model: ZayaReference, tokenizer: Tokenizer, out: Path) -> None:
    convert.save(model, out)
    tokenizer.save(str(out / "tokenizer.json"))
    names = SPECIAL | {"mask_token": "<mask>"}
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
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=3, linewidth=0.8, label=key.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)
    pyplot.close(figure)
