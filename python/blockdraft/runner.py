"""Between the engine and the decoder: the part of a step that runs on the device.

A step that decides every token by `ops.lm_head_choose` runs there from its rows to the commit (`decode`), and the
host reads back a few integers. Where a token needs logits, the layers alone do (`forward`), and the engine goes on from
their hidden states.

`EagerRunner` computes a step as it comes. `GraphRunner` pads it to one of a limited number of shapes, and from the
second time that a shape comes it replays a graph (CUDA or HIP) of it: one launch instead of some hundred. A graph reads
and writes fixed memory only: the weights, one cache that outlives the run, and the buffers of its shape.

Padding is a sequence of its own behind the real ones. Its rows see each other and nothing else, read the empty
state, write no key and commit nothing; since they are all alike, they need one expert among them.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from blockdraft import ops
from blockdraft.cache import Cache, CachedSequence, Transaction
from blockdraft.pieces import room_for, views
from blockdraft.steps import EMPTY_SLOT, Step, as_tensors

if TYPE_CHECKING:
    from blockdraft.model.layers import PackedLinear
    from blockdraft.model.zaya import ZayaForCausalLM

MAX_ROWS = 2048  # of a graph; larger steps, which are prompts mostly, keep a GPU busy without one
MAX_BYTES = 2**31  # of all graphs
LAWS = ("temperature", "top_k", "top_p", "min_p", "seeds", "samples", "positions")  # in the order of the operator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs(Step):
    """A step whose tokens are all decided by `ops.lm_head_choose`: N rows decide, B sequences are verified."""

    head_rows: Tensor  # [N] int64
    temperature: Tensor  # [N] float32, and so on: the laws of these rows, as the operator takes them
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    samples: Tensor
    positions: Tensor
    known: Tensor  # [T] int32, the token after each row, where that is known
    source: Tensor  # [T] int64, where it is found in [known | decided]
    lengths: Tensor  # [B] int32, causal rows
    limits: Tensor  # [B] int32, most of them to commit

    @property
    def laws(self) -> list[Tensor]:
        return [getattr(self, name) for name in LAWS]

    @staticmethod
    def of(
        step: Step,
        head_rows: Sequence[int],
        laws: Sequence[Tensor],
        verified: Sequence[tuple[int, int]],
        lengths: Sequence[int],
        limits: Sequence[int],
    ) -> "Inputs":
        """Of a step on the CPU; verified: rows, and which of head_rows decides the token that their draft must be."""
        T = len(step.token_ids)
        source = list(range(T))
        for row, head in verified:
            source[row] = T + head
        decides, sources = as_tensors((head_rows, source), torch.int64)
        causal, most = as_tensors((lengths, limits), torch.int32)
        return Inputs(
            **vars(step),
            **dict(zip(LAWS, laws, strict=True)),
            head_rows=decides,
            known=step.token_ids.roll(-1),
            source=sources,
            lengths=causal,
            limits=most,
        )


class Late(NamedTuple):
    """Drafts of a sequence of the step that are chosen once it is known how many of its rows hold.

    Attributes:
        sequence: Which one.
        first: By the number of committed rows, the first row that drafts; the next ones are behind it.
        position: What that row drafts a token for if no row is committed.
    """

    sequence: int
    first: Sequence[int]
    position: int


@dataclass(frozen=True)
class LateInputs(Inputs):
    """With drafts of S sequences, W of each, that follow from what is committed: up to P - 1 rows."""

    late_sequences: Tensor  # [S] int64
    late_tables: Tensor  # [S] int64, where the table of each begins in those below: 0, P, ...
    late_rows: Tensor  # [S, P, W] int64, rows that draft, by the number of committed rows
    late_positions: Tensor  # [S, P, W] int32, what they draft for
    late_temperature: Tensor  # [S, W] float32, and so on: their laws but for the positions
    late_top_k: Tensor
    late_top_p: Tensor
    late_min_p: Tensor
    late_seeds: Tensor
    late_samples: Tensor

    @staticmethod
    def adding(x: Inputs, late: Sequence[Late], laws: Sequence[Tensor]) -> "LateInputs":
        """laws: ``[S * W]`` each, as in `Inputs.of`; of their positions nothing is taken."""
        S, P, W = len(late), max(len(own.first) for own in late), len(laws[0]) // len(late)
        sequences, *firsts = as_tensors([[own.sequence for own in late], *(own.first for own in late)], torch.int64)
        first = torch.nn.utils.rnn.pad_sequence(list(firsts), batch_first=True)
        slots, starts = torch.arange(W), torch.tensor([own.position for own in late])
        positions = starts[:, None, None] + torch.arange(P)[None, :, None] + slots
        return LateInputs(
            **vars(x),
            late_sequences=sequences,
            late_tables=torch.arange(S) * P,
            late_rows=(first[:, :, None] + slots).clamp_max(len(x.token_ids) - 1),
            late_positions=positions.int(),
            **{f"late_{name}": law.view(S, W) for name, law in zip(LAWS[:-1], laws, strict=False)},
        )

    def choose(self, head: "PackedLinear", hidden_states: Tensor, committed: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and logprobs ``[S * W]``."""
        at = self.late_tables + committed.index_select(0, self.late_sequences)
        rows, positions = (t.flatten(0, 1).index_select(0, at).view(-1) for t in (self.late_rows, self.late_positions))
        laws = [getattr(self, f"late_{name}").view(-1) for name in LAWS[:-1]]
        states = hidden_states.index_select(0, rows)
        return ops.lm_head_choose(states, head.weight, head.out_features, *[*laws, positions])


class Outcome(NamedTuple):
    """hidden_states ``[T, H]`` of all rows, and for the N rows and B sequences what came of them.

    drafts: tokens and logprobs of each `Late`, as many as it may have.
    """

    hidden_states: Tensor
    tokens: list[int]
    logprobs: list[float]
    accepted: list[int]
    committed: list[int]
    drafts: list[tuple[list[int], list[float]]]


# What runs on the device: no look at a value, no shape that follows from one.


def forward(model: "ZayaForCausalLM", cache: Cache, step: Step) -> tuple[Tensor, Tensor]:
    """Hidden states, and the projections from which the step is committed."""
    transaction = Transaction(cache, step, ())
    return model.decoder(transaction), transaction.projections


def decode(model: "ZayaForCausalLM", cache: Cache, x: Inputs) -> tuple[Tensor, Tensor]:
    """Hidden states, and int32 ``[2 N + 2 B]``: tokens, logprobs (as bits), accepted, committed. Commits.

    With `LateInputs` ``[2 N + 2 B + 2 S W]``: tokens and logprobs of the drafts that were chosen then.
    """
    head, transaction = model.heads.target, Transaction(cache, x, ())
    hidden_states = model.decoder(transaction)
    rows = hidden_states.index_select(0, x.head_rows)
    tokens, logprobs = ops.lm_head_choose(rows, head.weight, head.out_features, *x.laws)
    chosen = torch.cat([x.known, tokens]).index_select(0, x.source)
    accepted, committed, commit_rows, _ = ops.verify_tokens(x.token_ids, chosen, x.cu_rows, x.lengths, x.limits)
    transaction.commit_states(commit_rows)
    found = [tokens, logprobs.view(torch.int32), accepted, committed]
    if isinstance(x, LateInputs):
        drafts, draft_logprobs = x.choose(head, hidden_states, committed)
        found += [drafts, draft_logprobs.view(torch.int32)]
    return hidden_states, torch.cat(found)


def read_outcome(outputs: tuple[Tensor, ...], x: Inputs, shape: "Shape") -> Outcome:
    """Waits for the step; shape: of what was run, with padding."""
    hidden_states, packed = outputs[0], outputs[1].cpu()
    heads, sequences, (S, _, W) = shape.heads or 0, shape.sequences, shape.late or (0, 0, 0)
    ints, floats = packed.tolist(), packed.view(torch.float32).tolist()
    T, N, B = len(x.token_ids), len(x.head_rows), len(x.lengths)
    own, _, most = Shape.of(x).late or (0, 0, 0)
    accepted, committed, drafts = 2 * heads, 2 * heads + sequences, 2 * (heads + sequences)
    firsts = [drafts + i * W for i in range(own)]
    return Outcome(
        hidden_states[:T],
        ints[:N],
        floats[heads : heads + N],
        ints[accepted : accepted + B],
        ints[committed : committed + B],
        [(ints[i : i + most], floats[i + S * W : i + S * W + most]) for i in firsts],
    )


class EagerRunner:
    """Computes steps as they come.

    Attributes:
        late: Whether `decode` shall choose drafts that follow from what is committed, in which rows may be for nothing:
            what a GPU does in a graph is no wait for the host more, and its head reads the same weights.
    """

    late = False

    def __init__(self, model: "ZayaForCausalLM") -> None:
        self.model = model

    def open(self, tokens: int, slots: int) -> Cache:
        """A cache for a run over `slots` sequences that hold `tokens` tokens together; empty."""
        return self.model.new_cache(tokens, slots)

    def close(self, cache: Cache) -> None:
        """The run is over, its sequences are released."""

    def forward(self, cache: Cache, step: Step, sequences: Sequence[CachedSequence]) -> tuple[Tensor, Transaction]:
        """Hidden states, and what is to be committed. Tensors are those of the next step after the next call."""
        transaction = cache.begin(step.to(self.model.device), sequences)
        return self.model.decoder(transaction), transaction

    def decode(self, cache: Cache, x: Inputs) -> Outcome:
        """Runs and commits a step; the lengths of its sequences are the caller's to move."""
        return read_outcome(decode(self.model, cache, x.to(self.model.device)), x, Shape.of(x))


# Shapes and their buffers


def few(n: int) -> int:
    """n or a little more, of eight sizes per power of two."""
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


def power(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


class Shape(NamedTuple):
    """Sizes of a step with padding; heads is None where the layers run alone."""

    rows: int
    sequences: int
    pages: int  # of a sequence
    heads: int | None
    late: tuple[int, ...] | None = None  # S, P, W of `LateInputs`

    @staticmethod
    def of(x: Step) -> "Shape":
        """Without padding."""
        heads = len(x.head_rows) if isinstance(x, Inputs) else None
        late = tuple(x.late_rows.shape) if isinstance(x, LateInputs) else None
        return Shape(len(x.token_ids), len(x.state_slots), x.page_table.shape[1], heads, late)

    @staticmethod
    def holding(x: Step) -> "Shape":
        rows = few(len(x.token_ids))
        sequences = few(len(x.state_slots) + (rows > len(x.token_ids)))  # padding is a sequence
        # Rows are few or many with those that decide, and the head costs little more for twice as many.
        heads = (power(len(x.head_rows), 8) if len(x.head_rows) else 0) if isinstance(x, Inputs) else None
        late = tuple(few(n) for n in x.late_rows.shape) if isinstance(x, LateInputs) else None
        return Shape(rows, sequences, power(x.page_table.shape[1], 8), heads, late)

    def sizes(self, x: Step) -> dict[str, tuple[int, ...]]:
        """Of each field of x."""
        named = {"cu_rows": (self.sequences + 1,), "page_table": (self.sequences, self.pages)}
        T, B, N = ((size,) for size in (self.rows, self.sequences, self.heads or 0))
        S, P, W = self.late or (0, 0, 0)
        named |= {"late_sequences": (S,), "late_tables": (S,), "late_rows": (S, P, W), "late_positions": (S, P, W)}
        named |= {f"late_{name}": (S, W) for name in LAWS[:-1]}
        named = {f.name: named[f.name] for f in fields(x) if f.name in named}
        rows, sequences = {"known", "source", "token_ids"}, {"lengths", "limits", "state_slots"}
        for f in fields(x):
            if f.name not in named:
                by_row = f.name in rows or f.name.startswith("row_")
                named[f.name] = T if by_row else B if f.name in sequences else N
        return named


class Buffers:
    """A step of one shape in memory that stays: one piece on the host, one on the device.

    Args:
        shape: Its sizes.
        like: A step with its fields.
        device: Of the second piece.
    """

    def __init__(self, shape: Shape, like: Step, device: torch.device) -> None:
        self.shape = shape
        sizes = shape.sizes(like)
        parts = [(getattr(like, f.name).dtype, sizes[f.name]) for f in fields(like)]
        total = sum(room_for(part) for part in parts)
        self.host_bytes = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.bytes = torch.empty(total, dtype=torch.uint8, device=device)
        self.host, self.inputs = (type(like)(*views(piece, parts)) for piece in (self.host_bytes, self.bytes))

    def fill(self, x: Step) -> None:
        """Copies a step in, with padding."""
        T, rows = len(x.token_ids), self.shape.rows
        padding = {"row_parents": -1, "row_slots": -1, "row_states": EMPTY_SLOT, "state_slots": EMPTY_SLOT, "top_p": 1}
        padding |= {"row_group_begin": T, "row_group_end": rows, "cu_rows": rows, "late_top_p": 1}
        if isinstance(x, LateInputs):  # more of the first one, whose commits the tables have an entry for
            padding["late_sequences"] = int(x.late_sequences[0])
        for f in fields(x):
            own, room = getattr(x, f.name), getattr(self.host, f.name)
            if own.shape != room.shape:
                room.fill_(padding.get(f.name, 0))
            room[tuple(slice(0, n) for n in own.shape)] = own
        if isinstance(x, Inputs) and isinstance(self.host, Inputs):
            self.host.source[:T] += (x.source >= T) * (rows - T)
        if isinstance(x, LateInputs) and isinstance(self.host, LateInputs):
            S, P = len(x.late_tables), self.host.late_rows.shape[1]
            self.host.late_tables[:S] = torch.arange(S) * P
        self.bytes.copy_(self.host_bytes, non_blocking=True)

    def step(self, x: Step) -> Step:
        """The tensors on the device, of x and without padding."""
        cut = (getattr(self.inputs, f.name)[tuple(slice(0, n) for n in getattr(x, f.name).shape)] for f in fields(Step))
        return Step(*(part.contiguous() for part in cut))


# Graphs


@dataclass
class Captured:
    """What a capture gives: replay() computes the outputs anew from what is in the memory that the function read."""

    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]
    nbytes: int  # of device memory that it holds


Capture = Callable[[Callable[[], tuple[Tensor, ...]]], Captured]


class CudaCapture:
    """Captures functions as CUDA or HIP graphs, which share a pool of memory: no two of them run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.anchor: Captured | None = None  # for the pool must not be without a graph, whichever are given up

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> Captured:
        with torch.cuda.device(self.device):
            if self.anchor is None:
                self.pool = torch.cuda.graph_pool_handle()
                self.anchor = self._capture(lambda: (torch.zeros(1, device=self.device),))
            return self._capture(function)

    def _capture(self, function: Callable[[], tuple[Tensor, ...]]) -> Captured:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = function()
        return Captured(graph.replay, outputs, max(0, free - torch.cuda.mem_get_info()[0]))


class StepGraph:
    """Steps of one shape: their buffers, and the graph from the second time on.

    The first time runs without one, for a first call may load code, which a capture does not allow, and many shapes
    come once.
    """

    def __init__(self, buffers: Buffers, function: Callable[[Cache, Step], tuple[Tensor, ...]], cache: Cache) -> None:
        self.buffers, self.uses = buffers, 0
        self.run = partial(function, cache, buffers.inputs)
        self.captured: Captured | None = None

    @property
    def nbytes(self) -> int:
        return self.buffers.bytes.nbytes + (self.captured.nbytes if self.captured else 0)

    def __call__(self, capture: Capture) -> tuple[Tensor, ...]:
        self.uses += 1
        if self.uses == 1:
            return self.run()
        if self.captured is None:
            self.captured = capture(self.run)
            log.info("captured %s, %.1f MB", self.buffers.shape, self.captured.nbytes / 1e6)
        self.captured.replay()
        return self.captured.outputs


class GraphRunner(EagerRunner):
    """Runs steps as graphs. The graphs of least recent use go where all would hold more than `max_bytes`.

    They belong to one cache, which is kept from run to run and given up with them when a larger one is needed. A run
    that begins while another has that cache, and steps of more than `max_rows` rows, do without graphs.
    """

    def __init__(
        self, model: "ZayaForCausalLM", capture: Capture, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES
    ) -> None:
        super().__init__(model)
        self.late = True
        self.capture, self.max_rows, self.max_bytes = capture, max_rows, max_bytes
        self.graphs: OrderedDict[Shape, StepGraph] = OrderedDict()
        self.cache: Cache | None = None
        self.lent = False

    def open(self, tokens: int, slots: int) -> Cache:
        if self.lent:
            return super().open(tokens, slots)
        if self.cache is None or not self._fits(self.cache, tokens, slots):
            self.graphs.clear()
            self.cache = None  # before the new one, so that there is memory
            tokens, slots = max(tokens, self.model.kv_cache_tokens), max(slots, self.model.max_batch_size)
            self.cache = self.model.new_cache(tokens, slots)
        self.lent = True
        return self.cache

    @staticmethod
    def _fits(cache: Cache, tokens: int, slots: int) -> bool:
        return slots <= len(cache.free_slots) and cache.pages_for(tokens) + slots <= len(cache.free_pages)

    def close(self, cache: Cache) -> None:
        if cache is self.cache:
            self.lent = False

    def forward(self, cache: Cache, step: Step, sequences: Sequence[CachedSequence]) -> tuple[Tensor, Transaction]:
        graph = self._graph(cache, step)
        if graph is None:
            return super().forward(cache, step, sequences)
        hidden_states, projections = self._run(graph)
        T = len(step.token_ids)
        transaction = cache.begin(graph.buffers.step(step), sequences)
        transaction.projections = projections[:, :T].contiguous()
        return hidden_states[:T], transaction

    def decode(self, cache: Cache, x: Inputs) -> Outcome:
        graph = self._graph(cache, x)
        if graph is None:
            return super().decode(cache, x)
        return read_outcome(self._run(graph), x, graph.buffers.shape)

    def _graph(self, cache: Cache, x: Step) -> StepGraph | None:
        """That of the step's shape, the step in its buffers; None where there shall be none."""
        if cache is not self.cache or len(x.token_ids) > self.max_rows:
            return None
        shape = Shape.holding(x)
        if shape not in self.graphs:
            self.graphs[shape] = self._new_graph(shape, x)
        self.graphs.move_to_end(shape)
        graph = self.graphs[shape]
        graph.buffers.fill(x)
        return graph

    def _new_graph(self, shape: Shape, x: Step) -> StepGraph:
        function = forward if shape.heads is None else decode
        buffers = Buffers(shape, x, self.model.device)
        return StepGraph(buffers, partial(function, self.model), self.cache)

    def _run(self, graph: StepGraph) -> tuple[Tensor, ...]:
        outputs = graph(self.capture)
        while len(self.graphs) > 1 and self.nbytes > self.max_bytes:
            self.graphs.popitem(last=False)
        return outputs

    @property
    def nbytes(self) -> int:
        """Of device memory that the graphs hold."""
        return sum(graph.nbytes for graph in self.graphs.values())
