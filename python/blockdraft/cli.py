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
from blockdraft import bench, calibrate, demo, info, passk, quantize, roofline, sweep, trace, verify
from blockdraft.errors import BlockdraftError
from blockdraft.live import make_view

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BAD_INPUT = 2  # the exit status argparse has for it, too
DIFFERENT = 1


def load(args: argparse.Namespace, device: str = "cpu") -> blockdraft.ZayaForCausalLM:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return blockdraft.ZayaForCausalLM.from_pretrained(
        args.model or blockdraft.bundled_model(),
        dtype=DTYPES[args.dtype],
        device=device,
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
        verification=args.verification,
        drafter=args.drafter,
        mix=args.mix,
        mix_source=args.mix_source,
        mix_max_kl=args.mix_max_kl,
        lenience=args.lenience,
        block_length=args.block_length,
        groups=args.groups,
        repetition_penalty=args.repetition_penalty,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        bad_words=tuple(args.bad_word),
        min_tokens=args.min_tokens,
        denoising_steps=args.denoising_steps,
        reveal=args.reveal,
        reveal_threshold=args.reveal_threshold,
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


def run_calibrate(args: argparse.Namespace) -> int:
    return calibrate.main(load(args, args.device), args)


def run_bench(args: argparse.Namespace) -> int:
    return bench.main(args) or 0


def run_passk(args: argparse.Namespace) -> int:
    return passk.main(args, load)


def run_sweep(args: argparse.Namespace) -> int:
    return sweep.main(args, load)


def run_trace(args: argparse.Namespace) -> int:
    return trace.main(args, load, sampling_params)


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


def add_generate_arguments(parser: argparse.ArgumentParser, needs_prompt: bool = True) -> None:
    parser.add_argument("--prompt", required=needs_prompt, metavar="TEXT", help='"-" reads it from standard input')
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    samplers = ("lossless", "ar", "mixed", "denoise")
    parser.add_argument("--sampler", choices=samplers, default="lossless", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--seed", type=int, metavar="S", help="default: drawn, and reported")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    add_drafting_arguments(parser.add_argument_group("drafting"))
    add_processor_arguments(parser.add_argument_group("logits processors"))


def add_drafting_arguments(parser: argparse._ArgumentGroup) -> None:
    rules = ("gumbel", "rejection", "match")
    drafters = ("auto", "mask", "ngram", "none")
    parser.add_argument("--drafter", choices=drafters, default="auto", help="default: %(default)s")
    parser.add_argument("--verification", choices=rules, default="gumbel", help="default: %(default)s")
    parser.add_argument("--block-length", type=int, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--groups", type=levels, metavar="R", help="mask groups, or accept lengths as 0,6,15 (planned)")
    parser.add_argument("--mix", type=float, default=0.0, metavar="W", help="of the drafts, with --sampler mixed")
    parser.add_argument("--mix-source", choices=("draft", "fresh"), default="draft", help="default: %(default)s")
    parser.add_argument("--mix-max-kl", type=float, metavar="NATS", help="mix only where the law stays this close")
    parser.add_argument("--lenience", type=float, default=1.0, metavar="L", help="of rejection, with --sampler mixed")
    parser.add_argument("--denoising-steps", type=int, metavar="N", help="with --sampler denoise: forwards per block")
    reveal = ("confidence", "schedule", "entropy")
    parser.add_argument("--reveal", choices=reveal, default="confidence", help="default: %(default)s")
    parser.add_argument("--reveal-threshold", type=float, metavar="X")


def add_processor_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1, the default, is off")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="F")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="P")
    parser.add_argument("--bad-word", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N")


def levels(text: str) -> int | tuple[int, ...]:
    parts = text.split(",")
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or numbers separated by commas, got {text!r}") from None
    return numbers if len(numbers) > 1 else numbers[0]


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

    command = commands.add_parser("calibrate", help="time forwards by their rows, for the planner")
    add_model_arguments(command)
    calibrate.add_arguments(command)
    command.set_defaults(run=run_calibrate)

    command = commands.add_parser("info", help="versions, operator libraries, CPU, threads")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=show_info)

    command = commands.add_parser("bench", help="time operators, a layer or a model beside others")
    bench.add_arguments(command)
    command.set_defaults(run=run_bench)

    command = commands.add_parser("roofline", help="compute what a step must at least cost, and where drafting pays")
    roofline.add_arguments(command)
    command.set_defaults(run=roofline.main)

    command = commands.add_parser("passk", help="pass@k under a check of your own, for plain decoding beside others")
    add_model_arguments(command)
    passk.add_arguments(command)
    command.set_defaults(run=run_passk)

    command = commands.add_parser("quantize", help="write a checkpoint with experts of 8 or 4 bits, and its errors")
    quantize.add_arguments(command)
    command.set_defaults(run=quantize.main)

    command = commands.add_parser("verify", help="report whether blocks give what plain decoding gives, here")
    verify.add_arguments(command)
    command.set_defaults(run=verify.main)

    command = commands.add_parser("sweep", help="speed against quality, from lossless to mixed, beside plain decoding")
    add_model_arguments(command)
    sweep.add_arguments(command)
    command.set_defaults(run=run_sweep)

    command = commands.add_parser(
        "trace", help="record a generation step by step, as JSON lines or a page that plays it"
    )
    add_model_arguments(command)
    add_generate_arguments(command, needs_prompt=False)
    trace.add_arguments(command)
    command.set_defaults(run=run_trace)
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
