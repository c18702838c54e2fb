"""Tokens per second of every way to decode the bundled model, beside plain decoding in the same run.

    python bench/decoding.py [--threads 2] [--batches 1,8] [--json FILE] [--plot FILE.svg]

Greedy and at temperature 0.8, bfloat16, prompts of 128 tokens from held-out files, 96 new tokens. All sides decode the
same prompts, by turns at every batch, each time in another order; medians over the rounds, of ratios as well. A batch
of n gets n times the rounds, so that each setting is measured for as long. The planner has a table measured at the
start of this run. "useless drafts": a wrong mask token, so that the mask rows guess nothing right. "match": the
tokens of plain decoding. "planner" is the default: drafts of mask rows and of n-grams, whichever is worth more; its
rows with a drafter named leave it that one.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import blockdraft
from blockdraft import SamplingParams, ZayaForCausalLM, bundled_model, calibrate
from blockdraft.plan import Planner

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "nano"))

SIDES = {
    "ar": {"sampler": "ar"},
    "R=0": {"drafter": "mask", "groups": 0},
    "R=1": {"drafter": "mask", "groups": 1},
    "R=3": {"drafter": "mask", "groups": 3},
    "R=16": {"drafter": "mask", "groups": 16},
    "planner": {},
    "mask, planner": {"drafter": "mask"},
    "ngram": {"drafter": "ngram", "groups": 0},
    "ngram, planner": {"drafter": "ngram"},
}
LAWS = {"greedy": {"temperature": 0.0}, "T=0.8": {"temperature": 0.8}}
WRONG_MASK = 7  # an ordinary byte of the vocabulary


class Side:
    """One way to decode: seconds of each round, and what came out."""

    def __init__(self, name: str, model: ZayaForCausalLM, params: SamplingParams) -> None:
        self.name, self.model, self.params = name, model, params
        self.seconds: list[float] = []
        self.outputs: list = []

    def start_round(self) -> None:
        self.seconds.append(0.0)
        self.outputs = []

    def decode(self, prompts: list[list[int]]) -> None:
        started = time.perf_counter()
        self.outputs += self.model.generate(prompts, self.params)
        self.seconds[-1] += time.perf_counter() - started

    def result(self, plain: "Side") -> dict:
        stats = [o.stats for o in self.outputs]
        plans: dict[str, int] = {}
        for s in stats:
            for name, count in s.plan.items():
                plans[name] = plans.get(name, 0) + count
        tokens, seconds = sum(len(o.token_ids) for o in self.outputs), statistics.median(self.seconds[1:])
        ratios = [p / s for p, s in zip(plain.seconds[1:], self.seconds[1:], strict=True)]
        return {
            "side": self.name,
            "tokens_per_second": round(tokens / seconds, 1),
            "times_ar": round(statistics.median(ratios), 3),
            "times_ar_lowest_highest": [round(min(ratios), 3), round(max(ratios), 3)],
            "tokens_per_forward": round(sum(s.committed for s in stats) / sum(s.decode_forwards for s in stats), 3),
            "match": [o.token_ids for o in self.outputs] == [o.token_ids for o in plain.outputs],
            "plans": plans,
        }


def compare(
    models: dict[str, ZayaForCausalLM], prompts: list[list[int]], law: dict, batch: int, tokens: int, rounds: int
) -> list[dict]:
    """All sides of one setting. They take turns at every batch, so that a slow second of the machine hits all."""
    base = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0, **law)
    sides = [Side(name, models["right"], replace(base, **changes)) for name, changes in SIDES.items()]
    sides.append(Side("useless drafts, R=0", models["wrong"], replace(base, groups=0)))
    sides.append(Side("useless drafts, planner", models["wrong"], replace(base, drafter="mask")))
    order = random.Random(0)  # in a fixed order the same side, twice in a round, differed from itself by 2%
    for _ in range(rounds * batch + 1):  # the first round warms up, and lets the planner see what it has not seen
        for side in sides:
            side.start_round()
        for first in range(0, len(prompts), batch):
            for side in order.sample(sides, len(sides)):
                side.decode(prompts[first : first + batch])
    return [side.result(sides[0]) for side in sides]


def show(result: dict) -> None:
    print(f"\n{result['law']}, batch {result['batch']}\n{'':<26}{'tokens/s':>9}{'x AR':>7}{'per forward':>13}  match")
    for row in result["sides"]:
        match = "yes" if row["match"] else "NO"
        values = f"{row['tokens_per_second']:>9.0f}{row['times_ar']:>7.2f}{row['tokens_per_forward']:>13.2f}"
        print(f"{row['side']:<26}{values}  {match}", flush=True)


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(3.2 * len(results), 3.4), sharey=True)
    for axis, result in zip(axes, results, strict=True):
        sides = [row for row in result["sides"] if row["side"] != "ar"][::-1]
        colors = ["#c2410c" if "planner" in row["side"] else "#64748b" for row in sides]
        axis.barh([row["side"] for row in sides], [row["times_ar"] for row in sides], color=colors)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{result['law']}, batch {result['batch']}", fontsize=9)
        axis.set_xlabel("times plain decoding", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import data
    from evaluate import pieces

    model = ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)
    wrong = ZayaForCausalLM.from_pretrained(bundled_model(), mask_token_id=WRONG_MASK, progress=False)
    costs = calibrate.measure(model, rounds=15)
    for each in (model, wrong):
        each.planner = Planner(costs, each.config.block_length)
    prompts = pieces(model.tokenizer, [text for _, text in data.split()[1]], args.prompts, 128)
    results = []
    for name, law in LAWS.items():
        for batch in map(int, args.batches.split(",")):
            sides = compare({"right": model, "wrong": wrong}, prompts, law, batch, args.tokens, args.rounds)
            results.append({"law": name, "batch": batch, "sides": sides})
            show(results[-1])
    if args.plot:
        plot(results, args.plot)
    if args.json:
        facts = {
            "versions": {"blockdraft": blockdraft.__version__, "torch": torch.__version__},
            "machine": {"cpu": platform.processor() or platform.machine(), "isa": blockdraft.cpu_isa()},
            "threads": args.threads,
            "prompts": args.prompts,
            "tokens": args.tokens,
            "rounds": args.rounds,
            "costs": asdict(costs),
        }
        args.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
