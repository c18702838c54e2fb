"""Generating completions with several samplers and checking them."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from blockdraft.errors import RequestError
from blockdraft.generate import GenerationOutput
from blockdraft.model.zaya import ZayaForCausalLM
from blockdraft.passk.checker import OUTCOMES, Checker, CheckFunction, Limits, Verdict
from blockdraft.passk.estimate import check_integer, pass_at_k
from blockdraft.passk.prompts import Record, check_records
from blockdraft.passk.report import Report
from blockdraft.sampler import SamplingParams

# Temperature and top-p of arXiv 2107.03374 for large k.
DEFAULT_PARAMS = SamplingParams(temperature=0.8, top_p=0.95, n=10, seed=0)
USUAL_K = (1, 2, 5, 10, 20, 50, 100)
SHARED = ("sampler", "n", "seed")  # not a sampler's own: the comparison stands on them


@dataclass(frozen=True)
class Completion:
    """One sample of one prompt, checked.

    Attributes:
        sampler, id, sample, seed: Where it comes from.
        completion: Its text; its token ids where the model has no tokenizer.
        token_ids, finish_reason, tokens_per_forward: As in `GenerationOutput`.
        outcome, detail, check_seconds: As in `Verdict`.
    """

    sampler: str
    id: Any
    sample: int
    seed: int
    completion: str | list[int]
    token_ids: list[int]
    finish_reason: str
    tokens_per_forward: float
    outcome: str
    detail: str
    check_seconds: float

    @classmethod
    def of(cls, sampler: str, record: Record, output: GenerationOutput, verdict: Verdict) -> "Completion":
        return cls(
            sampler=sampler,
            id=record["id"],
            sample=output.sample,
            seed=output.seed,
            completion=_completion(output),
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
            tokens_per_forward=output.stats.tokens_per_forward,
            outcome=verdict.outcome,
            detail=verdict.detail,
            check_seconds=verdict.seconds,
        )


@dataclass(frozen=True)
class SamplerResult:
    """All completions of one sampler.

    Attributes:
        sampler: Its name, with its own parameters.
        params: Of its first prompt.
        completions: Prompt by prompt, `params.n` each.
        tokens_per_forward: Committed tokens per decode forward, over all completions.
        seconds: Generating them took.
    """

    sampler: str
    params: SamplingParams
    completions: list[Completion]
    tokens_per_forward: float
    seconds: float

    @property
    def ids(self) -> list[Any]:
        return [completion.id for completion in self.completions[:: self.params.n]]

    @property
    def passed(self) -> list[int]:
        """Completions that pass, per prompt."""
        n, passes = self.params.n, [completion.outcome == "pass" for completion in self.completions]
        return [sum(passes[first : first + n]) for first in range(0, len(passes), n)]

    @property
    def outcomes(self) -> dict[str, int]:
        counts = Counter(completion.outcome for completion in self.completions)
        return {outcome: counts[outcome] for outcome in OUTCOMES}

    @property
    def tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    def pass_at_k(self, k: int) -> list[float]:
        """Of each prompt."""
        return [pass_at_k(self.params.n, passed, k) for passed in self.passed]


def _completion(output: GenerationOutput) -> str | list[int]:
    return output.token_ids if output.text is None else output.text


class Evaluator:
    """Model, prompts and checker of one evaluation.

    Attributes:
        verdicts: By prompt and tokens: the same completion of a prompt is checked once, whichever samplers gave it.
    """

    def __init__(
        self, model: ZayaForCausalLM, records: list[Record], checker: Checker, limits: Limits, jobs: int
    ) -> None:
        self.model, self.records, self.checker, self.limits, self.jobs = model, records, checker, limits, jobs
        self.verdicts: dict[tuple[int, tuple[int, ...]], Verdict] = {}

    def run(self, sampler: str, params: SamplingParams) -> SamplerResult:
        begin = time.perf_counter()
        outputs = self.model.generate([record["prompt"] for record in self.records], self._seeded(params))
        seconds = time.perf_counter() - begin
        self._check(outputs)
        completions = [
            Completion.of(sampler, self.records[output.request], output, self.verdicts[_key(output)])
            for output in outputs
        ]
        forwards = sum(output.stats.decode_forwards for output in outputs)
        committed = sum(output.stats.committed for output in outputs)
        return SamplerResult(sampler, params, completions, committed / forwards if forwards else 0.0, seconds)

    def _seeded(self, params: SamplingParams) -> list[SamplingParams]:
        """A seed for each prompt: noise does not depend on the prompt, and the bootstrap wants independent prompts."""
        return [replace(params, seed=(params.seed + i) % 2**63) for i in range(len(self.records))]

    def _check(self, outputs: list[GenerationOutput]) -> None:
        new = {_key(output): output for output in outputs if _key(output) not in self.verdicts}
        pool = ThreadPoolExecutor(self.jobs)  # of threads that wait for a process each
        try:
            verdicts = pool.map(lambda output: self.checker.check(self._question(output), self.limits), new.values())
            self.verdicts.update(zip(new, verdicts, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)

    def _question(self, output: GenerationOutput) -> Record:
        """What the checker is given: the record, the completion, and the prompt's text followed by it."""
        record = self.records[output.request]
        prompt, text = record["prompt"], None
        if output.text is not None:
            text = (prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)) + output.text
        return {**record, "completion": _completion(output), "text": text}


def _key(output: GenerationOutput) -> tuple[int, tuple[int, ...]]:
    return output.request, tuple(output.token_ids)


def evaluate(
    model: ZayaForCausalLM,
    records: Iterable[Mapping[str, Any]],
    checker: Checker | CheckFunction,
    params: SamplingParams = DEFAULT_PARAMS,
    *,
    samplers: Sequence[str] = ("ar", "lossless"),
    k: Sequence[int] | None = None,
    limits: Limits | None = None,
    jobs: int = 1,
    finished: Callable[[SamplerResult], None] | None = None,
) -> Report:
    """pass@k of each sampler, on the same prompts with the same seeds.

    Args:
        model: Generates.
        records: Mappings with "prompt" (text or token ids), an "id" if they like, and further fields for the checker.
        checker: A `Checker`, or a function as for `Checker.python`: it is given {"id", "prompt", "completion", "text",
            and the record's other fields} and returns whether the completion passes.
        params: How to sample; `n` is the samples per prompt, `seed` the first prompt's (None draws one), `sampler`
            is not looked at.
        samplers: Names for `SamplingParams.sampler`, with parameters of their own: "lossless:block_length=8". The
            first is what the others are compared with.
        k: In [1, n]; None takes those of 1, 2, 5, 10, 20, 50, 100 that are.
        limits: Of each check; None is `Limits()`.
        jobs: Checks at a time.
        finished: Called with each sampler's result as soon as it is there.

    Raises:
        RequestError: An argument that cannot be served; nothing is generated then.
    """
    limits, params = limits or Limits(), params.with_seed()
    runs, ks = make_runs(params, samplers), make_ks(k, params.n)
    check_integer("jobs", jobs, 1, 1024)
    checker = checker if isinstance(checker, Checker) else Checker.python(checker)
    checker.try_load(limits)
    evaluator = Evaluator(model, check_records(model, records), checker, limits, jobs)
    results = []
    for sampler, run in runs.items():
        results.append(evaluator.run(sampler, run))
        if finished:
            finished(results[-1])
    return Report(params, ks, limits, checker.name, results)


def make_runs(params: SamplingParams, samplers: Sequence[str]) -> dict[str, SamplingParams]:
    """The parameters of each sampler, which have checked themselves."""
    names = [samplers] if isinstance(samplers, str) else list(samplers)
    if not names or len(set(names)) < len(names):
        raise RequestError(f"samplers must be different names, one at least, got {names!r}")
    return {name: _own(params, name) for name in names}


def _own(params: SamplingParams, sampler: str) -> SamplingParams:
    """params with those of "NAME:PARAMETER=VALUE:..."."""
    name, *settings = sampler.split(":")
    known = {f.name for f in dataclasses.fields(params)}.difference(SHARED)
    own = {}
    for setting in settings:
        parameter, equals, value = setting.partition("=")
        if not equals or parameter not in known:
            raise RequestError(f"sampler {sampler!r}: must be NAME:PARAMETER=VALUE, one of {', '.join(sorted(known))}")
        own[parameter] = _value(value)
    try:
        return replace(params, sampler=name, **own)
    except TypeError as error:  # a value of a kind that its check does not expect
        raise RequestError(f"sampler {sampler!r}: {error}") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def make_ks(k: Sequence[int] | None, samples: int) -> tuple[int, ...]:
    """The k of pass@k in order, checked; None takes the usual ones."""
    if k is None:
        return tuple(usual for usual in USUAL_K if usual <= samples)
    for value in k:
        check_integer("k", value, 1, samples)
    if not k:
        raise RequestError("k must hold an integer, got none")
    return tuple(sorted(set(k)))
