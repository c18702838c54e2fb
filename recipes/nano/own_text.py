"""Continuations by the model itself, for the last part of the conversion.

    python recipes/nano/own_text.py MODEL OUT.pt --count 2000

What lossless decoding verifies are the model's own choices, and those are far more regular than the text that it was
trained on: a mask row that has to guess two tokens ahead has one right answer after a greedy prefix, many in a file.
Each row of OUT is a piece of a training file and its continuation, greedy or sampled, `length` tokens in
all. Rows that only repeat themselves are dropped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import data
from blockdraft import SamplingParams, ZayaForCausalLM
from evaluate import pieces


def periodic(tokens: list[int], longest: int = 24) -> bool:
    """The last half repeats with a period of at most `longest` tokens: nothing is left to learn from it."""
    tail = tokens[len(tokens) // 2 :]
    return any(tail[period:] == tail[:-period] for period in range(1, min(longest, len(tail) // 2) + 1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt-length", type=int, default=96)
    parser.add_argument("--greedy", type=int, choices=range(5), default=3, help="so many of four; the others at 0.7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-bytes", type=int, help="prompts from this much text, as in train.py")
    args = parser.parse_args(argv)
    model = ZayaForCausalLM.from_pretrained(args.model, max_batch_size=64)
    texts = [text for _, text in data.split(args.max_bytes)[0]]
    prompts = pieces(model.tokenizer, texts, args.count, args.prompt_length)
    new = args.length - args.prompt_length
    params = [
        SamplingParams(
            max_tokens=new,
            ignore_eos=True,
            sampler="ar",
            seed=args.seed + i,
            temperature=0.0 if i % 4 >= 4 - args.greedy else 0.7,
        )
        for i in range(len(prompts))
    ]
    rows = []
    for event in model.stream(prompts, params):
        output = event.output
        row = output and output.prompt_token_ids + output.token_ids
        if row and len(row) == args.length and not periodic(output.token_ids):
            rows.append(row)
            if len(rows) % 100 == 0:
                tqdm.write(f"{len(rows)} rows")
    print(f"{len(rows)} of {len(prompts)} continuations kept")
    if not rows:
        raise SystemExit("own_text: all continuations only repeat themselves: train longer, or sample more of them")
    torch.save(torch.tensor(rows, dtype=torch.int16), args.out)


if __name__ == "__main__":
    main()
