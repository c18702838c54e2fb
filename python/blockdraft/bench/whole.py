"""`blockdraft bench --model`: steps of a whole model beside transformers' forwards, at the same place of the same text.

Both sides run by turns where two models fit into the memory, else one after the other. A folder's model also generates.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from blockdraft.bench import layer, report
from blockdraft.bench.measure import Budget, Call, Measured, Times, time_sides
from blockdraft.bench.memory import check_memory, fits
from blockdraft.bench.random_model import UNIFORM, RandomWeights, config_of, experts_label
from blockdraft.bench.sides import EXPERTS, Ours, Theirs, has_transformers, their_model, their_random_model
from blockdraft.bench.subject import Match, Shapes
from blockdraft.model.config import ZayaConfig
from blockdraft.model.decoder import Decoder
from blockdraft.model.weights import Checkpoint, resolve_folder
from blockdraft.model.zaya import ZayaForCausalLM
from blockdraft.sampler import SamplingParams

OWN = "own"  # routing of a checkpoint
PROMPT, NEW = 128, 64  # tokens of a generation
OURS = "blockdraft"


@dataclass(frozen=True)
class ModelRun:
    """What to measure.

    Attributes:
        folder: Of a checkpoint; None: random weights.
        layers: Of random weights; None: all that the shapes have.
        experts: Of random weights: how ours are stored, None for the dtype.
        sample: Measures the memory; called beside each side.
    """

    shapes: Shapes
    folder: Path | None
    dtype: torch.dtype
    rows: tuple[int, ...]
    context: int
    routings: tuple[str, ...]
    layers: int | None
    cold_bytes: int
    experts: str | None
    budget: Budget
    sample: Callable[[], None]

    @property
    def depth(self) -> int:
        return self.layers or self.shapes.layers

    @property
    def name(self) -> str:
        if self.folder:
            return self.folder.name
        part = "" if self.depth == self.shapes.layers else f", {self.depth} of {self.shapes.layers} layers"
        return f"random weights{experts_label(self.experts)}{part}"


@dataclass
class Pair:
    """The sides that are in memory.

    Attributes:
        model: Ours as a model that generates.
    """

    model: ZayaForCausalLM | None
    ours: Ours | None
    theirs: Theirs | None


@dataclass
class Seen:
    """What a case showed of each side."""

    times: dict[str, Times] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    experts: list[int] = field(default_factory=list)
    touched_bytes: int = 0
    same_bits: bool = True
    by_turns: bool = False
    tokens: list[int] = field(default_factory=list)  # generated
    lack: float | None = None  # of theirs; see GenerateCase


@dataclass(frozen=True)
class StepCase:
    """A forward of some rows with the choice of their tokens; one row is a token of plain decoding."""

    run: ModelRun
    config: ZayaConfig
    rows: int
    routing: str
    first: list[int]  # tokens of the call whose result is compared

    def tokens(self, turn: int) -> list[int]:
        fixed = self.routing != UNIFORM or turn == 0
        return self.first if fixed else layer.uniform_tokens(self.config, self.rows, turn)

    def observe(self, pair: Pair, seen: Seen) -> None:
        sides: dict[str, Callable[[int], Call]] = {}
        if pair.ours:
            self._observe_ours(pair.ours, seen)
            sides[OURS] = lambda turn: pair.ours.step(self.tokens(turn))
        if pair.theirs:
            seen.states["transformers"] = pair.theirs.hidden_states(self.first)
            sides |= {name: partial(self._their_step, pair.theirs, name) for name in EXPERTS}
        seen.times |= zip(sides, time_sides(list(sides.values()), self.run.budget), strict=True)

    def _observe_ours(self, ours: Ours, seen: Seen) -> None:
        seen.states[OURS] = together = ours.hidden_states(self.first)
        seen.same_bits = torch.equal(together[:1], ours.hidden_states(self.first[:1]))
        seen.experts = layer.touched_experts(ours.experts_of(self.first), self.config.num_experts)
        head = ours.decoder.lm_head.weight.nbytes
        seen.touched_bytes = layer.touched_bytes(ours.decoder, seen.experts, self.run.context) + head

    def _their_step(self, theirs: Theirs, experts: str, turn: int) -> Call:
        return theirs.step(self.tokens(turn), experts)

    def match(self, seen: Seen) -> Match | None:
        """Both sides round, so twice a side's tolerance."""
        if len(seen.states) < 2:
            return None
        errors = layer.row_errors(seen.states[OURS], seen.states["transformers"])
        return layer.match_of(errors, self.routing, 2 * layer.tolerance_of(self.run.dtype, self.config))

    @property
    def label(self) -> str:
        return f"{self.run.name}, context {self.run.context}, {self.routing} routing, step"

    def row(self, seen: Seen) -> dict[str, Any]:
        mean = sum(seen.experts) / len(seen.experts)
        notes = [f"experts touched: {mean:.3g} of {self.config.num_experts}"]
        return row_of(self.run, self.label, self.rows, seen, self.match(seen), notes)


@dataclass(frozen=True)
class GenerateCase:
    """NEW tokens after PROMPT, greedily and one by one; both sides by their own `generate`. Times are of a token."""

    run: ModelRun
    config: ZayaConfig
    prompt: list[int]
    rows = 1
    routing = OWN

    def observe(self, pair: Pair, seen: Seen) -> None:
        sides: dict[str, Callable[[int], Call]] = {}
        if pair.model:
            sides[OURS] = lambda _: (self._ours, (pair.model,))
            seen.tokens = self._ours(pair.model)
            ids = layer.touched_experts(pair.ours.experts_of(seen.tokens[:1]), self.config.num_experts)
            head = pair.ours.decoder.lm_head.weight.nbytes
            seen.touched_bytes = layer.touched_bytes(pair.ours.decoder, ids, len(self.prompt)) + head
        if pair.theirs:
            sides |= {name: partial(self._their_call, pair.theirs, name) for name in EXPERTS}
            seen.lack = self._lack(pair.theirs, seen.tokens)
        times = time_sides(list(sides.values()), self.run.budget)
        seen.times |= {name: own.of_one(NEW) for name, own in zip(sides, times, strict=True)}

    def _ours(self, model: ZayaForCausalLM) -> list[int]:
        params = SamplingParams(max_tokens=NEW, sampler="ar", ignore_eos=True)
        return model.generate([self.prompt], params)[0].token_ids

    def _their_call(self, theirs: Theirs, experts: str, turn: int) -> Call:
        return self._theirs, (theirs, experts)

    def _theirs(self, theirs: Theirs, experts: str) -> Tensor:
        theirs.use(experts)
        ids = torch.tensor([self.prompt])
        mask, more = torch.ones_like(ids), dict(eos_token_id=None, pad_token_id=0)
        return theirs.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, **more)

    def _lack(self, theirs: Theirs, tokens: list[int]) -> float:
        """What our tokens' logits lack to the best in transformers' eyes, at most, relative to the largest logit."""
        theirs.use(EXPERTS[0])
        logits = theirs.model(torch.tensor([self.prompt + tokens[:-1]])).logits[0, len(self.prompt) - 1 :].float()
        lack = logits.amax(-1) - logits[torch.arange(len(tokens)), tokens]
        return float((lack / logits.abs().amax(-1)).max())

    def match(self, seen: Seen) -> Match | None:
        if seen.lack is None:
            return None
        tolerance = 2 * layer.tolerance_of(self.run.dtype, self.config)
        return Match(seen.lack, seen.lack, tolerance, seen.lack <= tolerance)

    @property
    def label(self) -> str:
        return f"{self.run.name}, generate, plain, {NEW} tokens after {len(self.prompt)}"

    def row(self, seen: Seen) -> dict[str, Any]:
        return row_of(self.run, self.label, self.rows, seen, self.match(seen), [])


def row_of(run: ModelRun, label: str, rows: int, seen: Seen, match: Match | None, notes: list[str]) -> dict[str, Any]:
    others = {name: times for name, times in seen.times.items() if name != OURS}
    fastest = min(others, key=lambda name: others[name].median_ms, default=None)
    ours, theirs = seen.times[OURS], others.get(fastest)
    notes += layer.compared(others) or [absence()]
    cold = seen.touched_bytes if seen.touched_bytes >= run.cold_bytes else 0
    work = report.Work("; ".join([rate(rows, ours, theirs), *notes]), seen.touched_bytes, cold)
    row = report.result(label, work, rows, Measured(ours, theirs, match, seen.same_bits, others))
    return row | {"most_tokens_per_second": rows / ours.median_ms * 1e3, "by_turns": seen.by_turns}


def absence() -> str:
    """Why there is no other side."""
    return "transformers does not load quantized experts" if has_transformers() else "transformers is not installed"


def rate(rows: int, ours: Times, theirs: Times | None) -> str:
    """Tokens per second; of several rows as many as were accepted."""
    most, beside = "" if rows == 1 else "at most ", ""
    if theirs:
        beside = f" (transformers {rows / theirs.median_ms * 1e3:.4g})"
    return f"{most}{rows / ours.median_ms * 1e3:.4g} tokens/s{beside}"


def random_config(run: ModelRun) -> ZayaConfig:
    return config_of(run.shapes, run.depth, experts=run.experts)


class Loader:
    """Makes the sides, of random weights or of a folder."""

    def __init__(self, run: ModelRun) -> None:
        self.run = run
        self.config = ZayaConfig.from_folder(run.folder) if run.folder else random_config(run)
        self.context = torch.randint(self.config.vocab_size, (run.context,)).tolist()
        self.size = self._size()

    def _size(self) -> int:
        """Bytes of one side, of the larger."""
        if self.run.folder:
            with Checkpoint(self.run.folder, self.config) as checkpoint:
                return checkpoint.nbytes
        shapes = self.run.shapes
        layers = self.run.depth * layer.layer_bytes(shapes, shapes.experts, self.run.dtype)
        return layers + self.run.dtype.itemsize * shapes.vocab_size * shapes.hidden_size

    def cases(self) -> list["StepCase | GenerateCase"]:
        """In an order in which routers change once."""
        run, config = self.run, self.config
        routings = (OWN,) if run.folder else run.routings
        cases: list[StepCase | GenerateCase] = [
            StepCase(run, config, rows, routing, self.tokens(rows, routing))
            for routing in routings
            for rows in run.rows
        ]
        return [*cases, GenerateCase(run, config, self.context[:PROMPT])] if run.folder else cases

    def tokens(self, rows: int, routing: str) -> list[int]:
        if routing == UNIFORM:
            return layer.uniform_tokens(self.config, rows)
        return torch.randint(self.config.vocab_size, (rows,)).tolist()

    def route(self, pair: Pair, routing: str) -> None:
        for side in (pair.ours, pair.theirs):
            if side and routing != OWN:
                side.route(self.weights(routing))

    def check_context(self) -> None:
        run, most = self.run, self.config.max_position_embeddings - max(self.run.rows)
        if run.context > most:
            raise report.BenchError(f"--context: {run.name} takes at most {most} beside these rows, got {run.context}")

    def weights(self, routing: str) -> RandomWeights:
        return RandomWeights(self.config, self.run.dtype, routing)

    def ours(self) -> Pair:
        run = self.run
        if run.folder:
            model = ZayaForCausalLM.from_pretrained(run.folder, dtype=run.dtype)
        else:
            decoder = Decoder(self.config, self.weights(UNIFORM), run.dtype, torch.device("cpu"), progress=True)
            model = ZayaForCausalLM(self.config, decoder, None, run.dtype, torch.device("cpu"))
        return Pair(model, Ours(model.decoder, self.context, max(run.rows), run.dtype), None)

    def theirs(self) -> Pair:
        run = self.run
        model = (
            their_model(run.folder, self.config, run.dtype)
            if run.folder
            else their_random_model(self.weights(UNIFORM).widened(), True)
        )
        return Pair(None, None, Theirs(model, self.context))

    def passes(self) -> Iterator[Pair]:
        """Both sides at once, or one and then, once it is gone, the other."""
        compared = has_transformers() and (self.run.folder is None or self.config.quantized_experts is None)
        if compared and fits(2 * self.size):
            ours, theirs = self.ours(), self.theirs()
            yield Pair(ours.model, ours.ours, theirs.theirs)
            return
        for make in (self.ours, self.theirs) if compared else (self.ours,):
            pair = make()
            yield pair
            pair.model = pair.ours = pair.theirs = None  # the caller may still hold the pair
            gc.collect()


def measure_all(run: ModelRun) -> Iterator[tuple[str, int, Callable[[], dict[str, Any]]]]:
    loader = Loader(run)
    loader.check_context()
    check_memory("--model", loader.size, "--layers" if run.folder is None else "what else runs")
    cases = loader.cases()
    seen = [Seen() for _ in cases]
    for pair in loader.passes():
        run.sample()
        routing = None
        for case, own in tqdm(list(zip(cases, seen, strict=True)), "measuring", unit="case", leave=False):
            if case.routing != routing:
                routing = case.routing
                loader.route(pair, routing)
            case.observe(pair, own)
            own.by_turns = bool(pair.ours and pair.theirs)
        run.sample()
        del pair
    for case, own in zip(cases, seen, strict=True):
        yield case.label, case.rows, partial(case.row, own)


def folder_of(name: str) -> Path | None:
    """Of --model's argument: None for the 8B shape."""
    if name == "8b":
        return None
    from blockdraft import bundled_model

    return resolve_folder(bundled_model() if name == "nano" else name)
