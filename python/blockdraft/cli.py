"""The `blockdraft` command."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

import blockdraft
from blockdraft import bench, demo, info, passk, roofline
from blockdraft.errors import BlockdraftError
from blockdraft.live import make_view

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BAD_INPUT = 2  # the exit status argparse has for it, too
DIFFERENT = 1


def load(args: argparse.Namespace) -> blockdraft.ZayaForCausalLM:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return blockdraft.ZayaForCausalLM.from_pretrained(
        args.model or blockdraft.bundled_model(),
        dtype=DTYPES[args.dtype],
        mask_token_id=args.mask_token_id,
        progress=args.model is not None,  # the bundled model takes less time than a bar to appear
    )


def sampling_params(args: argparse.Namespace) -> blockdraft.SamplingParams:
    return blockdraft.SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        sampler=args.sampler,
        drafter=args.drafter,
    )


def as_json(output: blockdraft.GenerationOutput) -> dict[str, Any]:
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "prompt_token_ids": list(output.prompt_token_ids),
        "finish_reason": output.finish_reason,
        "seed": output.seed,
        "stats": stats_as_json(output.stats),
    }


def stats_as_json(stats: Any) -> dict[str, Any]:
    """Its fields and what is derived from them."""
    derived = {
        name: getattr(stats, name)
        for name, value in vars(type(stats)).items()
        if isinstance(value, property) and not name.startswith("_")
    }
    return {**dataclasses.asdict(stats), **derived}


def generate(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    params = sampling_params(args)
    model = load(args)
    if args.json:
        (output,) = model.generate(prompt, params)
        print(json.dumps(as_json(output), ensure_ascii=False))
        return 0
    view = make_view(sys.stdout, model.tokenizer)
    for event in model.stream(prompt, params):
        view.event(event)
        if event.output:
            output = event.output
    view.finish()
    print(summary(output), file=sys.stderr)
    return 0


def summary(output: blockdraft.GenerationOutput) -> str:
    stats = output.stats
    speed = f"{stats.tokens_per_second:.1f}/s, {stats.tokens_per_forward:.2f} per forward"
    return f"[{len(output.token_ids)} tokens, {speed}, finished by {output.finish_reason}, seed {output.seed}]"


def show_demo(args: argparse.Namespace) -> int:
    if demo.demo(load(args), args.max_tokens, sys.stdout):
        return 0
    print("blockdraft: a lossless run differs from plain decoding", file=sys.stderr)
    return DIFFERENT


def show_info(args: argparse.Namespace) -> int:
    facts = info.collect()
    print(json.dumps(facts, indent=2) if args.json else info.as_text(facts))
    return 0


def run_bench(args: argparse.Namespace) -> int:
    return bench.main(args) or 0


def run_passk(args: argparse.Namespace) -> int:
    return passk.main(args, load)


def threads(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder or hub id (default: the bundled model)")
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="where config.json does not give one")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--threads", type=threads, metavar="N", help="default: torch's choice")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, metavar="TEXT", help='"-" reads it from standard input')
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--sampler", choices=("lossless", "ar"), default="lossless", help="default: %(default)s")
    parser.add_argument("--drafter", choices=("mask", "none"), default="mask", help="of lossless; default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--seed", type=int, metavar="S", help="default: drawn, and reported")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--json", action="store_true", help="one object on standard output")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blockdraft", description="Drafts and verifies text in blocks of 16 tokens.")
    parser.add_argument("--version", action="version", version=f"blockdraft {blockdraft.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="decode one prompt plainly and by blocks, and compare")
    add_model_arguments(command)
    command.add_argument("--max-tokens", type=int, default=160, metavar="N", help="default: %(default)s")
    command.set_defaults(run=show_demo)

    command = commands.add_parser("generate", help="continue a prompt")
    add_model_arguments(command)
    add_generate_arguments(command)
    command.set_defaults(run=generate)

    command = commands.add_parser("info", help="versions, operator libraries, CPU, threads")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=show_info)

    command = commands.add_parser("bench", help="time each operator against its PyTorch reference")
    bench.add_arguments(command)
    command.set_defaults(run=run_bench)

    command = commands.add_parser("roofline", help="compute what a step must at least cost, and where drafting pays")
    roofline.add_arguments(command)
    command.set_defaults(run=roofline.main)

    command = commands.add_parser("passk", help="pass@k under a check of your own, for plain decoding beside others")
    add_model_arguments(command)
    passk.add_arguments(command)
    command.set_defaults(run=run_passk)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0 done, 1 a comparison failed, 2 bad input, 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()  # so that a reader who went away shows here and not at exit
        return status
    except BlockdraftError as error:
        print(f"blockdraft: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away. Python would report it once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
