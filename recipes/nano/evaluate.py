"""How well the nano model drafts, on files of packages that its training did not see.

    python recipes/nano/evaluate.py [MODEL] [--prompts 100] [--json FILE] [--plots FOLDER]

Own text: greedy and at temperatures 0.7 and 1, lossless, a forward that drafts and one that verifies in turn, against
an n-gram drafter (prompt lookup) on the same prompts, and with mixed laws; outputs that loop are reported apart,
because any drafter is right about a loop. True text: one draft and one verification after prefixes of the files
themselves, every 24 tokens: accepted by the model's own choices, and equal to the text. Bits per byte. Distinct
experts of the rows of a block.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import data
from blockdraft import GenerationOutput, SamplingParams, ZayaForCausalLM, bundled_model, convert
from blockdraft.sampler import Drafter
from drafters import ngram_drafter

TEMPERATURES = {"greedy": 0.0, "temperature 0.7": 0.7, "temperature 1": 1.0}
MIXES = (0.25, 0.5, 0.75)


def pieces(tokenizer: Tokenizer, texts: list[str], count: int, length: int) -> list[list[int]]:
    """`count` token sequences of `length`, <bos> first, spread evenly over the files, from line starts."""
    texts = [text for text in texts if len(text) > 6 * length]
    out = []
    for i in range(count):
        text = texts[i % len(texts)]
        place = (1 + i // len(texts)) / (2 + (count - 1) // len(texts))
        start = text.index("\n", max(0, int(len(text) * place) - 4 * length)) + 1
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


def acceptance_by_position(histogram: Sequence[int]) -> list[float]:
    """Share of the verified blocks in which the j-th draft held, j = 1, 2, ..."""
    blocks = sum(histogram)
    return [round(sum(histogram[j:]) / blocks, 3) for j in range(1, len(histogram))] if blocks else []


def standard_error(pairs: list[tuple[int, int]]) -> float | None:
    """Of sum(a) / sum(b), where each pair (a, b) is an output: these are independent, the blocks of one are not."""
    total, n = sum(b for _, b in pairs), len(pairs)
    if n < 2 or not total:
        return None
    ratio = sum(a for a, _ in pairs) / total
    return round(math.sqrt(n / (n - 1) * sum((a - ratio * b) ** 2 for a, b in pairs)) / total, 3)


def summary(outputs: list[GenerationOutput], block_length: int) -> dict:
    """Over all forwards together, not a mean of ratios."""
    stats = [output.stats for output in outputs]
    forwards, verifies = sum(s.decode_forwards for s in stats), sum(s.verify_forwards for s in stats)
    columns = range(block_length)
    histogram = [sum(s.acceptance_histogram[i] for s in stats if i < len(s.acceptance_histogram)) for i in columns]
    result = {
        "outputs": len(outputs),
        "tokens_per_forward": round(sum(s.committed for s in stats) / forwards, 3) if forwards else None,
        "tokens_per_verify": round(1 + sum(s.accepted for s in stats) / verifies, 3) if verifies else None,
        "tokens_per_verify_error": standard_error([(s.accepted, s.verify_forwards) for s in stats]),
        "acceptance_histogram": histogram,
        "acceptance_by_position": acceptance_by_position(histogram),
    }
    if mixed := sum(s.mixed for s in stats):
        for name in ("kl", "total_variation"):
            result[name] = round(sum(getattr(s, name) * s.mixed for s in stats if s.mixed) / mixed, 4)
    return result


def generation(model: ZayaForCausalLM, prompts: list[list[int]], params: SamplingParams) -> dict:
    outputs, B = model.generate(prompts, params), model.config.block_length
    looping = [output for output in outputs if loops(output.token_ids)]
    rest = [output for output in outputs if not loops(output.token_ids)]
    return {name: summary(o, B) for name, o in (("not_looping", rest), ("looping", looping), ("all", outputs))}


def own_text(model: ZayaForCausalLM, prompts: list[list[int]], params: SamplingParams) -> dict:
    """By temperature: mask drafts, n-gram drafts, and mask drafts under mixed laws."""
    result = {}
    for name, temperature in tqdm(TEMPERATURES.items(), "own text"):
        law = replace(params, temperature=temperature)
        drafters: dict[str, str | Drafter] = {"mask": "mask", "ngram": ngram_drafter}
        result[name] = {key: generation(model, prompts, replace(law, drafter=d)) for key, d in drafters.items()}
        for mix in MIXES if temperature < 1 else ():
            mixed = replace(law, drafter="mask", sampler="mixed", mix=mix)
            result[name][f"mix {mix}"] = generation(model, prompts, mixed)
    return result


def leading(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def true_text(
    model: ZayaForCausalLM,
    windows: list[list[int]],
    step: int,
    drafter: str | Drafter = "mask",
    temperature: float = 0.0,
) -> dict:
    """First forward after each true prefix. Mask drafts were made before the anchor was known, a callable's after; a
    forward without drafts accepts none."""
    cuts = [(ids, at) for ids in windows for at in range(32, len(ids) - 17, step)]
    params = SamplingParams(max_tokens=17, ignore_eos=True, drafter=drafter, groups=0, temperature=temperature, seed=0)
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
    histogram = [own.count(a) for a in range(model.config.block_length)]
    return {
        "prefixes": len(own),
        "tokens_per_verify": mean(own),
        "acceptance_by_position": acceptance_by_position(histogram),
        "drafts_equal_to_text": mean(right),
        "drafts_equal_to_text_where_the_next_token_was_right": mean(after_right),
    }


@torch.no_grad()
def experts(folder: Path, texts: list[list[int]], first: int) -> dict:
    """Distinct experts by layer that the rows of a block touch, means: as many texts at one position ("ar"), tokens one
    behind the other ("verify"), masks ("mask"); positions from `first` on. And the largest share of an expert."""
    model = convert.load(folder)
    B, E = model.config.block_length, model.config.num_experts
    T, first = len(texts[0]) // B * B, first // B * B
    tokens = torch.tensor([ids[:T] for ids in texts[: len(texts) // B * B]])
    batch = convert.doubled_batch(tokens, model.config)
    model(batch.input_ids, batch.rows, batch.previous)
    result: dict[str, dict] = {}
    for layer in model.model.layers:
        clean, masks = layer.mlp.chosen.split(T, 1)  # [texts, T]
        clean, masks = clean[:, first:], masks[:, first:]
        groups = {
            "ar": clean.unflatten(0, (-1, B)).transpose(1, 2).reshape(-1, B),
            "verify": clean.reshape(-1, B),
            "mask": masks.reshape(-1, B),
        }
        for name, chosen in groups.items():
            distinct = torch.nn.functional.one_hot(chosen, E + 1).amax(1)[:, :E].sum(-1)  # [groups]
            load = chosen.flatten().bincount(minlength=E + 1)
            row = result.setdefault(name, {"distinct": [], "largest_share": [], "histogram": [0] * (B + 1)})
            row["distinct"].append(round(distinct.float().mean().item(), 2))
            row["largest_share"].append(round((load.max() / load.sum()).item(), 3))
            counts = distinct.bincount(minlength=B + 1).tolist()
            row["histogram"] = [a + b for a, b in zip(row["histogram"], counts, strict=True)]
    return result | {"experts": E, "uniform": round(E * (1 - (1 - 1 / E) ** B), 2)}


def evaluate(args: argparse.Namespace) -> dict:
    model = ZayaForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), max_batch_size=32)
    texts = [text for _, text in data.split(args.max_bytes)[1]]
    prompts = pieces(model.tokenizer, texts, args.prompts, args.prompt_length)
    windows = pieces(model.tokenizer, texts, max(4, args.prompts // 4), 448)
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True, seed=0, groups=0)
    sampled = model.generate(prompts, replace(params, sampler="ar", temperature=0.7))
    written = [output.prompt_token_ids + output.token_ids for output in sampled]
    return {
        "bits_per_byte": round(bits_per_byte(model, windows), 4),
        "own_text": own_text(model, prompts, params),
        "true_text": {"mask": true_text(model, windows, 24), "ngram": true_text(model, windows, 24, ngram_drafter)},
        "experts": experts(args.model, written, args.prompt_length),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=bundled_model())
    parser.add_argument("--prompts", type=int, default=100, help="at least as many as a block has rows")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--max-bytes", type=int, help="of the text, as in train.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for acceptance.svg, mixing.svg, experts.svg")
    args = parser.parse_args(argv)
    result = evaluate(args)
    print(json.dumps(result, indent=1) if args.json is None else f"{result['bits_per_byte']} bits per byte")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plots:
        from plots import plot

        plot(result, args.plots)


if __name__ == "__main__":
    main()
