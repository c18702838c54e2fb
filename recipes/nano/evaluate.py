"""How well the nano model drafts, on files of packages that its training did not see.

    python recipes/nano/evaluate.py [MODEL] [--prompts 100] [--json FILE]

Generation: lossless greedy, a forward that drafts and one that verifies in turn, against an n-gram drafter (prompt
lookup) on the same prompts; outputs that loop are reported apart, because any drafter is right about a loop. True text:
one draft and one verification after prefixes of the files themselves, every 24 tokens: accepted by the model's own
choices, and equal to the text. Also bits per byte.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
from blockdraft import GenerationOutput, SamplingParams, ZayaForCausalLM, bundled_model
from blockdraft.sampler import Drafter
from drafters import ngram_drafter


def pieces(tokenizer, texts: list[str], count: int, length: int) -> list[list[int]]:
    """`count` token sequences of `length`, <bos> first, spread evenly over the files, from line starts."""
    texts = [text for text in texts if len(text) > 6 * length]
    out = []
    for i in range(count):
        text = texts[i % len(texts)]
        place = (1 + i // len(texts)) / (2 + (count - 1) // len(texts))
        start = text.index("\n", int(len(text) * place) - 4 * length) + 1
        out.append(tokenizer.encode(text[start : start + 4 * length]).ids[:length])
    return out


def loops(tokens: Sequence[int], length: int = 24) -> bool:
    """Some `length` tokens occur twice: from there on greedy decoding goes in circles, and any drafter is right."""
    windows = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return len(set(windows)) < len(windows)


def bits_per_byte(model: ZayaForCausalLM, windows: list[list[int]]) -> float:
    nats = count = 0.0
    for ids in tqdm(windows, "bits per byte"):
        logits = model.logits(torch.tensor([ids]))[0]
        nats += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
        count += len(model.tokenizer.decode(ids[1:]).encode())
    return nats / math.log(2) / count


def summary(outputs: list[GenerationOutput]) -> dict:
    """Over all forwards together, not a mean of ratios."""
    stats = [output.stats for output in outputs]
    forwards, verifies = sum(s.decode_forwards for s in stats), sum(s.verify_forwards for s in stats)
    histogram = [sum(s.acceptance_histogram[i] for s in stats if i < len(s.acceptance_histogram)) for i in range(16)]
    return {
        "outputs": len(outputs),
        "tokens_per_forward": round(sum(s.committed for s in stats) / forwards, 3) if forwards else None,
        "tokens_per_verify": round(1 + sum(s.accepted for s in stats) / verifies, 3) if verifies else None,
        "acceptance_histogram": histogram,
    }


def generation(model: ZayaForCausalLM, prompts: list[list[int]], params: SamplingParams) -> dict:
    outputs = model.generate(prompts, params)
    looping = [output for output in outputs if loops(output.token_ids)]
    rest = [output for output in outputs if not loops(output.token_ids)]
    return {"not_looping": summary(rest), "looping": summary(looping), "all": summary(outputs)}


def leading(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def true_text(model: ZayaForCausalLM, windows: list[list[int]], step: int, drafter: str | Drafter = "mask") -> dict:
    """First forward after each true prefix. Mask drafts were made before the anchor was known, a callable's after; a
    forward without drafts accepts none."""
    cuts = [(ids, at) for ids in windows for at in range(32, len(ids) - 17, step)]
    params = SamplingParams(max_tokens=17, ignore_eos=True, drafter=drafter, groups=0)
    own, right, after_right = [], [], []
    anchors: dict[int, int] = {}
    seen: set[int] = set()
    for event in tqdm(model.stream([ids[:at] for ids, at in cuts], params), "true text"):
        i = event.request
        if event.kind == "prefill" and event.token_ids:
            anchors[i] = event.token_ids[0]
        if event.kind in ("verify", "ar") and i not in seen:
            seen.add(i)
            ids, at = cuts[i]
            own.append(event.accepted)
            right.append(leading(event.drafted, ids[at + 1 :]))
            if anchors[i] == ids[at]:
                after_right.append(right[-1])
    mean = lambda x: round(1 + sum(x) / max(1, len(x)), 3)  # noqa: E731
    return {
        "prefixes": len(own),
        "tokens_per_verify": mean(own),
        "drafts_equal_to_text": mean(right),
        "drafts_equal_to_text_where_the_next_token_was_right": mean(after_right),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=bundled_model())
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = ZayaForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), max_batch_size=32)
    texts = [text for _, text in data.split()[1]]
    prompts = pieces(model.tokenizer, texts, args.prompts, args.prompt_length)
    windows = pieces(model.tokenizer, texts, max(4, args.prompts // 4), 448)

    greedy = SamplingParams(max_tokens=args.tokens, ignore_eos=True, seed=0, groups=0)
    result = {
        "bits_per_byte": round(bits_per_byte(model, windows), 4),
        "greedy": generation(model, prompts, greedy),
        "greedy_ngram_drafter": generation(model, prompts, replace(greedy, drafter=ngram_drafter)),
        "temperature_0.8": generation(model, prompts, replace(greedy, temperature=0.8)),
        "temperature_0.8_ngram_drafter": generation(
            model, prompts, replace(greedy, temperature=0.8, drafter=ngram_drafter)
        ),
        "true_text": true_text(model, windows, 24),
        "true_text_ngram_drafter": true_text(model, windows, 24, ngram_drafter),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
