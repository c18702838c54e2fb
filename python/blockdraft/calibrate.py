"""`blockdraft calibrate`: how long a step takes by its rows, on this machine, for `blockdraft.plan`."""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockdraft.cache import Cache, CachedSequence
from blockdraft.decide import Ask, columns_of, decide
from blockdraft.errors import RequestError
from blockdraft.outputs import StreamEvent
from blockdraft.plan import CostTable, table_path
from blockdraft.processors import Processors
from blockdraft.runner import Inputs, Late, LateInputs
from blockdraft.sample import Sample
from blockdraft.sampler import SamplingParams
from blockdraft.steps import AR, VERIFY, Block, make_step

if TYPE_CHECKING:
    from blockdraft.model.zaya import ZayaForCausalLM

ROWS = (1, 2, 4, 8, 12, 16, 17, 24, 32, 48, 64, 96, 128, 192, 272)
BATCH = 8  # sequences of the forward that shows what a sequence adds
REPEATS = 3  # of a size in a round
HEAD_ROWS = 16  # rows of a sequence that reach the LM head
DECODED, DRAFTS = 32, 7  # tokens of a generation with and without drafts to verify, and how many those are


class Forward:
    """One decode step, repeatable: the sequences with `rows` causal rows each, after the tokens that they have.

    It goes through the model's runner, as steps of generation do: rows laid out, padded where the runner pads, layers,
    LM head and choice, verification, commit of nothing. With `late`, for one sequence, a second choice, as for the
    drafts of a mask group that is known after verification: within the step where the runner does that.
    """

    def __init__(
        self,
        model: "ZayaForCausalLM",
        cache: Cache,
        sequences: Sequence[CachedSequence],
        rows: int,
        late: bool = False,
    ) -> None:
        self.model, self.cache, self.sequences, self.rows, self.late = model, cache, sequences, rows, late
        params = SamplingParams(seed=0)
        self.samples = [Sample([0], params, i, 0, None, Processors(), frozenset()) for i in range(len(sequences))]
        self.generator = torch.Generator().manual_seed(rows)

    @torch.inference_mode()
    def run(self) -> float:
        """Seconds, with other tokens each time, as in a decoding loop: experts of the same ones stay in the cache."""
        model, count = self.model, len(self.sequences)
        tokens = torch.randint(model.config.vocab_size, (count, self.rows), generator=self.generator).tolist()
        started = time.perf_counter()
        step = make_step(self._blocks(tokens), self.cache.page_size, model.config.mask_parent)
        asks = self._asks()
        rows = [row for ask in asks for row in ask.rows]
        verified = [(row, head) for head, row in enumerate(rows)]
        laws = columns_of(asks, torch.device("cpu"))
        x = Inputs.of(step, rows, laws, verified, [self.rows] * count, [0] * count)
        in_step = self.late and model.runner.late
        if in_step:
            x = LateInputs.adding(x, [Late(0, [0] * (self.rows + 1), self.sequences[0].length + 1)], laws)
        outcome = model.runner.decode(self.cache, x)
        if self.late and not in_step:
            decide(model.heads, outcome.hidden_states, asks)
        return time.perf_counter() - started

    def _blocks(self, tokens: list[list[int]]) -> list[Block]:
        """With as many pages as a sequence of this length has."""
        return [
            Block(s.length, s.slot, s.pages[: self.cache.pages_for(s.length + self.rows)], own)
            for s, own in zip(self.sequences, tokens, strict=True)
        ]

    def _asks(self) -> list[Ask]:
        count = min(self.rows, HEAD_ROWS)
        firsts = range(0, self.rows * len(self.sequences), self.rows)
        return [
            Ask(sample, range(first, first + count), s.length + 1)
            for sample, s, first in zip(self.samples, self.sequences, firsts, strict=True)
        ]


def measure(model: "ZayaForCausalLM", context: int = 128, rounds: int = 7) -> CostTable:
    """Medians over rounds that visit all sizes in turn, so that a slow minute of the machine hits all alike."""
    room = model.config.max_position_embeddings - ROWS[-1]
    context = max(1, min(context, room))
    table = _measure_steps(model, context, rounds)
    verify_ms, mixed_ms = _verify_ms(model, table, context, rounds)
    return replace(table, verify_ms=verify_ms, mixed_ms=mixed_ms, source="measured")


def _measure_steps(model: "ZayaForCausalLM", context: int, rounds: int) -> CostTable:
    needed = [context + ROWS[-1], *[context + 1] * (BATCH - 1)]
    cache = model.runner.open(sum(needed), BATCH)
    sequences = [cache.allocate(tokens) for tokens in needed]
    try:
        for sequence in sequences:
            sequence.length = context
        ms = _medians(_forwards(model, cache, sequences), rounds)
    finally:
        for sequence in sequences:
            cache.release(sequence)
        model.runner.close(cache)
    each = max(0.0, (ms["batch"] - ms[BATCH]) / (BATCH - 1))
    late = max(0.0, ms["late"] - ms[HEAD_ROWS])
    return CostTable(ROWS, tuple(ms[rows] for rows in ROWS), each, late)


def _forwards(model: "ZayaForCausalLM", cache: Cache, sequences: list[CachedSequence]) -> dict[int | str, Forward]:
    forwards: dict[int | str, Forward] = {rows: Forward(model, cache, sequences[:1], rows) for rows in ROWS}
    forwards["batch"] = Forward(model, cache, sequences, 1)
    forwards["late"] = Forward(model, cache, sequences[:1], HEAD_ROWS, late=True)
    return forwards


def _medians(forwards: dict[int | str, Forward], rounds: int) -> dict[int | str, float]:
    """Milliseconds."""
    for forward in forwards.values():  # a graph is captured when its shape comes the second time
        forward.run()
        forward.run()
    times: dict[int | str, list[float]] = {name: [] for name in forwards}
    for _ in range(rounds):
        for name, forward in forwards.items():
            forward.run()  # a decoding loop finds a small model's weights in the cache, and so shall the next ones
            times[name] += [forward.run() for _ in range(REPEATS)]
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def _verify_ms(model: "ZayaForCausalLM", table: CostTable, context: int, rounds: int) -> tuple[float, float]:
    """What a forward with a block to verify takes longer than its rows: by that sequence, and by each further one."""
    n = min(BATCH, model.max_batch_size, model.kv_cache_tokens // (context + DECODED + model.config.block_length))
    alone = _longer(model, table, context, rounds, 1)
    return alone, max(0.0, _longer(model, table, context, rounds, n) - alone) / (n - 1) if n > 1 else 0.0


def _longer(model: "ZayaForCausalLM", table: CostTable, context: int, rounds: int, n: int) -> float:
    """Milliseconds of the decoding loop where one of n sequences verifies drafts in every third forward.

    The next forward counts as well: what is kept from one plain step to the next is made anew then, and what is in the
    caches of the processor changes.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (context,), generator=generator).tolist()
    drafts = torch.randint(model.config.vocab_size, (DECODED, DRAFTS), generator=generator).tolist()
    plain = SamplingParams(sampler="ar", max_tokens=DECODED, ignore_eos=True, seed=0)
    drafter = lambda known, count: [] if len(known) % 3 else drafts[len(known) % DECODED][:count]  # noqa: E731
    drafting = replace(plain, sampler="lossless", drafter=drafter, groups=0)
    calm, mixed = [], []
    for _ in range(rounds):
        calm += [seconds for _, seconds in _steps(model, [prompt] * n, [plain] * n)]
        steps = _steps(model, [prompt] * n, [drafting, *[plain] * (n - 1)])
        mixed += [seconds + after for (kind, seconds), (_, after) in pairwise(steps) if kind == VERIFY]
    longer = statistics.median(mixed) - 2 * statistics.median(calm)
    return max(0.0, 1e3 * longer - (table.time(n + DRAFTS, n) - table.time(n, n)))


def _steps(model: "ZayaForCausalLM", prompts: list[list[int]], params: list[SamplingParams]) -> list[tuple[str, float]]:
    """What the first sequence did, and seconds, of the forwards in which all sequences decode."""
    forwards: list[list[StreamEvent]] = []
    for event in model.stream(prompts, params):
        if event.request == 0:
            forwards.append([])
        forwards[-1].append(event)
    decoding = [
        events for events in forwards if len(events) == len(prompts) and {e.kind for e in events} <= {AR, VERIFY}
    ]
    return [(events[0].kind, events[0].seconds) for events in decoding]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=128, metavar="N", help="tokens before (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s; ROCm: cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: where the planner looks for it")
    parser.add_argument("--json", action="store_true")


def main(model: "ZayaForCausalLM", args: argparse.Namespace) -> int:
    if args.context < 1 or args.rounds < 1:
        raise RequestError(f"--context and --rounds must be at least 1, got {args.context} and {args.rounds}")
    table = measure(model, args.context, args.rounds)
    path = args.out or table_path(model.config, model.dtype, model.device)
    facts = {"context": args.context, "threads": torch.get_num_threads(), "dtype": str(model.dtype).split(".")[1]}
    table.save(path, **facts)
    if args.json:
        print(json.dumps({"path": str(path), **asdict(table)}))
        return 0
    print(f"{'rows':>6} {'ms':>9} {'of one row':>11}")
    for rows, ms in zip(table.rows, table.ms, strict=True):
        print(f"{rows:>6} {ms:>9.3f} {ms / table.ms[0]:>10.2f}x")
    print(
        f"each further sequence: {table.sequence_ms:.3f} ms; choice from a mask group: {table.late_ms:.3f} ms;"
        f" each sequence that verifies: {table.verify_ms:.3f} ms;"
        f" each further sequence beside such: {table.mixed_ms:.3f} ms"
    )
    print(f"written to {path}")
    return 0
