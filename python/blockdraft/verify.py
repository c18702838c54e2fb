"""`blockdraft verify`: whether block decoding gives on this machine, with this model, what plain decoding gives.

Tokens: plain decoding against blocks, whatever drafts them. Bits: a row's logits alone and in company. Law: draws of
the rejection rule against exact probabilities, by a G-test. What is found is a statement about the tokens, rows and
samples that were compared; the report says how many.
"""

import argparse
import json
import random
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import blockdraft
from blockdraft import info
from blockdraft.cache import Cache, CachedSequence
from blockdraft.errors import RequestError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.zaya import DTYPES, Prompt, ZayaForCausalLM
from blockdraft.outputs import GenerationOutput
from blockdraft.passk.prompts import check_records, read_records
from blockdraft.sampler import SamplingParams
from blockdraft.steps import Block, Group, make_step

TokenPath = tuple[int, ...]
OTHER = -1  # in a cell of a law: any token that is too rare for a cell of its own

BUILT_IN = "built-in"
PROMPTS = (
    "def read_lines(path):\n",
    "class Cache:\n    def __init__(self, size):\n        self.size = size\n",
    "import os\nimport sys\n\n\ndef main():\n",
    'def test_parse():\n    """Numbers and strings."""\n    assert parse("1") == 1\n    assert parse("2") == ',
    "for name, value in sorted(items.items()):\n    if name in",
    "# Copyright (c) the authors\n#\n# Licensed under",
    "    try:\n        return self._values[key]\n    except KeyError:\n",
    "import asyncio\n\n\nasync def fetch(session, url):\n    async with session.get(url) as response:\n",
)
LAWS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.7, "top_p": 0.9}}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"
DIFFERENT = 1  # exit status
KEPT_DRAFTS = 0.7  # of the random drafter: accept lengths of all kinds occur
# A law is wrong below the first level; between the two four times as many fresh draws decide, by the second. A right
# one fails with probability 6e-6.
WRONG, SUSPECT, MORE = 5e-6, 1e-3, 4
LEAST_EXPECTED = 5.0  # draws of a cell of the G-test
EXPANDED = 40.0  # expected draws of a token from which on the law of the one after it is looked at, too
LAW_TOKENS = 4  # the first is decided by the prompt, then come two drafts and the token after them
LAW_CONTEXTS: tuple[dict[str, Any], ...] = ({"temperature": 1.0, "top_p": 1.0}, {"temperature": 0.7, "top_p": 0.9})
LAW_DRAFTERS = ("none", "mask", "fixed")


@dataclass
class Check:
    """One line of the report.

    Attributes:
        kind: "tokens", "bits" or "law".
        name, dtype: What was compared.
        status: "ok", "FAILED" or "skipped".
        compared, unit: How much of what.
        note: In words: how drafts fared, a p-value, or why it was skipped.
        facts: The same as numbers.
        differences: The first difference of each output that has one, for tokens; of each sequence, for bits.
    """

    kind: str
    name: str
    dtype: str
    status: str
    compared: int = 0
    unit: str = ""
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    differences: list[dict[str, Any]] = field(default_factory=list)


# Tokens


@dataclass(frozen=True)
class Setting:
    """A way to decode. `drafter` is one of SamplingParams or "random"; mask groups concern mask drafts alone."""

    name: str
    drafter: str
    groups: int | None = 0
    verification: str = "gumbel"

    def unavailable(self, config: ZayaConfig) -> str:
        """Why a checkpoint cannot be decoded so; empty where it can."""
        if self.drafter == "mask" and config.mask_token_id is None:
            return "the checkpoint has no mask_token_id"
        if self.drafter == "mask" and self.groups and config.draft_layout == "anchor_in_block":
            return "draft_layout 'anchor_in_block' has no mask groups"
        return ""


SETTINGS = (
    Setting("plain", "none"),
    Setting("mask, groups 0", "mask", 0),
    Setting("mask, groups 1", "mask", 1),
    Setting("mask, groups 3", "mask", 3),
    Setting("mask, planned", "mask", None),
    Setting("mask, match", "mask", 1, "match"),
    Setting("ngram", "ngram"),
    Setting("auto", "auto", None),
    Setting("random", "random"),
)


@dataclass(frozen=True)
class Case:
    """A prompt (its number), a law of LAWS, a seed."""

    prompt: int
    law: str
    seed: int


@dataclass(frozen=True)
class RandomDrafter:
    """A drafter(token_ids, count) that proposes plain decoding's own tokens, any number of them, and some replaced.

    Attributes:
        token_ids: Prompt and tokens of plain decoding.
    """

    token_ids: list[int]
    vocab_size: int

    def __call__(self, known: list[int], count: int) -> list[int]:
        rng = random.Random(len(known))
        right = self.token_ids[len(known) :][: rng.randint(1, count)]
        return [token if rng.random() < KEPT_DRAFTS else rng.randrange(self.vocab_size) for token in right]


class Comparison:
    """Plain decoding of some cases, one at a time, and what is held against it.

    Args:
        prompts: Token ids.
        seeds: Of the sampled law: 0 to seeds - 1.
    """

    def __init__(self, model: ZayaForCausalLM, prompts: list[list[int]], seeds: int, max_tokens: int) -> None:
        self.model, self.prompts, self.max_tokens = model, prompts, max_tokens
        self.dtype = dtype_name(model)
        self.cases = [
            Case(prompt, law, seed)
            for prompt in range(len(prompts))
            for law in LAWS
            for seed in range(seeds if LAWS[law]["temperature"] else 1)
        ]

    @cached_property
    def plain(self) -> dict[Case, list[int]]:
        base = SamplingParams(max_tokens=self.max_tokens, sampler="ar", ignore_eos=True)
        return {c: self._alone(c, replace(base, seed=c.seed, **LAWS[c.law])).token_ids for c in self.cases}

    def _alone(self, case: Case, params: SamplingParams) -> GenerationOutput:
        return self.model.generate(self.prompts[case.prompt], params)[0]

    def params(self, case: Case, setting: Setting) -> SamplingParams:
        drafter: Any = setting.drafter
        if drafter == "random":
            known = self.prompts[case.prompt] + self.plain[case]
            drafter = RandomDrafter(known, self.model.config.vocab_size)
        return SamplingParams(
            max_tokens=self.max_tokens,
            seed=case.seed,
            ignore_eos=True,
            drafter=drafter,
            groups=setting.groups,
            verification=setting.verification,
            **LAWS[case.law],
        )

    def checks(self, settings: Sequence[Setting] = SETTINGS) -> Iterator[Check]:
        """Each setting one case at a time, then all cases of all settings in batches, in a random order."""
        reasons = {setting: setting.unavailable(self.model.config) for setting in settings}
        runs = [setting for setting in settings if not reasons[setting]]
        for setting in settings:
            if reasons[setting]:
                yield Check("tokens", setting.name, self.dtype, SKIPPED, note=reasons[setting])
            elif setting.drafter != "none":  # plain decoding, alone, is what all is held against
                outputs = [self._alone(case, self.params(case, setting)) for case in self.cases]
                yield self._check(f"{setting.name}, alone", self.cases, outputs)
        requests = [(setting, case) for setting in runs for case in self.cases]
        random.Random(0).shuffle(requests)
        prompts: list[Prompt] = [self.prompts[case.prompt] for _, case in requests]
        outputs = self.model.generate(prompts, [self.params(case, setting) for setting, case in requests])
        for setting in runs:
            own = [(case, out) for (s, case), out in zip(requests, outputs, strict=True) if s is setting]
            yield self._check(f"{setting.name}, in a batch", [c for c, _ in own], [out for _, out in own])

    def _check(self, name: str, cases: Sequence[Case], outputs: list[GenerationOutput]) -> Check:
        differences = [
            self._difference(case, output.token_ids)
            for case, output in zip(cases, outputs, strict=True)
            if output.token_ids != self.plain[case]
        ]
        drafted, accepted = (sum(getattr(o.stats, what) for o in outputs) for what in ("drafted", "accepted"))
        facts = {"outputs": len(outputs), "drafted": drafted, "accepted": accepted, "different": len(differences)}
        note = f"{accepted} of {drafted} drafts held" if drafted else "no drafts"
        if differences:
            note = f"{len(differences)} of {len(outputs)} outputs differ; {note}"
        tokens, status = sum(len(self.plain[case]) for case in cases), FAILED if differences else OK
        return Check("tokens", name, self.dtype, status, tokens, "tokens", note, facts, differences)

    def _difference(self, case: Case, tokens: list[int]) -> dict[str, Any]:
        """Where an output first differs, and how sure plain decoding was there."""
        prompt, plain = self.prompts[case.prompt], self.plain[case]
        pairs = enumerate(zip(plain, tokens, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(plain), len(tokens)))
        logits = self.model.logits(torch.tensor([prompt + plain[:at]]))[0, -1]
        best = logits.topk(2)
        return {
            **asdict(case),
            "prompt_token_ids": prompt,
            "prompt_text": text_of(self.model, prompt),
            "position": at,
            "ar_token": token_at(plain, at),
            "ar_text": text_of(self.model, plain[at : at + 1]),
            "block_token": token_at(tokens, at),
            "block_text": text_of(self.model, tokens[at : at + 1]),
            "top2_tokens": best.indices.tolist(),
            "top2_margin": float(best.values[0] - best.values[1]),
        }


def token_at(tokens: list[int], i: int) -> int | None:
    return tokens[i] if i < len(tokens) else None


def text_of(model: ZayaForCausalLM, tokens: list[int]) -> str | None:
    return model.tokenizer.decode(tokens) if model.tokenizer else None


def dtype_name(model: ZayaForCausalLM) -> str:
    return str(model.dtype).removeprefix("torch.")


# Bits


@torch.inference_mode()
def forward(
    model: ZayaForCausalLM,
    cache: Cache,
    parts: list[tuple[CachedSequence, list[int]]],
    groups: Sequence[Group] = (),
) -> list[Tensor]:
    """Logits ``[n, V]`` of each sequence's next n tokens, which are committed; `groups` draft beside each of them."""
    blocks = [Block(s.length, s.slot, s.pages, tokens, groups) for s, tokens in parts]
    step = make_step(blocks, cache.page_size, model.config.mask_parent).to(model.device)
    transaction = cache.begin(step, [sequence for sequence, _ in parts])
    logits = model.decoder.lm_head(model.decoder(transaction), out_float32=True).cpu()
    counts, firsts = [len(tokens) for _, tokens in parts], step.cu_rows[:-1].tolist()
    last = [first + count - 1 for first, count in zip(firsts, counts, strict=True)]
    transaction.commit(counts, torch.tensor(last, dtype=torch.int32, device=model.device))
    return [logits[first : first + count] for first, count in zip(firsts, counts, strict=True)]


def logits_together(model: ZayaForCausalLM, sequences: list[list[int]]) -> list[Tensor]:
    """All sequences in one forward."""
    cache = model.new_cache(sum(map(len, sequences)), len(sequences))
    return forward(model, cache, [(cache.allocate(len(tokens)), tokens) for tokens in sequences])


def logits_in_blocks(model: ZayaForCausalLM, tokens: list[int], size: int, groups: Sequence[Group] = ()) -> Tensor:
    """`size` rows a forward."""
    cache = model.new_cache(len(tokens), 1)
    sequence = cache.allocate(len(tokens))
    chunks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return torch.cat([forward(model, cache, [(sequence, chunk)], groups)[0] for chunk in chunks])


def mask_groups(config: ZayaConfig) -> list[Group]:
    """One after the first row of a block, which every block has; none without a mask token."""
    mask = config.mask_token_id
    return [] if mask is None else [Group(0, [mask] * config.block_length)]


def logits_of_one_thread(model: ZayaForCausalLM, tokens: list[int]) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return model.logits(torch.tensor([tokens]))[0]
    finally:
        torch.set_num_threads(threads)


def bit_checks(model: ZayaForCausalLM, sequences: list[list[int]]) -> Iterator[Check]:
    """The logits of each row of some sequences, teacher-forced alone and in four kinds of company."""
    alone = [model.logits(torch.tensor([tokens]))[0] for tokens in sequences]
    block_length, groups = model.config.block_length, mask_groups(model.config)
    beside = " beside mask rows" if groups else ""
    company: dict[str, Callable[[], list[Tensor]]] = {
        f"{len(sequences)} sequences in one forward": lambda: logits_together(model, sequences),
        "a row a forward": lambda: [logits_in_blocks(model, tokens, 1) for tokens in sequences],
        f"{block_length} rows{beside}": lambda: [
            logits_in_blocks(model, tokens, block_length, groups) for tokens in sequences
        ],
    }
    if torch.get_num_threads() > 1:
        company["one thread"] = lambda: [logits_of_one_thread(model, tokens) for tokens in sequences]
    for name, compute in company.items():
        yield bit_check(name, dtype_name(model), alone, compute())


def bit_check(name: str, dtype: str, alone: list[Tensor], company: list[Tensor]) -> Check:
    """Both: ``[n, V]`` float32 of each sequence. NaN is never right."""
    differences, rows = [], sum(map(len, alone))
    for i, (a, b) in enumerate(zip(alone, company, strict=True)):
        wrong = (a != b).any(-1).nonzero()[:, 0].tolist()
        if wrong:
            largest = finite(float((a - b).abs().max()))
            differences.append({"sequence": i, "rows": len(wrong), "first_row": wrong[0], "largest": largest})
    different = sum(difference["rows"] for difference in differences)
    note = f"{different} of {rows} rows differ" if differences else "same bits"
    status = FAILED if differences else OK
    return Check("bits", name, dtype, status, rows, "rows", note, {"different": different}, differences)


# Law


@dataclass(frozen=True)
class GTest:
    """A G-test: `statistic` over `cells` cells; p is 0 where `impossible` draws had no probability."""

    statistic: float
    cells: int
    p: float
    impossible: int = 0


def g_test(counts: Sequence[int], probabilities: Sequence[float]) -> GTest:
    """Likelihood ratio of counts against probabilities, with Williams' correction; p by the chi-squared law.

    Cells with less than five expected draws are pooled, as one that joins the smallest other where it stays too small.

    Raises:
        ValueError: Probabilities do not sum to 1.
    """
    if abs(sum(probabilities) - 1) > 1e-6:
        raise ValueError(f"probabilities must sum to 1, got {sum(probabilities)}")
    impossible = sum(count for count, p in zip(counts, probabilities, strict=True) if p == 0)
    if impossible:
        return GTest(float("inf"), len(counts), 0.0, impossible)
    n = sum(counts)
    observed, expected = pooled(counts, [n * p for p in probabilities])
    k = len(expected)
    if k < 2:
        return GTest(0.0, k, 1.0)
    G = 2 * float(torch.special.xlogy(observed, observed / expected).sum())
    G /= 1 + (float((n / expected).sum()) - 1) / (6 * n * (k - 1))
    halves = torch.tensor([(k - 1) / 2, max(G, 0.0) / 2], dtype=torch.float64)
    return GTest(G, k, float(torch.special.gammaincc(halves[0], halves[1])))


def pooled(counts: Sequence[int], expected: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Observed and expected draws, float64, in cells of at least five expected ones where the draws suffice."""
    cells = sorted(zip(expected, counts, strict=True), reverse=True)
    large = [cell for cell in cells if cell[0] >= LEAST_EXPECTED]
    rest = [cell for cell in cells if 0 < cell[0] < LEAST_EXPECTED]
    if rest:
        large.append((sum(e for e, _ in rest), sum(count for _, count in rest)))
        if large[-1][0] < LEAST_EXPECTED and len(large) > 1:
            (e1, n1), (e2, n2) = large[-2:]
            large[-2:] = [(e1 + e2, n1 + n2)]
    columns = torch.tensor(large, dtype=torch.float64).reshape(-1, 2)
    return columns[:, 1], columns[:, 0]


def exact_law(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Probabilities ``[V]``, float64: softmax at the temperature, of it the fewest ids that have top_p together."""
    law = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered = law.sort(descending=True).values
        last = min(int((ordered.cumsum(-1) < top_p).sum()), len(law) - 1)
        law = law.where(law >= ordered[last], 0.0)
    return law / law.sum()


class LawTree:
    """Exact law of the next tokens as far as `samples` draws can tell: a token's successors where it is frequent.

    Args:
        law: Gives the probabilities ``[V]`` after these tokens.
    """

    def __init__(self, law: Callable[[TokenPath], Tensor], samples: int, length: int) -> None:
        self.law, self.samples, self.length = law, samples, length
        self.laws: dict[TokenPath, Tensor] = {}
        self.cells: dict[TokenPath, float] = {}
        self._expand((), 1.0)

    def _expand(self, path: TokenPath, probability: float) -> None:
        self.laws[path] = probabilities = self.law(path)
        frequent = (probability * probabilities * self.samples >= LEAST_EXPECTED).nonzero()[:, 0].tolist()
        for token in frequent:
            reached = probability * float(probabilities[token])
            if reached * self.samples >= EXPANDED and len(path) + 1 < self.length:
                self._expand((*path, token), reached)
            else:
                self.cells[*path, token] = reached
        rest = probabilities.clone()
        rest[frequent] = 0
        self.cells[*path, OTHER] = probability * float(rest.sum())

    def cell(self, tokens: Sequence[int]) -> TokenPath | None:
        """Where these tokens belong; None where they have no probability."""
        path: TokenPath = ()
        for token in tokens:
            if self.laws[path][token] == 0:
                return None
            if (*path, token) in self.cells:
                return (*path, token)
            if (*path, token) not in self.laws:
                return (*path, OTHER)
            path = (*path, token)
        raise ValueError(f"must be at least {self.length} tokens, got {len(tokens)}")

    def test(self, draws: Iterable[Sequence[int]]) -> GTest:
        counts = Counter(self.cell(tokens) for tokens in draws)
        impossible = counts.pop(None, 0)
        result = g_test([counts[cell] for cell in self.cells], list(self.cells.values()))
        return result if not impossible else replace(result, p=0.0, impossible=impossible)


@dataclass
class LawCheck:
    """Draws of the first tokens after a prompt, against their exact law.

    Attributes:
        drafter: "none" (plain decoding), "mask", or "fixed": plain decoding's greedy tokens, as point masses.
    """

    model: ZayaForCausalLM
    prompt: list[int]
    drafter: str
    temperature: float
    top_p: float
    samples: int

    def law(self, path: TokenPath) -> Tensor:
        logits = self.model.logits(torch.tensor([self.prompt + list(path)]))[0, -1]
        return exact_law(logits, self.temperature, self.top_p)

    def draw(self, samples: int, seed: int) -> list[GenerationOutput]:
        params = SamplingParams(
            max_tokens=LAW_TOKENS,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            n=samples,
            ignore_eos=True,
            verification="rejection",
            drafter=self._drafter(),
            groups=0,
        )
        return self.model.generate(self.prompt, params)

    def _drafter(self) -> Any:
        if self.drafter != "fixed":
            return self.drafter
        params = SamplingParams(max_tokens=LAW_TOKENS, sampler="ar", ignore_eos=True)
        known = self.prompt + self.model.generate(self.prompt, params)[0].token_ids
        return lambda token_ids, count: known[len(token_ids) :][:count]

    def run(self, seed: int = 0) -> Check:
        result, facts = self._test(self.samples, seed)
        limit = WRONG
        if WRONG <= result.p < SUSPECT:
            first = result.p
            result, facts = self._test(MORE * self.samples, seed + 1)
            facts, limit = {**facts, "first_p": first, "samples": (1 + MORE) * self.samples}, SUSPECT
        untested = self.drafter != "none" and facts["drafted"] == 0
        note = f"p = {result.p:.2g} over {result.cells} cells"
        if self.drafter != "none":
            note += f"; {facts['accepted']} of {facts['drafted']} drafts held"
        if untested:
            note = f"no draft was tested; {note}"
        if result.impossible:
            note = f"{result.impossible} draws have no probability; {note}"
        status = FAILED if result.p < limit or untested else OK
        facts = {**facts, **asdict(result), "statistic": finite(result.statistic), "limit": limit}
        return Check("law", self.name, dtype_name(self.model), status, facts["samples"], "samples", note, facts)

    @property
    def name(self) -> str:
        rule = "plain decoding" if self.drafter == "none" else f"rejection, {self.drafter} drafts"
        return f"{rule}, T {self.temperature:g}" + (f", top-p {self.top_p:g}" if self.top_p < 1 else "")

    def _test(self, samples: int, seed: int) -> tuple[GTest, dict[str, Any]]:
        outputs = self.draw(samples, seed)
        result = LawTree(self.law, samples, LAW_TOKENS).test(output.token_ids for output in outputs)
        drafted, accepted = (sum(getattr(o.stats, what) for o in outputs) for what in ("drafted", "accepted"))
        return result, {"samples": samples, "drafted": drafted, "accepted": accepted, "prompt": self.prompt}


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if value < float("inf") else None


def telling_prefix(model: ZayaForCausalLM, tokens: list[int]) -> list[int]:
    """The beginning of a text after which the draws say most: its next token is likely, the one after it is open.

    A draft is tested at the second token at the earliest, and what comes after a rare first one cannot be counted.
    """
    log_p = model.logits(torch.tensor([tokens]))[0].double().log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    next_token = log_p[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return tokens[: 1 + int((next_token.exp() * entropies[1:]).argmax())]


def law_checks(model: ZayaForCausalLM, sequences: list[list[int]], samples: int) -> Iterator[Check]:
    """Each kind of drafter after parts of two texts, with a plain and a truncated law."""
    for i, law in enumerate(LAW_CONTEXTS):
        prompt = telling_prefix(model, sequences[i % len(sequences)])
        for drafter in LAW_DRAFTERS:
            check = LawCheck(model, prompt, drafter, law["temperature"], law["top_p"], samples)
            if drafter == "mask" and model.config.mask_token_id is None:
                reason = Setting("", "mask").unavailable(model.config)
                yield Check("law", check.name, dtype_name(model), SKIPPED, note=reason)
            else:
                yield check.run()


# Report


def load_prompts(model: ZayaForCausalLM, prompts: str, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts of a JSONL file, or of the built-in ones.

    A checkpoint without a tokenizer gets random token ids in place of built-in text.
    """
    if prompts != BUILT_IN:
        records = check_records(model, read_records(prompts))
        return [model.encode(record["prompt"]) for record in records[:count]]
    if model.tokenizer is not None:
        return [model.encode(text) for text in PROMPTS[:count]]
    rng = random.Random(0)
    return [[rng.randrange(model.config.vocab_size) for _ in range(8 + 4 * i)] for i in range(min(count, len(PROMPTS)))]


def all_checks(model: ZayaForCausalLM, args: argparse.Namespace) -> Iterator[Check]:
    prompts = load_prompts(model, args.prompts, args.count)
    comparison = Comparison(model, prompts, args.seeds, args.max_tokens)
    yield from comparison.checks()
    greedy = [prompts[case.prompt] + tokens for case, tokens in comparison.plain.items() if case.law == "greedy"]
    yield from bit_checks(model, greedy)
    if args.samples:
        yield from law_checks(model, greedy, args.samples)


def shape(config: ZayaConfig) -> dict[str, Any]:
    names = (
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts"),
        *("moe_intermediate_size", "vocab_size", "block_length", "mask_token_id", "draft_layout", "mask_parent"),
    )
    return {name: getattr(config, name) for name in names}


def heading(report: dict[str, Any]) -> str:
    asked = report["arguments"]
    machine = {name: value for name, value in report["machine"].items() if name != "libraries"}
    sizes = ", ".join(f"{name} {value}" for name, value in report["shape"].items())
    sizes = textwrap.fill(sizes, 104, subsequent_indent=" " * 16)
    counts = f"{asked['seeds']} seeds, {asked['max_tokens']} tokens, {asked['samples']} samples of a law"
    return "\n".join(
        [
            info.as_text({**machine, "libraries": {}}),
            f"{'model':<15} {report['model']}",
            f"{'shape':<15} {sizes}",
            f"{'prompts':<15} {asked['prompts']}, at most {asked['count']}; {counts}",
            "",
            f"{'':<8}{'':<43}{'dtype':<10}{'compared':>15}  result",
        ]
    )


def as_row(check: Check) -> str:
    compared = f"{check.compared:,} {check.unit}" if check.unit else "-"
    row = f"{check.kind:<8}{check.name:<43}{check.dtype:<10}{compared:>15}  {check.status:<8}{check.note}"
    return "\n".join([row.rstrip(), *(f"        {line}" for line in first_difference(check))])


def first_difference(check: Check) -> list[str]:
    if not check.differences:
        return []
    d = check.differences[0]
    if check.kind == "bits":
        return [f"first: sequence {d['sequence']}, row {d['first_row']}; largest difference {d['largest']}"]
    ar, block = (f"{d[f'{name}_token']} {d[f'{name}_text']!r}" for name in ("ar", "block"))
    return [
        f"first: prompt {d['prompt']} {d['prompt_text']!r}, {d['law']}, seed {d['seed']}",
        f"position {d['position']}: plain {ar}, by blocks {block}; top-2 margin of plain logits {d['top2_margin']:.3g}",
    ]


def summary(checks: Sequence[Check]) -> dict[str, Any]:
    compared = {unit: sum(c.compared for c in checks if c.unit == unit) for unit in ("tokens", "rows", "samples")}
    statuses = Counter(check.status for check in checks)
    return {"compared": compared, **{status: statuses[status] for status in (OK, FAILED, SKIPPED)}}


def closing(report: dict[str, Any]) -> str:
    counts, done = report["summary"]["compared"], report["summary"]
    verdict = "Something differs." if done[FAILED] else "No difference was found."
    return (
        f"\n{verdict} {done[OK]} ok, {done[FAILED]} FAILED, {done[SKIPPED]} skipped, in {report['seconds']:.0f} s.\n"
        f"Compared: {counts['tokens']:,} tokens, {counts['rows']:,} rows of logits, {counts['samples']:,} samples. "
        "This is a\nstatement about these on this machine, not about all."
    )


def run(args: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Performs the checks in every dtype and shows them as they come; JSON-ready, docs/verify.md has the keys."""
    started = time.perf_counter()
    checks: list[Check] = []
    asked = {name: getattr(args, name) for name in ("prompts", "count", "seeds", "max_tokens", "samples", "dtypes")}
    report: dict[str, Any] = {"machine": info.collect(), "model": args.model or "bundled", "arguments": asked}
    for dtype in args.dtypes:
        model = ZayaForCausalLM.from_pretrained(
            args.model or blockdraft.bundled_model(),
            dtype=DTYPE_NAMES[dtype],
            mask_token_id=args.mask_token_id,
            progress=args.model is not None,
        )
        if not checks:
            report["shape"] = shape(model.config)
            show(heading(report))
        for check in all_checks(model, args):
            checks.append(check)
            show(as_row(check))
    report |= {"checks": [asdict(check) for check in checks], "summary": summary(checks)}
    report |= {"ok": not report["summary"][FAILED], "seconds": time.perf_counter() - started}
    show(closing(report))
    return report


def dtype_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in DTYPE_NAMES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(DTYPE_NAMES)}, got {name!r}")
    return list(dict.fromkeys(names))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `blockdraft verify`."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder or hub id (default: the bundled model)")
    add("--mask-token-id", type=int, metavar="ID", help="where config.json does not give one")
    add("--threads", type=int, metavar="N", help="default: torch's choice")
    prompts = 'lines {"prompt": text or token ids}, or built-in (the default)'
    add("--prompts", default=BUILT_IN, metavar="FILE.jsonl", help=prompts)
    add("--count", type=int, default=4, metavar="N", help="prompts at most; default: %(default)s")
    add("--seeds", type=int, default=2, metavar="S", help="of sampled decoding; default: %(default)s")
    add("--max-tokens", type=int, default=32, metavar="N", help="of an output; default: %(default)s")
    add("--samples", type=int, default=1024, metavar="N", help="of a law, 0 for none; default: %(default)s")
    default = ["float32", "bfloat16"]
    add("--dtypes", type=dtype_names, default=default, metavar="D,...", help="default: " + ",".join(default))
    add("--json", action="store_true", help="one object on standard output")
    add("--out", type=Path, metavar="FILE", help="write that object")


def check_arguments(args: argparse.Namespace) -> None:
    for name, least, most in (
        ("count", 1, 1 << 20),
        ("seeds", 1, 1 << 20),
        ("max_tokens", 1, 1 << 20),
        ("samples", 0, 1 << 17),  # four times as many are a repetition's, and a request has at most 2^20
    ):
        value = getattr(args, name)
        if not least <= value <= most:
            raise RequestError(f"--{name.replace('_', '-')} must be from {least} to {most}, got {value}")
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise RequestError(f"--threads must be from 1 to 1024, got {args.threads}")


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise RequestError(f"--out {path}: {error.strerror}") from None


def main(args: argparse.Namespace) -> int:
    """Verifies and prints. 0: no difference, 1: something differs. Raises RequestError for bad arguments."""
    check_arguments(args)
    if args.out:
        write(args.out, "")  # rather before the run than after it
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report = run(args, lambda text: None if args.json else print(text, flush=True))
    text = json.dumps(report, indent=1)
    if args.json:
        print(text)
    if args.out:
        write(args.out, text)
    return 0 if report["ok"] else DIFFERENT
