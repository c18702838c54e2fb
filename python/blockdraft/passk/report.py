"""What an evaluation found: as a table and as JSON."""

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from blockdraft.passk.checker import OUTCOMES, Limits
from blockdraft.passk.estimate import LEVEL, RESAMPLES, Interval
from blockdraft.sampler import SamplingParams

if TYPE_CHECKING:
    from blockdraft.passk.evaluation import SamplerResult

SAME_TOKENS = ("ar", "lossless")  # samplers that promise the same tokens for the same parameters ...
DRAFTING = ("drafter", "block_length", "groups")  # ... but for these


@dataclass(frozen=True)
class Report:
    """What `evaluate` found.

    Attributes:
        params: Shared by the samplers; `n` samples per prompt, prompt i with noise of `seed` + i.
        ks: The k of pass@k.
        limits, checker: Of the checks; the checker by its name.
        results: One per sampler. The others are compared with the first.
    """

    params: SamplingParams
    ks: tuple[int, ...]
    limits: Limits
    checker: str
    results: "list[SamplerResult]" = field(repr=False)

    @property
    def prompts(self) -> int:
        return len(self.results[0].passed)

    def pass_at_k(self, result: "SamplerResult", k: int) -> Interval:
        return Interval.bootstrap(result.pass_at_k(k), self.params.seed)

    def difference(self, result: "SamplerResult", k: int) -> Interval:
        """Of pass@k from the first sampler's, prompt by prompt."""
        pairs = zip(result.pass_at_k(k), self.results[0].pass_at_k(k), strict=True)
        return Interval.bootstrap([value - base for value, base in pairs], self.params.seed)

    def identical(self, result: "SamplerResult", what: str) -> int:
        """Samples whose "completion" (the text) or "token_ids" are the first sampler's."""
        pairs = zip(result.completions, self.results[0].completions, strict=True)
        return sum(getattr(completion, what) == getattr(base, what) for completion, base in pairs)

    @property
    def promise_kept(self) -> bool:
        """Whether samplers that promise the same tokens gave them; other verifications promise the same law only."""
        kept = [result for result in self.results if result.params.verification == "gumbel"]
        bound = [result for result in kept if result.params.sampler in SAME_TOKENS]
        return all(
            [c.token_ids for c in result.completions] == [c.token_ids for c in bound[0].completions]
            for result in bound
            if _law(result.params) == _law(bound[0].params)
        )

    def as_json(self) -> dict[str, Any]:
        """JSON-ready; docs/passk.md has the keys."""
        interval = {"method": "percentile bootstrap over prompts", "level": LEVEL, "resamples": RESAMPLES}
        return {
            "prompts": self.prompts,
            "samples": self.params.n,
            "k": list(self.ks),
            "estimator": "1 - C(n-c,k)/C(n,k), mean over prompts",
            "interval": {**interval, "seed": self.params.seed},
            "params": _as_json(self.params),
            "checker": self.checker,
            "limits": asdict(self.limits),
            "samplers": {result.sampler: self._sampler(result) for result in self.results},
            "comparisons": [self._comparison(result) for result in self.results[1:]],
        }

    def _sampler(self, result: "SamplerResult") -> dict[str, Any]:
        passed = zip(result.ids, result.passed, strict=True)
        return {
            "pass_at_k": {str(k): asdict(self.pass_at_k(result, k)) for k in self.ks},
            "outcomes": result.outcomes,
            "tokens": result.tokens,
            "tokens_per_forward": result.tokens_per_forward,
            "seconds": result.seconds,
            "passed": [{"id": id, "passed": count} for id, count in passed],
        }

    def _comparison(self, result: "SamplerResult") -> dict[str, Any]:
        return {
            "sampler": result.sampler,
            "baseline": self.results[0].sampler,
            "samples": len(result.completions),
            "identical_texts": self.identical(result, "completion"),
            "identical_token_ids": self.identical(result, "token_ids"),
            "difference": {str(k): asdict(self.difference(result, k)) for k in self.ks},
        }

    def as_text(self) -> str:
        """A table with a row per sampler, and a line per comparison."""
        p, limits = self.params, self.limits
        law = f"temperature {p.temperature:g}, top-p {p.top_p:g}, at most {p.max_tokens} tokens, seed {p.seed}"
        return "\n".join(
            [
                f"{self.prompts} prompts x {p.n} samples, {law}",
                f"checked by {self.checker} within {limits.timeout:g} s and {limits.memory_mb} MB",
                "",
                *self._table(),
                "",
                *(self._compared(result) for result in self.results[1:]),
                f"Intervals: {LEVEL:.0%}, percentile bootstrap over prompts, {RESAMPLES} resamples.",
            ]
        )

    def _table(self) -> list[str]:
        headings = ["sampler", *(f"pass@{k}" for k in self.ks), *OUTCOMES, "tokens/forward"]
        rows = [headings, *(self._cells(result) for result in self.results)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]

    def _cells(self, result: "SamplerResult") -> list[str]:
        estimates = [self.pass_at_k(result, k).shown(".3f") for k in self.ks]
        counts = [str(count) for count in result.outcomes.values()]
        return [result.sampler, *estimates, *counts, f"{result.tokens_per_forward:.2f}"]

    def _compared(self, result: "SamplerResult") -> str:
        same, count = self.identical(result, "completion"), len(result.completions)
        line = f"{result.sampler} against {self.results[0].sampler}: {same} of {count} texts identical"
        if same == count:
            return line
        return f"{line}; " + ", ".join(f"pass@{k} {self.difference(result, k).shown('+.3f')}" for k in self.ks)


def _law(params: SamplingParams) -> dict[str, Any]:
    """The parameters that tokens depend on."""
    return {name: value for name, value in _as_json(params).items() if name not in DRAFTING}


def _as_json(params: SamplingParams) -> dict[str, Any]:
    values = {f.name: getattr(params, f.name) for f in fields(params) if f.name != "sampler"}
    return {name: repr(value) if callable(value) else value for name, value in values.items()}
