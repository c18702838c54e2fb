"""The whole chain in CI size: text, tokenizer, AR pre-training, conversion, own text, conversion again, evaluation.

    python recipes/nano/ci.py [build/nano-ci] [--size ci|tiny]

Seeded; a stage that was interrupted goes on, one that is done is not done again. At the end it is checked that both
losses fell on held-out text, that the exported model loads here and in transformers with the same logits, and that
lossless decoding gives the tokens of plain decoding. The exit status says whether it did. The bundled weights stay.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import data
import evaluate
import own_text
import train
from blockdraft import SamplingParams, ZayaForCausalLM

LOGIT_ERROR = 1e-4  # of the largest: float32 sums in another order, and experts chosen between equals


@dataclass(frozen=True)
class Size:
    """How much of everything; `fall` is what must remain of a held-out loss at most."""

    text: list[str]
    model: list[str]
    first: list[str]
    own: list[str]
    second: list[str]
    evaluation: list[str]
    fall: float


SIZES = {
    "ci": Size(
        text=["--max-bytes", "1200000"],
        model=["--size", "ci", "--batch", "16", "--length", "256"],
        first=["--steps", "400", "--convert-steps", "200", "--constant-rate", "--decay", "0.9"],
        own=["--count", "400", "--length", "256", "--prompt-length", "64", "--greedy", "2"],
        second=["--steps", "0", "--convert-steps", "200", "--decay", "0.8"],
        evaluation=["--prompts", "24", "--tokens", "64"],
        fall=0.75,
    ),
    "tiny": Size(
        text=["--max-bytes", "200000"],
        model=["--size", "tiny", "--batch", "8", "--length", "64", "--block-length", "8"],
        first=["--steps", "60", "--convert-steps", "40", "--constant-rate"],
        own=["--count", "24", "--length", "64", "--prompt-length", "24", "--greedy", "0"],
        second=["--steps", "0", "--convert-steps", "40"],
        evaluation=["--prompts", "8", "--tokens", "16", "--prompt-length", "48"],
        fall=0.9,
    ),
}


def run(out: Path, size: Size) -> Path:
    """All stages; returns the folder of the last one's model."""
    first, second, own = out / "stage1", out / "stage2", out / "own_text.pt"
    common = [*size.text, *size.model]
    train.main([str(first), *common, *size.first])
    if not own.exists():
        own_text.main([str(first), str(own), *size.text, *size.own])
    train.main([str(second), "--init", str(first), "--own-text", str(own), *common, *size.second])
    if not (out / "evaluation.json").exists():
        files = ["--json", str(out / "evaluation.json"), "--plots", str(out)]
        evaluate.main([str(second), *size.text, *size.evaluation, *files])
    return second


def fallen(log: Path, key: str) -> float:
    """The last held-out loss of a log, relative to its first."""
    values = [entry[key] for entry in map(json.loads, log.read_text().splitlines()) if key in entry]
    return values[-1] / values[0]


def same_tokens(model: ZayaForCausalLM, prompts: list[list[int]]) -> bool:
    """Lossless and plain decoding, greedy and sampled, drafting always."""
    plain = SamplingParams(max_tokens=48, ignore_eos=True, sampler="ar", seed=0)
    for law in (plain, replace(plain, temperature=0.8)):
        blocks = replace(law, sampler="lossless", drafter="mask", groups=1)
        pairs = zip(model.generate(prompts, law), model.generate(prompts, blocks), strict=True)
        if any(a.token_ids != b.token_ids for a, b in pairs):
            return False
    return True


def difference_from_transformers(folder: Path, ids: torch.Tensor) -> float:
    """The largest, relative to the largest logit, both in float32."""
    from transformers import ZayaForCausalLM as Theirs

    with torch.no_grad():
        expected = Theirs.from_pretrained(folder, dtype=torch.float32).eval()(ids, use_cache=False).logits
    ours = ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32, progress=False).logits(ids)
    return float((ours - expected).abs().max() / expected.abs().max())


def checks(out: Path, folder: Path, size: Size) -> dict[str, bool]:
    """What is claimed of the run, and whether it holds."""
    result = {}
    for key in ("held_out_ar", "held_out_diffusion"):
        left = fallen(out / "stage1" / "log.jsonl", key)
        result[f"{key} fell to {left:.2f} of its start (wanted: {size.fall})"] = left <= size.fall
    left = fallen(folder / "log.jsonl", "held_out_diffusion")
    result[f"held_out_diffusion went to {left:.2f} in the second stage (wanted: 1.02)"] = left <= 1.02
    model = ZayaForCausalLM.from_pretrained(folder, progress=False)
    texts = [text for _, text in data.split(int(size.text[1]))[1]]
    prompts = evaluate.pieces(model.tokenizer, texts, 8, 48)
    result["the exported model loads, and lossless gives the tokens of plain decoding"] = same_tokens(model, prompts)
    if importlib.util.find_spec("transformers"):
        error = difference_from_transformers(folder, torch.tensor(prompts))
        result[f"transformers loads it, logits differ by {error:.1e} (wanted: {LOGIT_ERROR})"] = error <= LOGIT_ERROR
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("build/nano-ci"))
    parser.add_argument("--size", choices=SIZES, default="ci")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    started, size = time.time(), SIZES[args.size]
    folder = run(args.out, size)
    result = json.loads((args.out / "evaluation.json").read_text())
    greedy = result["own_text"]["greedy"]["mask"]["all"]
    forward, verification = greedy["tokens_per_forward"], greedy["tokens_per_verify"]
    print(f"{result['bits_per_byte']} bits per byte; greedy tokens: {forward} a forward, {verification} a verification")
    outcome = checks(args.out, folder, size)
    for claim, holds in outcome.items():
        print("ok  " if holds else "FAIL", claim)
    print(f"{time.time() - started:.0f} s, model in {folder}")
    return 0 if all(outcome.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
