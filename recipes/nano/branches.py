"""Greedy continuations after every block start of true text: the labels of the conversion's last stage.

    python recipes/nano/branches.py MODEL OUT.pt --count 3200

A draft is right when it is what the model itself would choose next, not what the file says. So the masks of a block
that follows true text learn the model's own greedy continuation of that text, one for every block of every piece. OUT
holds, per block offset, `tokens [offsets, n, length]` and `labels`, the text's tokens but `depth` own ones per block.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import data
from blockdraft import SamplingParams, ZayaForCausalLM

SHORTEST_PREFIX = 24


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=3200)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--depth", type=int, default=10, help="own tokens per block; the rest keep the text's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model = ZayaForCausalLM.from_pretrained(args.model, max_batch_size=64)
    stream = data.encode(model.tokenizer, [text for _, text in data.split()[0]], args.out.parent)
    generator = torch.Generator().manual_seed(args.seed)
    each = args.count // args.block_length
    start = torch.randint(len(stream) - args.length, (args.block_length, each, 1), generator=generator)
    tokens = stream[start + torch.arange(args.length)].to(torch.int16)
    tokens[..., 0] = data.BOS
    labels = tokens.clone()
    params = SamplingParams(max_tokens=args.depth, ignore_eos=True, sampler="ar")
    pieces = [(offset, i) for offset in range(args.block_length) for i in range(each)]
    for offset, piece in tqdm(pieces, "pieces", mininterval=10):
        row = tokens[offset, piece]
        cuts = [at for at in range(offset, args.length, args.block_length) if at >= SHORTEST_PREFIX]
        for at, output in zip(cuts, model.generate([row[:at].tolist() for at in cuts], params), strict=True):
            end = min(at + args.depth, args.length)
            labels[offset, piece, at:end] = torch.tensor(output.token_ids[: end - at], dtype=torch.int16)
    torch.save({"tokens": tokens, "labels": labels}, args.out)


if __name__ == "__main__":
    main()
