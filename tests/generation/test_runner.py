"""Steps as graphs give the tokens of steps as they come, whatever the requests; graphs are captured by a stand-in."""

import random
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from blockdraft import SamplingParams, ZayaForCausalLM, calibrate, generate, ops, runner
from blockdraft.cache import Cache, Transaction
from blockdraft.calibrate import Forward
from blockdraft.plan import Plan
from blockdraft.runner import Buffers, EagerRunner, GraphRunner, Inputs, Late, LateInputs, Shape
from blockdraft.sample import Part
from blockdraft.steps import EMPTY_SLOT, Block, Group, Step, make_step
from generation.recording import CaptureError, RecordingCapture, use_graphs

MASK = 4
# Hot, for the model would repeat itself: token ids must differ from step to step where stale ones are to show.
LAWS = [
    {"temperature": 4.0},
    {"temperature": 6.0, "top_p": 0.9},
    {"temperature": 5.0, "top_k": 30},
    {"temperature": 0.0},
]
DEVICE_WAYS = [
    {"sampler": "ar"},
    {},
    {"groups": 0},
    {"groups": 2},
    {"drafter": "ngram"},
    {"drafter": lambda known, count: [known[-1]] * count},
    {"block_length": 5, "groups": 5},
]
PINNED = [way for way in DEVICE_WAYS if "groups" in way or way.get("sampler") == "ar"]  # the same steps every time
# Ways that look at logits, or whose tokens follow from hidden states of earlier steps.
HOST_WAYS = [
    {"verification": "rejection", "groups": 1},
    {"logprobs": 2, "groups": 0},
    {"repetition_penalty": 1.2, "groups": 1},
    {"sampler": "mixed", "mix": 0.4, "groups": 1},
    {"sampler": "denoise", "denoising_steps": 3, "block_length": 6},
]


@pytest.fixture
def model(tiny: ZayaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[ZayaForCausalLM]:
    for name, value in (("kv_cache_tokens", 600), ("max_batch_size", 5), ("runner", EagerRunner(tiny))):
        monkeypatch.setattr(tiny, name, value)
    return tiny


def requests(seed: int, count: int, ways: list[dict]) -> tuple[list[list[int]], list[SamplingParams]]:
    draw = random.Random(seed)
    prompts = [[draw.randrange(5, 95) for _ in range(draw.choice([1, 2, 7, 31, 33, 60]))] for _ in range(count)]
    params = [
        SamplingParams(
            max_tokens=draw.randrange(1, 40), seed=draw.randrange(99), **draw.choice(LAWS), **draw.choice(ways)
        )
        for _ in range(count)
    ]
    return prompts, params


def tokens(
    model: ZayaForCausalLM, asked: tuple[list[list[int]], list[SamplingParams]]
) -> list[list[tuple[int, float]]]:
    """With their log-probabilities, in which every bit of a hidden state shows."""
    found = [[] for _ in asked[0]]
    for event in model.stream(*asked):
        found[event.request] += zip(event.token_ids, event.logprobs, strict=True)
    return found


def assert_same_tokens(model: ZayaForCausalLM, *several: tuple[list[list[int]], list[SamplingParams]]) -> GraphRunner:
    model.runner = EagerRunner(model)
    expected = [tokens(model, asked) for asked in several]
    graphs = use_graphs(model)
    assert [tokens(model, asked) for asked in several] == expected
    assert graphs.capture.replays > 0
    return graphs


@pytest.mark.parametrize("seed", range(3))
def test_random_batches(model, seed):
    """Prompts of all lengths come in while others decode, each by a way and a law of its own; plans change."""
    runner = assert_same_tokens(model, requests(seed, 9, DEVICE_WAYS), requests(seed + 50, 6, DEVICE_WAYS))
    assert {shape.heads is None for shape in runner.graphs} == {False}


@pytest.mark.parametrize("way", range(len(HOST_WAYS)))
def test_ways_that_look_at_logits(model, way):
    runner = assert_same_tokens(model, requests(way, 4, [HOST_WAYS[way]]), requests(way, 4, [HOST_WAYS[way], {}]))
    assert any(shape.heads is None for shape in runner.graphs) or "denoise" in HOST_WAYS[way].values()


def test_requests_that_are_given_up(model):
    """In the middle of a run, and while another one goes on that has no graphs then."""
    asked, others = requests(7, 8, DEVICE_WAYS), requests(8, 5, DEVICE_WAYS)
    expected = tokens(model, asked), tokens(model, others)
    graphs = use_graphs(model)
    for events in (1, 5, 12):
        stream = model.stream(*asked)
        for _ in range(events):
            next(stream)
        beside = tokens(model, others)
        stream.close()
        assert (tokens(model, asked), beside) == expected
    free = graphs.cache.free_pages, graphs.cache.free_slots
    assert [sorted(numbers) for numbers in free] == [list(range(graphs.cache.num_pages)), list(range(1, 6))]


def test_a_failed_run_leaves_room(model):
    use_graphs(model)
    failing = SamplingParams(drafter=lambda known, count: [1000], groups=0, max_tokens=8)
    with pytest.raises(ValueError, match="drafter must return"):
        model.generate([[5, 6, 7]] * 3, failing)
    asked = requests(3, 6, DEVICE_WAYS)
    assert_same_tokens(model, asked)


def test_cache_and_page_tables_grow(model):
    """Graphs of the smaller cache go with it; longer sequences have shapes of their own."""
    short, long = requests(1, 5, DEVICE_WAYS), ([list(range(5, 95)) * 6], [SamplingParams(max_tokens=20, groups=1)])
    model.kv_cache_tokens = 900
    expected = tokens(model, short), tokens(model, long)
    graphs = use_graphs(model)
    model.kv_cache_tokens = 300
    assert tokens(model, short) == expected[0]
    small = graphs.cache
    model.kv_cache_tokens = 900
    assert (tokens(model, long), tokens(model, short)) == expected[::-1]
    assert graphs.cache is not small
    assert {shape.pages for shape in graphs.graphs} == {8, 32}


def test_steps_of_many_rows_have_no_graph(model):
    asked = ([[5, 6, 7, 8] * 20] * 2, [SamplingParams(max_tokens=8, groups=0)] * 2)
    expected = tokens(model, asked)
    graphs = use_graphs(model, max_rows=17)
    assert tokens(model, asked) == expected
    assert graphs.graphs
    assert max(shape.rows for shape in graphs.graphs) <= 17


# Drafts that follow from what is committed


def steps_taken(model: ZayaForCausalLM, asked: tuple[list[list[int]], list[SamplingParams]]) -> list[list[tuple]]:
    """What each request verified and what waited after it; tokens alone do not tell one draft from another."""
    found = [[] for _ in asked[0]]
    for event in model.stream(*asked):
        about = event.kind, event.accepted, event.drafted, event.draft_logprobs, event.provisional
        found[event.request].append((*about, event.token_ids, event.logprobs))
    return found


def drafting_requests(seed: int, groups: int | tuple[int, ...], **more: object) -> tuple[list, list[SamplingParams]]:
    """Cold and hot: what holds is from nothing to all. Beside them one that does not draft."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(5, 95) for _ in range(draw.choice([1, 3, 20, 40]))] for _ in range(6)]
    laws = [{"temperature": draw.choice([0.0, 0.02, 0.1, 4.0]), "top_p": draw.choice([1.0, 0.9])} for _ in range(6)]
    ways = [{"groups": groups, **more}] * 5 + [{"sampler": "ar"}]
    counts = [draw.randrange(10, 40) for _ in range(6)]
    params = [
        SamplingParams(max_tokens=n, seed=draw.randrange(99), ignore_eos=True, **law, **way)
        for n, law, way in zip(counts, laws, ways, strict=True)
    ]
    return prompts, params


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("groups", [0, 1, 3, 16])
def test_drafts_chosen_in_the_graph(model, monkeypatch, groups, seed):
    """The very drafts and log-probabilities that the host chooses from the same groups; nothing is chosen after it."""
    asked = drafting_requests(seed, groups)
    expected = [steps_taken(model, asked) for _ in range(2)]
    graphs = use_graphs(model)
    monkeypatch.setattr("blockdraft.generate.decide", lambda *arguments: pytest.fail("a choice outside the step"))
    assert [steps_taken(model, asked) for _ in range(2)] == expected
    verified = [event for request in expected[0] for event in request if event[0] == "verify"]
    assert len({event[1] for event in verified}) > 3
    assert any(graph.captured for shape, graph in graphs.graphs.items() if shape.late) == (groups > 0)


@pytest.mark.parametrize("layout", ["extra_first_mask", "masks_after_anchor"])
def test_drafts_of_groups_at_any_accept_length(model, monkeypatch, layout):
    monkeypatch.setattr(model, "config", replace(model.config, draft_layout=layout))
    asked = drafting_requests(5, (6, 0, 2), block_length=9)
    expected = steps_taken(model, asked)
    use_graphs(model)
    assert steps_taken(model, asked) == expected
    assert steps_taken(model, asked) == expected


def late_faults() -> Iterator[tuple[str, Callable[[pytest.MonkeyPatch], None]]]:
    def with_firsts(change: Callable[[list[int]], list[int]]) -> Callable[[pytest.MonkeyPatch], None]:
        rows = Part.first_draft_rows
        return lambda patch: patch.setattr(Part, "first_draft_rows", lambda self: change(rows(self)))

    def with_positions(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(generate, "Late", lambda i, firsts, position: runner.Late(i, firsts, position + 1))

    def of_the_first_alone(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(generate, "Late", lambda i, firsts, position: runner.Late(0, firsts, position))

    yield "one row on", with_firsts(lambda firsts: [n + 1 for n in firsts])
    yield "as if nothing more held", with_firsts(lambda firsts: [firsts[1]] * len(firsts))
    yield "other positions", with_positions
    yield "what another sequence committed", of_the_first_alone

    def with_mixed_up(name: str, dim: int) -> Callable[[pytest.MonkeyPatch], None]:
        fill = Buffers.fill

        def changed(self: Buffers, x: Step) -> None:
            fill(self, x)
            if isinstance(x, LateInputs):
                room = getattr(self.inputs, name)
                own = room[tuple(slice(0, n) for n in getattr(x, name).shape)]
                own.copy_(own.flip(dim))

        return lambda patch: patch.setattr(Buffers, "fill", changed)

    for name in ("late_positions", "late_seeds", "late_temperature"):
        yield f"stale {name}", without_copying(name)
    for name, dim in (("late_rows", 1), ("late_sequences", 0), ("late_tables", 0)):
        yield f"mixed up {name}", with_mixed_up(name, dim)


@pytest.mark.parametrize("fault", range(10))
def test_wrong_drafts_show(model, monkeypatch, fault):
    several = [drafting_requests(seed, 3) for seed in (0, 1)]
    expected = [steps_taken(model, asked) for asked in several]
    use_graphs(model)
    name, mutate = list(late_faults())[fault]
    mutate(monkeypatch)
    try:
        shown = [steps_taken(model, asked) for asked in (*several, *several)] != expected * 2
    except (AssertionError, CaptureError, RuntimeError):
        shown = True
    assert shown, name


def test_first_draft_rows_are_those_of_each_count():
    draw = random.Random(3)
    for _ in range(200):
        causal = draw.randrange(1, 18)
        levels = draw.sample(range(causal), draw.randrange(0, causal + 1))
        groups = [Group(level, [MASK] * draw.randrange(1, 17), draw.randrange(2)) for level in levels]
        part = Part(None, "verify", Block(9, 1, [1], [7] * causal, groups), 0, Plan(), first=draw.randrange(50))
        firsts = part.first_draft_rows()
        assert len(firsts) == causal + 1
        for n, first in enumerate(firsts):
            rows, _ = part.draft_rows(n)
            assert not rows or rows[0] == first


# Memory


def test_graphs_of_least_recent_use_go(model):
    asked = requests(2, 8, DEVICE_WAYS)
    expected = tokens(model, asked)
    graphs = use_graphs(model, nbytes=3_000, max_bytes=20_000)
    seen, run = [], graphs._run
    sizes = []

    def watched(graph: runner.StepGraph) -> tuple[Tensor, ...]:
        outputs = run(graph)
        seen.append(graph.buffers.shape)
        sizes.append(graphs.nbytes)
        order = [shape for i, shape in enumerate(seen) if shape not in seen[i + 1 :]]
        assert list(graphs.graphs) == order[len(order) - len(graphs.graphs) :]
        return outputs

    graphs._run = watched
    assert tokens(model, asked) == expected
    assert max(sizes) <= 20_000
    assert max(sizes) > 15_000
    assert len(set(seen)) > len(graphs.graphs) > 1


def test_one_graph_is_kept_where_there_is_room_for_none(model):
    asked = ([[5, 6, 7]], [SamplingParams(max_tokens=20, sampler="ar", ignore_eos=True)])
    expected = tokens(model, asked)
    graphs = use_graphs(model, max_bytes=0)
    assert tokens(model, asked) == expected
    assert (graphs.capture.captures, len(graphs.graphs)) == (1, 1)
    assert graphs.capture.replays == 18


# Padding

PLAIN = {"rows": 0, "sequences": 0, "pages": 0, "heads": 0}
each_padding = pytest.mark.parametrize(
    "more", [PLAIN, PLAIN | {"rows": 1}, PLAIN | {"rows": 13, "sequences": 2, "pages": 3, "heads": 5}], ids=str
)


def steps_of(cache: Cache, lengths: list[int]) -> list[Step]:
    """Prompts of these lengths, then for each of them a block with mask groups."""
    draw = random.Random(1)
    sequences = [cache.allocate(length + 40) for length in lengths]
    prompts = [[draw.randrange(5, 95) for _ in range(n)] for n in lengths]
    first = [Block(0, s.slot, s.pages, p) for s, p in zip(sequences, prompts, strict=True)]
    groups = [[], [Group(0, [MASK] * 4)], [Group(2, [MASK] * 5), Group(0, [MASK] * 3)]]
    then = [
        Block(n, s.slot, s.pages, [draw.randrange(5, 95) for _ in range(1 + 2 * i)], groups[i])
        for i, (s, n) in enumerate(zip(sequences, lengths, strict=True))
    ]
    return [make_step(blocks, cache.page_size) for blocks in (first, then)]


def inputs_of(step: Step, limit: int) -> Inputs:
    """Every row decides a token, and every sequence may commit up to `limit` rows that are causal."""
    T, ends = len(step.token_ids), step.cu_rows.tolist()
    causal = (step.row_slots >= 0).tolist()
    lengths = [sum(causal[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    generator = torch.Generator().manual_seed(T)
    temperature = torch.tensor([0.0, 0.7, 1.3])[torch.arange(T) % 3]
    laws = [temperature, *(torch.full((T,), x, dtype=d) for x, d in ((0, torch.int32), (0.9, None), (0.0, None)))]
    laws += [torch.randint(99, (T,), generator=generator), torch.zeros(T, dtype=torch.int32), step.row_positions + 1]
    return Inputs.of(step, range(T), laws, [(r, r) for r in range(T)], lengths, [min(n, limit) for n in lengths])


def whole(cache: Cache) -> list[Tensor]:
    return [cache.k_pages, cache.v_pages, cache.conv_states, cache.recurrent_states]


def assert_padding_changes_nothing(model: ZayaForCausalLM, more: dict[str, int]) -> None:
    """Same bits of the real rows, of every page and of every state, after two steps; padding knows no page at all."""
    lengths = [33, 5, 40]
    exact, padded, other = (model.new_cache(300, 3) for _ in range(3))
    for a, b in zip(whole(exact)[:2], whole(padded)[:2], strict=True):  # of pages that nobody may touch
        b.copy_(a.copy_(torch.randn(a.shape)))
    with torch.inference_mode():
        for i, (left, right) in enumerate(zip(steps_of(exact, lengths), steps_of(padded, lengths), strict=True)):
            x, y = inputs_of(left, 99 if i == 0 else 3), inputs_of(right, 99 if i == 0 else 3)
            sizes = (len(y.token_ids), len(y.lengths), y.page_table.shape[1], len(y.head_rows))
            shape = Shape(*(n + extra for n, extra in zip(sizes, more.values(), strict=True)))
            shape = shape._replace(sequences=max(shape.sequences, sizes[1] + (more["rows"] > 0)))
            buffers = Buffers(shape, y, model.device)
            buffers.fill(y)
            expected = runner.read_outcome(runner.decode(model, exact, x), x, Shape.of(x))
            outputs = runner.decode(model, padded, buffers.inputs)
            buffers.fill(replace(y, token_ids=y.token_ids.flip(0)))
            others = runner.decode(model, other, buffers.inputs)
            behind, elsewhere = (hidden_states[len(y.token_ids) :] for hidden_states, _ in (outputs, others))
            assert torch.equal(behind, elsewhere)
            assert torch.equal(behind, behind[:1].expand_as(behind))
            got = runner.read_outcome(outputs, y, shape)
            assert torch.equal(got.hidden_states, expected.hidden_states)
            assert got[1:] == expected[1:]
            assert sum(got.committed) > 0
    assert all(torch.equal(a, b) for a, b in zip(whole(exact), whole(padded), strict=True))
    assert not any(x[:, EMPTY_SLOT].any() for x in whole(padded)[2:])


@each_padding
def test_padding_changes_no_bit(model, more):
    assert_padding_changes_nothing(model, more)


def test_shapes_hold_steps_with_little_padding():
    for n in range(1, 3000):
        assert n <= runner.few(n) <= n + n / 8
    assert len({runner.few(n) for n in range(1, 2049)}) == 72
    assert [runner.power(n, 8) for n in (1, 8, 9, 64, 65)] == [8, 8, 16, 64, 128]


def test_padding_is_a_sequence_of_its_own(tiny):
    cache = tiny.new_cache(3000, 64)
    for rows, others in ((16, 0), (17, 3), (19, 0), (33, 15), (64, 15)):
        blocks = [Block(0, 0, [1, 2], [7] * rows), *([Block(0, 1, [3], [7])] * others)]
        step = make_step(blocks, cache.page_size)
        shape = Shape.holding(step)
        assert shape.rows >= rows + others
        assert shape.sequences > others + 1 or shape.rows == rows + others


# The stand-in, and faults that it must show


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x * float(x[0]),
        lambda x, y: x * len(x.tolist()),
        lambda x, y: x if x.sum() > 0 else -x,
        lambda x, y: x[x > 0],
        lambda x, y: x.nonzero(),
        lambda x, y: x + torch.tensor([1.0, 2.0]),
        lambda x, y: x.cpu() + 1,
        lambda x, y: x.to("cpu") + 1,
        lambda x, y: x + y,
    ],
)
def test_capture_refuses(function):
    x, y = torch.ones(2), torch.ones(2)
    with pytest.raises(CaptureError):
        RecordingCapture(lambda: [x])(lambda: (function(x, y),))


def test_capture_replays_on_the_same_memory():
    x, sums = torch.ones(2), torch.zeros(2)
    captured = RecordingCapture(lambda: [x, sums])(lambda: (sums.add_(x) * 2,))
    assert sums.tolist() == [0, 0]
    assert captured.outputs[0].isnan().all()
    for value in (1, 5):
        x.fill_(value)
        captured.replay()
    assert captured.outputs[0].tolist() == [12, 12]


def without_copying(name: str):
    def mutate(patch: pytest.MonkeyPatch) -> None:
        fill = Buffers.fill

        def stale(self: Buffers, x: Step) -> None:
            before = getattr(self, "before", None)
            fill(self, x)
            if not hasattr(x, name):
                return
            self.before = getattr(self.inputs, name).clone()
            if before is not None:
                getattr(self.inputs, name).copy_(before)

        patch.setattr(Buffers, "fill", stale)

    return mutate


def reading_the_step_itself(patch: pytest.MonkeyPatch) -> None:
    new_graph = GraphRunner._new_graph

    def changed(self: GraphRunner, shape: Shape, x: Step) -> runner.StepGraph:
        graph = new_graph(self, shape, x)
        function = runner.forward if shape.heads is None else runner.decode
        graph.run = lambda: function(self.model, self.cache, graph.buffers.inputs if graph.uses < 2 else x)
        return graph

    patch.setattr(GraphRunner, "_new_graph", changed)


def keeping_graphs_of_the_old_cache(patch: pytest.MonkeyPatch) -> None:
    opened = GraphRunner.open

    def changed(self: GraphRunner, tokens: int, slots: int) -> Cache:
        kept = dict(self.graphs)
        cache = opened(self, tokens, slots)
        self.graphs.update(kept)
        return cache

    patch.setattr(GraphRunner, "open", changed)


def looking_at_a_length(patch: pytest.MonkeyPatch) -> None:
    commit = Transaction.commit_states
    patch.setattr(Transaction, "commit_states", lambda self, rows: commit(self, rows) if int(rows.max()) >= 0 else None)


def taking_a_step_for_a_shape(patch: pytest.MonkeyPatch) -> None:
    holding = Shape.holding
    patch.setattr(Shape, "holding", staticmethod(lambda x: holding(x)._replace(pages=8)))


def reading_the_state_of_another(patch: pytest.MonkeyPatch) -> None:
    fill = Buffers.fill

    def changed(self: Buffers, x: Step) -> None:
        fill(self, replace(x, row_states=torch.zeros_like(x.row_states)))

    patch.setattr(Buffers, "fill", changed)


MUTANTS = {
    "stale tokens": without_copying("token_ids"),
    "stale positions": without_copying("row_positions"),
    "stale slots": without_copying("row_slots"),
    "stale pages": without_copying("page_table"),
    "stale noise": without_copying("positions"),
    "stale prefixes": without_copying("row_prefix"),
    "not the buffers": reading_the_step_itself,
    "graphs of another cache": keeping_graphs_of_the_old_cache,
    "a value on the host": looking_at_a_length,
    "page table too narrow": taking_a_step_for_a_shape,
    "state of another": reading_the_state_of_another,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_faults_show(model, monkeypatch, mutant):
    def show() -> None:
        assert_same_tokens(model, requests(0, 9, PINNED), requests(50, 6, PINNED))
        test_cache_and_page_tables_grow(model)

    MUTANTS[mutant](monkeypatch)
    with pytest.raises((AssertionError, CaptureError, RuntimeError)):
        show()


WRONG_PADDING = {
    "keys into a page": {"row_slots": 0},
    "commits": {"lengths": 1, "limits": 1},
    "the state of a sequence": {"lengths": 1, "limits": 1, "state_slots": 1},
    "sees a page": {"row_prefix": 1},
    "a sequence that has no end": {"cu_rows": 0},
}


@pytest.mark.parametrize("fault", WRONG_PADDING)
def test_wrong_padding_shows(model, monkeypatch, fault):
    fill = Buffers.fill

    def changed(self: Buffers, x: Step) -> None:
        fill(self, x)
        for name, value in WRONG_PADDING[fault].items():
            getattr(self.inputs, name)[len(getattr(x, name)) :] = value

    monkeypatch.setattr(Buffers, "fill", changed)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_padding_changes_nothing(model, PLAIN | {"rows": 5, "sequences": 1})


def test_buffers_hold_the_last_step(model):
    """Every field of it, none of the one before."""
    first, last = (inputs_of(step, 3) for step in steps_of(model.new_cache(300, 3), [20, 6, 33]))
    shape = Shape(70, 5, 8, 64)
    buffers = Buffers(shape, first, model.device)
    for x in (first, last):
        buffers.fill(x)
        fresh = Buffers(shape, x, model.device)
        fresh.fill(x)
        for f in fields(Inputs):
            held, own = getattr(buffers.inputs, f.name), getattr(x, f.name)
            assert torch.equal(held, getattr(fresh.inputs, f.name)), f.name
            if f.name != "source":  # which counts from the padded rows on
                assert torch.equal(held[tuple(slice(0, n) for n in own.shape)], own), f.name


def late_inputs_of(step: Step, limit: int) -> LateInputs:
    """With drafts of the first sequence and of the last one, five and any rows."""
    x = inputs_of(step, limit)
    count = int(x.lengths.max()) + 1
    late = [Late(i, [(11 * i + n) % len(x.token_ids) for n in range(count)], 50 + i) for i in (0, len(x.lengths) - 1)]
    generator = torch.Generator().manual_seed(5)
    laws = [
        torch.tensor([0.0, 0.8, 1.2, 0.9, 0.0] * 2),
        torch.full((10,), 0, dtype=torch.int32),
        torch.full((10,), 0.9),
    ]
    laws += [torch.zeros(10), torch.randint(99, (10,), generator=generator), torch.arange(10, dtype=torch.int32)]
    return LateInputs.adding(x, late, laws)


@pytest.mark.parametrize("more", [(0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 2), (2, 5, 1)], ids=str)
def test_padding_changes_no_draft(model, more):
    """And they are what the head chooses for these rows, laws and positions."""
    caches = [model.new_cache(300, 3) for _ in range(2)]
    for left, right in zip(*(steps_of(cache, [33, 5, 40]) for cache in caches), strict=True):
        x, y = late_inputs_of(left, 3), late_inputs_of(right, 3)
        shape = Shape.of(y)
        shape = shape._replace(late=tuple(n + extra for n, extra in zip(shape.late, more, strict=True)))
        buffers = Buffers(shape._replace(rows=shape.rows + 4, sequences=shape.sequences + 1), y, model.device)
        buffers.fill(y)
        with torch.inference_mode():
            expected = runner.read_outcome(runner.decode(model, caches[0], x), x, Shape.of(x))
            got = runner.read_outcome(runner.decode(model, caches[1], buffers.inputs), y, buffers.shape)
        assert got.drafts == expected.drafts
        assert got[1:5] == expected[1:5]
        for own, (i, tokens) in enumerate(zip((0, 2), (drafts[0] for drafts in got.drafts), strict=True)):
            n = got.committed[i]
            rows = [min((11 * i + n) % len(x.token_ids) + j, len(x.token_ids) - 1) for j in range(5)]
            laws = [getattr(x, f"late_{name}")[own] for name in runner.LAWS[:-1]]
            positions = torch.arange(5, dtype=torch.int32) + 50 + i + n
            head = model.heads.target
            states = got.hidden_states[rows].contiguous()
            assert tokens == ops.lm_head_choose(states, head.weight, head.out_features, *laws, positions)[0].tolist()


def test_every_field_is_padded(tiny):
    """A field that is added to a step has to be thought of."""
    step = make_step([Block(0, 0, [1], [7] * 17)], 32)
    shape = Shape(20, 3, 8, 8)
    assert set(shape.sizes(inputs_of(step, 1))) == {f.name for f in fields(Inputs)}
    late = late_inputs_of(step, 1)
    assert set(shape._replace(late=(2, 3, 4)).sizes(late)) == {f.name for f in fields(LateInputs)}
    assert shape.sizes(step)["row_slots"] == (20,)
    assert shape.sizes(step)["state_slots"] == (3,)


# What `blockdraft calibrate` times


def test_calibrate_times_replays(model, monkeypatch):
    """Every timed step is the replay of a graph that was captured before, and the kept cache is left as it was."""
    graphs = use_graphs(model)
    runs, shapes = [], []
    run, decode, verify_ms = Forward.run, GraphRunner.decode, calibrate._verify_ms

    def watched(forward: Forward) -> float:
        before = graphs.capture.captures, graphs.capture.replays
        assert run(forward) > 0
        captures, replays = graphs.capture.captures - before[0], graphs.capture.replays - before[1]
        runs.append((captures, replays))
        return 1.0 if (captures, replays) == (0, 1) else 1e9

    def counted(self: GraphRunner, cache: Cache, x: Inputs) -> runner.Outcome:
        shapes.append((len(x.lengths), len(x.token_ids), len(x.head_rows)))
        return decode(self, cache, x)

    def afterwards(*arguments: object) -> tuple[float, float]:
        assert not graphs.lent
        assert len(graphs.cache.free_pages) == graphs.cache.num_pages
        assert not any(x.any() for x in whole(graphs.cache)[2:])  # nothing was committed
        return verify_ms(*arguments)

    monkeypatch.setattr(Forward, "run", watched)
    monkeypatch.setattr(calibrate, "_verify_ms", afterwards)
    monkeypatch.setattr(GraphRunner, "decode", counted)
    monkeypatch.setattr(calibrate, "ROWS", (1, 8, 16, 19))
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    table = calibrate.measure(model, context=16, rounds=1)
    assert table.ms == (1e3,) * 4
    assert runs[-12:].count((0, 1)) == 12
    assert {(1, 1, 1), (1, 8, 8), (1, 16, 16), (1, 19, 16), (8, 8, 8)} <= set(shapes)
    assert [shape.rows for shape in graphs.graphs if shape.late] == [16]
    assert_same_tokens(model, requests(4, 4, DEVICE_WAYS))


def test_calibrate_gives_its_cache_back_where_a_step_fails(model, monkeypatch):
    graphs = use_graphs(model)
    monkeypatch.setattr(GraphRunner, "decode", lambda self, cache, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate.measure(model, context=16, rounds=1)
    assert not graphs.lent
    assert len(graphs.cache.free_pages) == graphs.cache.num_pages
