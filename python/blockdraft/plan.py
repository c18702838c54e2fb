"""What the next forward of each sequence is: plain decoding, or a block to verify with how many mask groups beside it.

The planner compares options by predicted tokens per second: tokens from the acceptance that this request and the ones
before it have shown, seconds from a table of measured forwards (`blockdraft calibrate`). A table decides, never a clock
in the loop, so that a run can be repeated.
"""

import hashlib
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import torch

from blockdraft.errors import RequestError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.expert_formats import expert_bytes

MAX_BLOCK = 32
# Where nothing is known: half of the drafts hold, which four verified ones outweigh.
PRIOR_RATE, PRIOR_WEIGHT = 0.5, 4.0
# A request trusts its own verifications over the model's after about as many.
REQUEST_WEIGHT = 8.0
# Predicted time that may be lost to drafts beyond what they saved: a share of all time, and forwards at the start. A
# trial of the bundled model at T = 0.8 takes two to four times what the table says (mask rows touch experts that no
# other step keeps in the cache, and a draw takes longer than an argmax): with a share of 0.005, 2% were lost.
LOSS_SHARE, FIRST_LOSSES = 0.001, 2.0
# Predicted speedup from which on drafting is worth it. Predictions err: n-gram drafts at batch 8 and T = 0.8, where all
# rows but one a sequence are extra work, were taken at a predicted gain and lost 14%.
LEAST_GAIN = 1.1
LEAST_REACHED = 0.05  # a draft that holds more rarely than this is the last one of a block that is thought of
# Following a text and planning blocks that hardly pay takes some 8 us a token: 6% of the bundled model's forward for
# eight sequences. Where n-grams gained less, over some hundred tokens, they rest for 63 of 64 periods; one without gain
# costs up to a tenth of its time.
FOLLOWING_MS, LEAST_FOLLOWED, MOST_RESTS = 0.008, 256, 63
REPLAN_STEPS = 8  # planning costs tens of microseconds a sequence, a forward of the smallest model a millisecond

Kind = tuple[str, str]  # of drafts: whose they are, and how they are tested
Likeness = tuple[Kind, int, int]  # of samples: their drafts, rows of a mask group, rows of a block


@dataclass(frozen=True)
class Plan:
    """A sequence's share of a forward.

    Attributes:
        rows: Causal rows: the anchor and the drafts to verify.
        levels: Accept lengths that get a mask group.
        reason: In words.
    """

    rows: int = 1
    levels: tuple[int, ...] = ()
    reason: str = "pinned"

    @property
    def name(self) -> str:
        if self.rows == 1:
            return "draft" if self.levels else "ar"
        return f"verify+{len(self.levels)}" if self.levels else "verify"


@cache
def spread_levels(groups: int, block_length: int) -> tuple[int, ...]:
    """Accept lengths for `groups` groups: all accepted first, then none, then the ones between, denser at the low end.

    Acceptance has two peaks, at the ends (measured by the vendor: P(0) 27%, P(all) 28%, some 5% each between).
    """
    last = block_length - 1
    if groups > last:
        return tuple(range(block_length))
    if groups <= 1:
        return (last,) * groups
    levels = {round(last * (i / (groups - 1)) ** 1.5) for i in range(groups)}
    spare = (level for level in range(block_length) if level not in levels)
    while len(levels) < groups:
        levels.add(next(spare))
    return tuple(sorted(levels))


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of a forward by its rows, and per further sequence in it.

    Attributes:
        rows, ms: Measured points, rows ascending; straight lines between and beyond.
        sequence_ms: Added by each sequence but the first.
        late_ms: Added where drafts are chosen after verification, from a mask group beside the verified rows.
        verify_ms: Added by each sequence that verifies: what is done for it besides its rows.
        mixed_ms: Added by each sequence but the first to a forward in which one verifies.
        source: Where it is from.
    """

    rows: tuple[int, ...]
    ms: tuple[float, ...]
    sequence_ms: float = 0.0
    late_ms: float = 0.0
    verify_ms: float = 0.0
    mixed_ms: float = 0.0
    source: str = "modelled"

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        if len(self.rows) < 2 or len(self.rows) != len(self.ms) or not ascending or min(self.ms) <= 0:
            raise RequestError(f"cost table: wanted ascending rows and positive ms, two at least, got {self}")

    def time(self, rows: float, sequences: float, verifying: float = 0.0) -> float:
        """Predicted milliseconds of a forward with `sequences` sequences, of which some verify."""
        i = 1
        while i < len(self.rows) - 1 and self.rows[i] < rows:
            i += 1
        (r0, r1), (t0, t1) = self.rows[i - 1 : i + 1], self.ms[i - 1 : i + 1]
        each = self.sequence_ms + min(1.0, verifying) * self.mixed_ms
        more = max(0.0, sequences - 1) * each + verifying * self.verify_ms
        return t0 + (rows - r0) * max(0.0, t1 - t0) / (r1 - r0) + more

    @classmethod
    def modelled(cls, config: ZayaConfig, itemsize: int) -> "CostTable":
        """Half a millisecond, and the bytes at 40 GB/s or the FLOPs at 60 GFLOPS: what two server cores do here.

        n rows touch E (1 - (1 - 1/E)^n) of a layer's E experts where routing is even.
        """
        c, E = config, config.num_experts
        expert = 3 * c.hidden_size * c.moe_intermediate_size
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        router = c.router_hidden_size * (c.hidden_size + 2 * c.router_hidden_size)
        layer = 2 * c.hidden_size * (query + key) + router
        head = c.vocab_size * c.hidden_size
        rows = (1, 2, 4, 8, 16, 17, 32, 64, 128, 272, 512)
        ms = []
        for n in rows:
            distinct = E * (1 - (1 - 1 / E) ** n)
            bytes_ = float(itemsize * (c.num_hidden_layers * layer + head))
            bytes_ += expert_bytes(c.quantized_experts, itemsize) * c.num_hidden_layers * distinct * expert
            flops = 2 * n * (c.num_hidden_layers * (layer + expert) + head)
            ms.append(0.5 + 1e3 * max(bytes_ / 40e9, flops / 60e9))
        return cls(rows, tuple(ms))

    @classmethod
    def load(
        cls, config: ZayaConfig, dtype: torch.dtype, device: torch.device, folder: Path | None = None
    ) -> "CostTable":
        """What `blockdraft calibrate` left for this model on this machine, else the checkpoint's own, else modelled."""
        paths = [table_path(config, dtype, device), *([folder / "costs.json"] if folder else [])]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            return cls.modelled(config, dtype.itemsize)
        try:
            data = json.loads(found.read_text())
            return cls(
                tuple(data["rows"]),
                tuple(data["ms"]),
                data["sequence_ms"],
                data["late_ms"],
                data.get("verify_ms", 0.0),
                data.get("mixed_ms", 0.0),
                str(found),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{found}: not a cost table ({error}); run `blockdraft calibrate` again") from error

    def save(self, path: Path, **facts: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**asdict(self), "source": "measured", **facts}, indent=1) + "\n")


def table_path(config: ZayaConfig, dtype: torch.dtype, device: torch.device) -> Path:
    """Below $BLOCKDRAFT_COSTS, or the user's cache folder: one file per model shape, dtype, device and thread count."""
    where = os.environ.get("BLOCKDRAFT_COSTS")
    folder = Path(where) if where else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blockdraft"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    shape = {**asdict(config), "mask_token_id": None}
    key = json.dumps([shape, str(dtype), name, torch.get_num_threads()], sort_keys=True, default=str)
    return folder / f"costs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "flags"))]
    return " ".join(fields[:2])


@dataclass
class Acceptance:
    """How often the j-th draft holds where all before it do; of n-gram drafts, one before which j tokens matched.

    Attributes:
        tested, passed: Counts for j = 1..31.
        verified: Blocks counted.
        accepted, guessed: Drafts that held, and those of them that n-grams would have brought as well.
    """

    tested: list[float] = field(default_factory=lambda: [0.0] * MAX_BLOCK)
    passed: list[float] = field(default_factory=lambda: [0.0] * MAX_BLOCK)
    verified: int = 0
    accepted: int = 0
    guessed: int = 0

    def count(self, drafted: int, accepted: int, guessed: int = 0) -> None:
        self.verified += 1
        self.accepted += accepted
        self.guessed += guessed
        for j in range(1, min(accepted + 1, drafted) + 1):
            self.count_one(j, j <= accepted)

    def count_one(self, j: int, holds: bool) -> None:
        self.tested[j] += 1
        self.passed[j] += holds

    def rates(self, prior: Sequence[float], weight: float) -> list[float]:
        return [
            (passed + weight * p) / (tested + weight)
            for passed, tested, p in zip(self.passed, self.tested, prior, strict=True)
        ]


# How often the next token repeats as well where j tokens have. The bundled model's prompts and outputs, greedy and at
# T = 0.8, looping and not: 0.28 to 0.46 at 2, 0.48 to 0.73 at 3, 0.76 to 1 at 8, 0.83 to 1 at 31.
NGRAM_PRIOR = [j / (j + 3) for j in range(MAX_BLOCK)]


def ngram_chances(rates: list[float], matched: int, count: int) -> list[float]:
    """Of `count` n-gram drafts in turn, where `matched` tokens matched before the first, by `Planner.ngram_rates`."""
    known = rates[matched : matched + count]
    return known + [rates[-1]] * (count - len(known))


class Option(NamedTuple):
    """A way to go on for long: tokens and rows per forward; shares of forwards that choose from groups, that verify."""

    rows: int
    levels: tuple[int, ...]
    tokens: float
    mean_rows: float
    late: float = 0.0
    verifies: float = 0.0


PLAIN = Option(1, (), 1.0, 1.0)


class Start(NamedTuple):
    """What samples that nothing is known of begin with, and how many blocks had been verified when it was chosen."""

    learned: int
    option: Option


def is_news(verified: int, before: int) -> bool:
    """Whether so many verified blocks can tell more than `before` did: a plan every 8 steps was 10% of a small model's
    time at batch 8, one for each request 1% at batch 1."""
    return verified > 1.25 * before + 4


class Offer(NamedTuple):
    """A block to verify: its tokens beyond their price, rows, and groups. The default is none."""

    gain: float = 0.0
    rows: int = 1
    levels: tuple[int, ...] = ()


class Price:
    """Tokens that rows of a sequence must bring in a forward: what going on by its option brings in that time.

    Args:
        costs: Forward times.
        rate: Tokens whose worth is a millisecond; see `Planner.prices`.
        option: How the sequence goes on.
        others, verifying: Rows of the rest of the batch, and how many of it verify in a forward.
        sequences: Of all of the batch.
    """

    def __init__(
        self, costs: CostTable, rate: float, option: Option, others: float, verifying: float, sequences: int
    ) -> None:
        self.costs, self.rate, self.option, self.sequences = costs, rate, option, sequences
        self.others, self.verifying = others, verifying
        self.known: dict[int, float] = {}

    def __call__(self, rows: int) -> float:
        if rows not in self.known:
            more = self._time(rows, rows > 1) - self._time(self.option.mean_rows, self.option.verifies)
            self.known[rows] = self.option.tokens + self.rate * more
        return self.known[rows]

    def _time(self, rows: float, verifies: float) -> float:
        return self.costs.time(self.others + rows, self.sequences, self.verifying + verifies)

    def gained(self, rows: int, tokens: int) -> float:
        """Milliseconds that a forward with so many of its rows saved by the tokens that it brought."""
        return (tokens - self(rows)) / self.rate

    def drafts(self, masks: int) -> float:
        """Worth of drafts that wait: the forward that would bring them and one token."""
        return self(1 + masks) - 1 if masks else 0.0

    def best_block(self, chances: Iterable[float], levels: Sequence[int], masks: int) -> Offer:
        """A block of drafts that are there already, of the length that is worth most.

        Args:
            chances: Of each draft to hold where all before it do.
            levels: Accept lengths of mask groups that may stand beside it, all or none of them.
            masks: Rows of a group.
        """
        most, best, rows, known, tokens, reached = 0.0, 1, 1, [0.0], 1.0, 1.0
        for rows, chance in enumerate(chances, 2):
            known.append(chance)
            reached *= chance
            tokens += reached
            gain = tokens - LEAST_GAIN * self(rows)
            if gain > most:
                most, best = gain, rows
            if reached < LEAST_REACHED:
                break
        alone = Offer(most, best)
        return max(alone, self._with_groups(known, tuple(i for i in levels if i < rows), masks)) if levels else alone

    def _with_groups(self, chances: Sequence[float], levels: tuple[int, ...], masks: int) -> Offer:
        rows = len(chances)
        if not levels or rows == 1:
            return Offer()
        exactly = accept_lengths(chances, rows)
        tokens = 1 + sum(i * p for i, p in enumerate(exactly))
        drafts = self.drafts(masks) * sum(exactly[i] for i in levels)
        return Offer(tokens + drafts - LEAST_GAIN * self(rows + masks * len(levels)), rows, levels)


@dataclass
class Watch:
    """Whether following texts for n-grams pays, by what their blocks gained.

    Attributes:
        gained: Predicted ms that blocks saved.
        followed: Forwards of sequences whose text was followed; from four times `LEAST_FOLLOWED` on, both fade.
        rests: Periods without, since the last with.
    """

    gained: float = 0.0
    followed: int = 0
    rests: int = 0

    def next_period(self) -> bool:
        """Whether texts are followed in the period that begins."""
        pays = self.followed < LEAST_FOLLOWED or self.gained >= FOLLOWING_MS * self.followed
        self.rests = 0 if pays or self.rests == MOST_RESTS else self.rests + 1
        if self.followed > 4 * LEAST_FOLLOWED:
            self.gained, self.followed = self.gained / 2, self.followed // 2
        return self.rests == 0


class Planner:
    """Plans for the sequences of one model; what it learns from one request is the next one's prior.

    Args:
        costs: Forward times.
        block_length: Rows of a block by the checkpoint.
    """

    def __init__(self, costs: CostTable, block_length: int) -> None:
        self.costs, self.block_length = costs, block_length
        self.seen: defaultdict[Kind, Acceptance] = defaultdict(Acceptance)
        self.watches: defaultdict[tuple[frozenset[Kind], int], Watch] = defaultdict(Watch)  # by drafts, sequences
        self.starts: dict[tuple[Likeness, int], Start] = {}  # by samples that are alike, and their number
        self.lost = 0.0  # predicted ms that drafts cost beyond what their tokens saved
        self.spent = 0.0  # predicted ms of all decoding
        self.step_ms = costs.time(1, 1)

    def rates(self, kind: Kind, own: Acceptance) -> list[float]:
        prior = self.seen[kind].rates([PRIOR_RATE] * MAX_BLOCK, PRIOR_WEIGHT)
        return own.rates(prior, REQUEST_WEIGHT)

    def ngram_rates(self, kind: Kind, own: Acceptance) -> list[float]:
        """How often an n-gram draft holds, by how many tokens matched before it; see `Acceptance`."""
        return own.rates(self.seen[kind].rates(NGRAM_PRIOR, PRIOR_WEIGHT), REQUEST_WEIGHT)

    def unguessed(self, kind: Kind) -> float:
        """Share of the drafts that hold which n-grams would not have brought."""
        seen = self.seen[kind]
        return 1 - (seen.guessed + PRIOR_RATE * PRIOR_WEIGHT) / (seen.accepted + PRIOR_WEIGHT)

    def verified(self, kind: Kind) -> int:
        """Blocks counted so far."""
        return self.seen[kind].verified

    def count(self, kind: Kind, own: Acceptance, drafted: int, accepted: int, guessed: int = 0) -> None:
        """A block was verified; n-grams would have drafted `guessed` of what it accepted."""
        own.count(drafted, accepted, guessed)
        self.seen[kind].count(drafted, accepted, guessed)

    def count_guesses(self, kind: Kind, own: Acceptance, guesses: Iterable[tuple[int, bool]]) -> None:
        """What came of n-gram drafts, verified or not: see `Sample.guesses`."""
        counts = (own, self.seen[kind])
        for matched, held in guesses:
            if matched:
                for acceptance in counts:
                    acceptance.count_one(min(matched, MAX_BLOCK - 1), held)

    def account(self, rows: int, sequences: int, verifying: int = 0) -> None:
        """Books a decode forward."""
        self.spent += self.costs.time(rows, sequences, verifying)

    def account_drafts(self, rows: int, sequences: int, tokens: int, verifying: int = 0) -> None:
        """Books what a decode forward took with drafts, and what plain decoding would have taken for its tokens.

        Those of a plain forward cost what it takes; a further one, what a sequence adds to it: one that ends sooner by
        it leaves the others to pay for what they shared.
        """
        took, plain = self.costs.time(rows, sequences, verifying), self.costs.time(sequences, sequences)
        fewer = self.costs.time(sequences - 1, sequences - 1) if sequences > 1 else 0.0
        self.lost = max(self.lost + took - plain - (tokens - sequences) * (plain - fewer), -took)

    def account_prompt(self, rows: int) -> None:
        """Books mask rows behind a prompt that were a trial."""
        self.lost += self.costs.time(1 + rows, 1) - self.costs.time(1, 1)

    @property
    def may_try(self) -> bool:
        """Whether drafts may be tried against the prediction: losses stay a small share of all time."""
        return self.lost <= max(LOSS_SHARE * self.spent, FIRST_LOSSES * self.step_ms)

    def options(
        self, rates: Sequence[float], masks: int, block_length: int, free: bool, counted: float = 1.0
    ) -> list[Option]:
        """Plain decoding, and blocks with 0, 1, 3 and all groups.

        Args:
            rates: See `Acceptance`.
            masks: Rows of a mask group; 0 where drafts come from elsewhere.
            block_length: Rows of a block.
            free: Drafts need no forward of their own.
            counted: Share of the drafts that hold which is worth something; see `unguessed`.
        """
        found = [PLAIN]
        for rows in sorted({min(4, block_length), min(8, block_length), block_length}):
            exactly = accept_lengths(rates, rows)
            accepted = counted * sum(map(mul, exactly, range(rows)))
            if free:
                found.append(Option(rows, (), 1 + accepted, rows, verifies=1.0))
                continue
            best = sorted(range(rows), key=exactly.__getitem__, reverse=True)
            for groups in sorted({0, 1, 3, rows}):
                levels = tuple(sorted(best[:groups]))
                miss = 1 - sum(map(exactly.__getitem__, levels))
                forwards = 1 + miss
                tokens, mean_rows = 1 + accepted + miss, rows + groups * masks + miss * (1 + masks)
                late = 1 / forwards if groups else 0.0
                found.append(Option(rows, levels, tokens / forwards, mean_rows / forwards, late, 1 / forwards))
        return found

    def choose(self, choices: list[list[Option]]) -> list[Option]:
        """One option per sequence, for the highest predicted tokens per second of the batch.

        All alike first, plain decoding unless something else is clearly better; then each sequence may leave for the
        option that gains most at the going price of a row.
        """
        n, rate = len(choices), self.rate
        alike = [[options[min(i, len(options) - 1)] for options in choices] for i in range(max(map(len, choices)))]
        plain, best = alike[0], max(alike, key=rate)
        if rate(best) < LEAST_GAIN * rate(plain):
            best = plain
        if all(options is choices[0] for options in choices):
            return best
        value, rows = rate(best), sum(o.mean_rows for o in best)
        price = value * (self.costs.time(rows + 8, n) - self.costs.time(rows, n)) / 8
        each = [max(options, key=lambda o: o.tokens - price * o.mean_rows) for options in choices]
        return each if rate(each) > max(value, LEAST_GAIN * rate(plain)) else best

    def rate(self, picked: list[Option]) -> float:
        """Predicted tokens per millisecond of a batch."""
        late = max(o.late for o in picked) * self.costs.late_ms
        took = self.costs.time(sum(o.mean_rows for o in picked), len(picked), sum(o.verifies for o in picked))
        return sum(o.tokens for o in picked) / (took + late)

    def prices(self, picked: list[Option], waiting: bool) -> list[Price]:
        """One per sequence of a batch, for what they were given to choose; sequences that go on alike share theirs.

        Where others wait for the first place that is free, a token is worth its share of the batch's time. Where none
        do, a token more of one sequence saves only what that one adds to a forward, since the others need as many
        forwards as before; where all get one more, its share. Who will be last is not known, hence half of both.

        Args:
            picked: How each goes on.
            waiting: Whether others wait.
        """
        n, rows, share = len(picked), sum(o.mean_rows for o in picked), 1 / self.rate(picked)
        verifying = sum(o.verifies for o in picked)
        added = self.costs.time(n, n) - self.costs.time(n - 1, n - 1) if n > 1 and not waiting else share
        rate = 2 / (share + min(share, added))
        known = {o: Price(self.costs, rate, o, rows - o.mean_rows, verifying - o.verifies, n) for o in picked}
        return [known[o] for o in picked]


def accept_lengths(rates: Sequence[float], rows: int) -> list[float]:
    """P(a = i), i = 0..rows - 1, for a block of `rows` rows."""
    out, reached = [], 1.0
    for i in range(1, rows):
        out.append(reached * (1 - rates[i]))
        reached *= rates[i]
    return [*out, reached]
