"""Tokens per second of the bundled model on held-out code: plain, by blocks, and transformers on the same weights.

    python bench/generation.py [--threads 2] [--prompts 20] [--json FILE]

Greedy, bfloat16, prompts of 128 tokens, 96 new tokens; every side decodes the same prompts, by turns, and the median
of the rounds counts. transformers (where installed) decodes one prompt at a time with its cache. "identical": the
tokens of plain decoding.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import blockdraft
from blockdraft import SamplingParams, ZayaForCausalLM, bundled_model

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "nano"))

Decode = Callable[[list[list[int]]], list[list[int]]]


def ours(model: ZayaForCausalLM, params: SamplingParams, batch: int) -> Decode:
    def decode(prompts: list[list[int]]) -> list[list[int]]:
        outputs = []
        for first in range(0, len(prompts), batch):
            outputs += model.generate(prompts[first : first + batch], params)
        return [output.token_ids for output in outputs]

    return decode


def transformers_decode(tokens: int) -> Decode | None:
    try:
        import transformers
    except ImportError:
        return None
    model = transformers.ZayaForCausalLM.from_pretrained(bundled_model(), dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def decode(prompts: list[list[int]]) -> list[list[int]]:
        out = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            generated = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
            out.append(generated[0, ids.shape[1] :].tolist())
        return out

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import data
    from evaluate import pieces

    model = ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)
    prompts = pieces(model.tokenizer, [text for _, text in data.split()[1]], args.prompts, 128)
    lossless = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    ar = replace(lossless, sampler="ar")
    sides = {
        f"{name}, batch {b}": ours(model, p, b) for b in (1, 8) for name, p in (("ar", ar), ("lossless", lossless))
    }
    theirs = transformers_decode(args.tokens)
    if theirs:
        sides["transformers, batch 1"] = theirs
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[list[int]]] = {}
    for decode in sides.values():
        decode(prompts[:2])
    for _ in range(args.rounds):
        for name, decode in sides.items():
            start = time.perf_counter()
            tokens[name] = decode(prompts)
            seconds[name].append(time.perf_counter() - start)
    result = {
        "machine": {
            "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
            "kernels": blockdraft.cpu_isa(), "threads": args.threads, "torch": torch.__version__,
            "blockdraft": blockdraft.__version__, "date": time.strftime("%Y-%m-%d"),
        },
        "tokens_per_second": {
            name: round(len(prompts) * args.tokens / statistics.median(s), 1) for name, s in seconds.items()
        },
        "identical": {name: tokens[name] == tokens["ar, batch 1"] for name in sides},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
