"""Small ablations of the conversion, of equal budgets, from one AR model of CI size.

    python recipes/nano/ablation.py build/ablation [--seeds 2] [--steps 200]

Mask contexts, draft heads of their own, and a control that sees the same clean tokens at the same rates but learns
nothing of masks. Prints a table and writes OUT/ablation.json: held-out losses (with a Markov head those of masks that
know the token before), and tokens per verification after true prefixes, greedy and at temperature 0.8.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import data
import evaluate
import train
from blockdraft import ZayaForCausalLM

ARMS = {
    "prefix": ["--mask-context", "prefix"],
    "mask": ["--mask-context", "mask"],
    "zero": ["--mask-context", "zero"],
    "separate": ["--mask-context", "prefix", "--draft-head", "separate"],
    "markov": ["--mask-context", "prefix", "--draft-head", "markov"],
    "control": ["--alpha", "1e9"],  # the masks' loss weighs nothing
}


def last_losses(folder: Path) -> dict[str, float]:
    entry = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    return {key: round(entry[key], 4) for key in ("held_out_ar", "held_out_diffusion")}


def tokens_per_verify(folder: Path, max_bytes: int) -> dict[str, float]:
    model = ZayaForCausalLM.from_pretrained(folder, max_batch_size=32, progress=False)
    windows = evaluate.pieces(model.tokenizer, [text for _, text in data.split(max_bytes)[1]], 16, 448)
    kinds = {"tokens_per_verify": 0.0, "tokens_per_verify_sampled": 0.8}
    return {
        name: evaluate.true_text(model, windows, 24, temperature=temperature)["tokens_per_verify"]
        for name, temperature in kinds.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", choices=train.SIZES, default="ci")
    parser.add_argument("--max-bytes", type=int, default=1_200_000, help="of the text, as in train.py")
    args = parser.parse_args(argv)
    common = ["--size", args.size, "--batch", "4", "--length", "128", "--max-bytes", str(args.max_bytes)]
    base, steps = args.out / "base", ["--steps", "0", "--convert-steps", str(args.steps)]
    train.main([str(base), *common, "--steps", str(args.base_steps), "--convert-steps", "0"])
    rows = {"base": [last_losses(base)]}
    for seed in range(args.seeds):
        for arm, options in ARMS.items():
            folder = args.out / f"{arm}-{seed}"
            train.main([str(folder), "--init", str(base), "--seed", str(seed), *common, *steps, *options])
            row = last_losses(folder)
            if arm != "control":
                row |= tokens_per_verify(folder, args.max_bytes)
            rows.setdefault(arm, []).append(row)
            print(arm, seed, row)
            (args.out / "ablation.json").write_text(json.dumps({"seeds": args.seeds} | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
