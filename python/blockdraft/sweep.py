"""`blockdraft sweep`: what leaving the lossless law brings and costs: speed against quality, beside plain decoding.

Settings are visited in turns, prompt by prompt, so that a machine that slows down does so for all of them. Each has a
planner of its own: what one learns about drafts must not steer another. Quality is the model's own: the mean plain
log-probability of the emitted tokens, teacher-forced, apart from any time that is measured.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from blockdraft import info
from blockdraft.errors import RequestError
from blockdraft.model.zaya import ZayaForCausalLM
from blockdraft.outputs import GenerationOutput
from blockdraft.plan import Planner
from blockdraft.sampler import SamplingParams
from blockdraft.verify import BUILT_IN, load_prompts

SAMPLERS = ("lossless", "mixed", "denoise")
PLOT_SUFFIXES = (".png", ".svg")
DIFFERENT = 1  # exit status where a lossless setting gives other tokens than plain decoding
WARM_TOKENS = 8
MEASURES = ("tokens_per_second", "tokens_per_forward", "speedup", "logprob", "kl", "total_variation")
HEADINGS = ("sampler", "mix", "T", "block", "tokens/s", "/ AR", "tokens/forward", "logprob", "KL", "TV", "as AR")


@dataclass(frozen=True)
class Setting:
    """A way to decode; `mix` concerns "mixed" alone, `block_length` None is the checkpoint's or, for "ar", none."""

    sampler: str
    temperature: float
    mix: float | None = None
    block_length: int | None = None

    @property
    def lossless(self) -> bool:
        return self.sampler in ("ar", "lossless") or self.mix == 0

    @property
    def name(self) -> str:
        return self.sampler if self.mix is None else f"{self.sampler} {self.mix:g}"


@dataclass(frozen=True)
class Estimate:
    """Mean and standard error; no error where there is one value only."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def shown(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + ("" if self.error is None else f" +- {self.error:{spec}}")


@dataclass(frozen=True)
class Measured:
    """One output. kl and total_variation are means over emitted positions; None where the setting does not mix."""

    token_ids: list[int]
    tokens_per_second: float
    tokens_per_forward: float
    logprob: float
    kl: float | None
    total_variation: float | None


@dataclass
class Row:
    """What a setting gave: ``outputs[prompt][repeat]``, beside plain decoding's at the same temperature."""

    setting: Setting
    outputs: list[list[Measured]]
    plain: list[list[Measured]] = field(repr=False)

    def estimate(self, measure: str) -> Estimate | None:
        """Over prompts, each of them the mean of its repeats; over the repeats where there is one prompt only.

        Repeats of a prompt are no independent prompts; counted as such they would make the error too small.
        """
        values = [self._values(measure, own, plain) for own, plain in zip(self.outputs, self.plain, strict=True)]
        if any(value is None for prompt in values for value in prompt):
            return None
        return Estimate.of(values[0] if len(values) == 1 else [statistics.fmean(prompt) for prompt in values])

    def _values(self, measure: str, own: list[Measured], plain: list[Measured]) -> list[Any]:
        if measure != "speedup":
            return [getattr(one, measure) for one in own]
        return [a.tokens_per_second / b.tokens_per_second for a, b in zip(own, plain, strict=True)]

    @property
    def count(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def identical(self) -> int:
        """Outputs with the tokens of plain decoding."""
        pairs = zip(self.outputs, self.plain, strict=True)
        return sum(a.token_ids == b.token_ids for own, plain in pairs for a, b in zip(own, plain, strict=True))

    def as_json(self) -> dict[str, Any]:
        estimates = {measure: self.estimate(measure) for measure in MEASURES}
        return {
            **asdict(self.setting),
            "lossless": self.setting.lossless,
            "outputs": self.count,
            "tokens": sum(len(one.token_ids) for own in self.outputs for one in own),
            "identical_to_ar": self.identical,
            **{measure: None if value is None else asdict(value) for measure, value in estimates.items()},
            "results": [[asdict(one) for one in own] for own in self.outputs],
        }


def make_settings(
    samplers: Sequence[str], mixes: Sequence[float], temperatures: Sequence[float], lengths: Sequence[int | None]
) -> list[Setting]:
    """Plain decoding at each temperature, and every combination of the others."""
    settings = [Setting("ar", temperature) for temperature in temperatures]
    for temperature, length, sampler in product(temperatures, lengths, samplers):
        own = mixes if sampler == "mixed" else [None]
        settings += [Setting(sampler, temperature, mix, length) for mix in own]
    return settings


class Sweep:
    """Decodes prompts in every setting.

    Args:
        prompts: Token ids.
        repeats: Of each prompt; repeat r has noise of seed r.
        options: Further SamplingParams, the same for all settings.
    """

    def __init__(
        self,
        model: ZayaForCausalLM,
        prompts: list[list[int]],
        settings: list[Setting],
        repeats: int,
        max_tokens: int,
        **options: Any,
    ) -> None:
        self.model, self.prompts, self.settings = model, prompts, settings
        self.repeats, self.max_tokens, self.options = repeats, max_tokens, options
        planner = model.planner
        self.planners = {setting: Planner(planner.costs, planner.block_length) for setting in settings}
        for setting in settings:
            self.params(setting, 0)  # checks it before anything is decoded

    def params(self, setting: Setting, seed: int, max_tokens: int | None = None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens or self.max_tokens,
            temperature=setting.temperature,
            seed=seed,
            ignore_eos=True,
            sampler=setting.sampler,
            mix=setting.mix or 0.0,
            block_length=setting.block_length,
            **self.options,
        )

    def run(self, progress: Callable[[int, int], None] = lambda done, of: None) -> list[Row]:
        """All of it; `progress` hears how many of the rounds, one output of every setting each, are done."""
        for setting in self.settings:  # threads start, weights are touched; a setting that cannot be served fails here
            self._decode(setting, self.prompts[0], self.params(setting, 0, min(WARM_TOKENS, self.max_tokens)))
        found: dict[Setting, list[list[Measured]]] = {s: [[] for _ in self.prompts] for s in self.settings}
        rounds = [(repeat, i) for repeat in range(self.repeats) for i in range(len(self.prompts))]
        for number, (repeat, i) in enumerate(rounds):
            first = number % len(self.settings)  # each setting comes after each other one about equally often
            for setting in self.settings[first:] + self.settings[:first]:
                output = self._decode(setting, self.prompts[i], self.params(setting, repeat))
                found[setting][i].append(self._measured(setting, output))
            progress(number + 1, len(rounds))
        return [Row(s, found[s], found[Setting("ar", s.temperature)]) for s in self.settings]

    def _decode(self, setting: Setting, prompt: list[int], params: SamplingParams) -> GenerationOutput:
        shared, self.model.planner = self.model.planner, self.planners[setting]
        try:
            return self.model.generate(prompt, params)[0]
        finally:
            self.model.planner = shared

    def _measured(self, setting: Setting, output: GenerationOutput) -> Measured:
        stats = output.stats
        share = stats.mixed / stats.tokens  # tokens that were not mixed are drawn from the AR law
        return Measured(
            token_ids=list(output.token_ids),
            tokens_per_second=stats.tokens_per_second,
            tokens_per_forward=stats.tokens_per_forward,
            logprob=self._logprob(output),
            kl=(stats.kl or 0.0) * share if setting.mix else None,
            total_variation=(stats.total_variation or 0.0) * share if setting.mix else None,
        )

    def _logprob(self, output: GenerationOutput) -> float:
        """Mean over the emitted tokens of log p, nats, by the model's plain logits (temperature 1)."""
        tokens, first = output.prompt_token_ids + output.token_ids, len(output.prompt_token_ids)
        log_p = self.model.logits(torch.tensor([tokens[:-1]]))[0, first - 1 :].double().log_softmax(-1)
        return float(log_p.gather(1, torch.tensor(tokens[first:])[:, None]).mean())


# Report


def cells(row: Row) -> list[str]:
    s = row.setting
    unmeasured = "exact" if s.lossless else "-"
    specs = {"tokens_per_second": ".0f", "speedup": ".2f", "tokens_per_forward": ".2f", "logprob": ".3f"}
    estimates = [row.estimate(measure).shown(spec) for measure, spec in specs.items()]
    distances = [row.estimate(measure) for measure in ("kl", "total_variation")]
    return [
        s.sampler,
        "-" if s.mix is None else f"{s.mix:g}",
        f"{s.temperature:g}",
        "-" if s.sampler == "ar" else str(s.block_length or "model's"),
        *estimates,
        *(unmeasured if distance is None else distance.shown(".3f") for distance in distances),
        f"{row.identical}/{row.count}",
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line) for line in aligned)


def as_text(report: dict[str, Any], rows: Sequence[Row]) -> str:
    asked, cpu, threads = report["arguments"], report["machine"]["cpu"], report["machine"]["threads"]
    over = "prompts" if report["prompts"] > 1 else "repeats"
    return "\n".join(
        [
            f"{report['model']} in {asked['dtype']}, {cpu['name']} ({cpu['kernels']}), {threads['in use']} threads",
            f"{report['prompts']} prompts x {asked['repeats']} repeats x {asked['max_tokens']} tokens, one at a time, "
            f"settings in turns; mean +- standard error over {over}",
            "",
            table(rows),
            "",
            "tokens/s: with prefill, and for mixed with the measurement of KL and TV. logprob: of the emitted tokens",
            "by the plain law of the model, nats a token. KL, TV: of the mixed law from the AR law, at the sampling",
            "temperature, mean over emitted positions; exact: the AR law itself; -: not measured. as AR: outputs with",
            "the tokens of plain decoding.",
        ]
    )


def figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # here, because nothing else needs it
    except ImportError as error:
        raise RequestError("--plot: needs the package matplotlib, which is not installed") from error
    return Figure


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Log-probability and, where laws were mixed, KL over speed; a line per temperature, block length and sampler.

    Raises:
        RequestError: matplotlib is missing, or the file cannot be written.
    """
    panels = {"logprob": "mean plain log-probability, nats a token"}
    if any(row.estimate("kl") for row in rows):
        panels["kl"] = "KL(mixed || AR), nats a token"
    figure = figure_class()(figsize=(1 + 5.5 * len(panels), 5), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, line in lines_of(rows).items():
            draw(axes, name, [row for row in line if row.estimate(measure)], measure)
        axes.set(xlabel="tokens/s", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise RequestError(f"--plot: {path}: cannot be written: {error.strerror}") from error


def lines_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        s = row.setting
        length = f", block {s.block_length}" if s.block_length else ""
        lines.setdefault(f"{s.sampler}, T {s.temperature:g}{length}", []).append(row)
    return lines


def draw(axes: Any, name: str, line: Sequence[Row], measure: str) -> None:
    if not line:
        return
    speeds, values = [row.estimate("tokens_per_second") for row in line], [row.estimate(measure) for row in line]
    axes.errorbar(
        [speed.mean for speed in speeds],
        [value.mean for value in values],
        xerr=[speed.error or 0.0 for speed in speeds],
        yerr=[value.error or 0.0 for value in values],
        marker="*" if line[0].setting.sampler == "ar" else "o",
        markersize=12 if line[0].setting.sampler == "ar" else 6,
        capsize=2,
        label=name,
    )
    for row, speed, value in zip(line, speeds, values, strict=True):
        if row.setting.mix is not None:
            axes.annotate(f"{row.setting.mix:g}", (speed.mean, value.mean), textcoords="offset points", xytext=(4, 4))


# Command


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, got {text!r}") from None


def integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas, got {text!r}") from None


def samplers(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SAMPLERS:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(SAMPLERS)} (ar is always there), got {name!r}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `blockdraft sweep` beside the model's."""
    add = parser.add_argument
    prompts = 'lines {"prompt": text or token ids}, or built-in (the default)'
    add("--prompts", default=BUILT_IN, metavar="FILE.jsonl", help=prompts)
    add("--count", type=int, default=8, metavar="N", help="prompts at most; default: %(default)s")
    add("--samplers", type=samplers, default="lossless,mixed", metavar="NAME,...", help="default: %(default)s")
    add("--mix", type=numbers, default="0,0.25,0.5,0.75,1", metavar="W,...", help="of mixed; default: %(default)s")
    add("--temperature", type=numbers, default="0,0.7", metavar="T,...", help="default: %(default)s")
    add("--block-length", type=integers, metavar="N,...", help="default: the model's")
    add("--groups", type=int, metavar="R", help="mask groups of a verifying forward; default: planned")
    drafters = ("auto", "mask", "ngram")
    add("--drafter", choices=drafters, default="auto", help="of lossless and mixed; default: %(default)s")
    verifications = ("gumbel", "rejection", "match")
    add("--verification", choices=verifications, default="gumbel", help="of lossless and mixed; default: %(default)s")
    add("--denoising-steps", type=int, metavar="N", help="of denoise: forwards per block; default: one per token")
    add("--repeats", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--max-tokens", type=int, default=64, metavar="N", help="of an output; default: %(default)s")
    add("--json", action="store_true", help="one object on standard output")
    add("--plot", type=Path, metavar="FILE", help="draw quality over speed as .png or .svg; needs matplotlib")


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("count", "repeats", "max_tokens"):
        value = getattr(args, name)
        if not 1 <= value <= 1 << 20:
            raise RequestError(f"--{name.replace('_', '-')} must be from 1 to {1 << 20}, got {value}")
    for name in ("mix", "temperature", "block_length", "samplers"):
        values = getattr(args, name) or []
        if len(set(values)) != len(values):
            raise RequestError(f"--{name.replace('_', '-')} must name each value once, got {values}")
    if args.drafter == "ngram" and "mixed" in args.samplers and any(args.mix):
        raise RequestError("--drafter must be auto or mask for --samplers mixed: n-gram drafts have no law to mix with")
    if args.plot and args.plot.suffix not in PLOT_SUFFIXES:
        raise RequestError(f"--plot must end in {' or '.join(PLOT_SUFFIXES)}, got {str(args.plot)!r}")
    if args.plot:
        figure_class()  # rather before the measurement than after it


def asked_for(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        *("dtype", "prompts", "count", "samplers", "mix", "temperature", "block_length", "groups", "drafter"),
        *("verification", "denoising_steps", "repeats", "max_tokens"),
    )
    return {name: getattr(args, name) for name in names}


def show_progress(done: int, rounds: int) -> None:
    print(f"sweep: {done} of {rounds} rounds", file=sys.stderr, flush=True)


def is_different(row: Row, verification: str) -> bool:
    """Whether a setting that promises plain decoding's tokens gave others; rejection promises its law only."""
    promised = row.setting.lossless and (verification != "rejection" or row.setting.temperature == 0)
    return promised and row.identical < row.count


def main(args: argparse.Namespace, load: Callable[[argparse.Namespace], ZayaForCausalLM]) -> int:
    """Measures and prints. 0: done, 1: a lossless setting differs from plain decoding.

    Args:
        args: Of `add_arguments`, and the model's.
        load: Gives the model for them; called once the arguments have been looked at.

    Raises:
        RequestError: An argument or a prompt that cannot be used.
    """
    check_arguments(args)
    settings = make_settings(args.samplers, args.mix, args.temperature, args.block_length or [None])
    model = load(args)
    prompts = load_prompts(model, args.prompts, args.count)
    options = {name: getattr(args, name) for name in ("groups", "drafter", "verification", "denoising_steps")}
    rows = Sweep(model, prompts, settings, args.repeats, args.max_tokens, **options).run(show_progress)
    report = {"model": args.model or "bundled model", "machine": info.collect(), "arguments": asked_for(args)}
    report |= {"prompts": len(prompts), "settings": [row.as_json() for row in rows]}
    print(json.dumps(report, indent=1) if args.json else as_text(report, rows))
    if args.plot:
        plot(rows, f"{report['model']}: {len(prompts)} prompts x {args.repeats} repeats", args.plot)
    different = [row.setting.name for row in rows if is_different(row, args.verification)]
    if different:
        print(f"blockdraft: other tokens than plain decoding: {', '.join(different)}", file=sys.stderr)
    return DIFFERENT if different else 0
