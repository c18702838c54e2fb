"""The planner: what it picks from known costs and acceptances, what it may lose, and the table it reads."""

import json
from dataclasses import replace

import pytest
import torch

from blockdraft import RequestError, SamplingParams, ZayaForCausalLM, bundled_model, calibrate
from blockdraft.cli import main
from blockdraft.ngram import NgramDrafter
from blockdraft.plan import (
    FOLLOWING_MS,
    LEAST_GAIN,
    MAX_BLOCK,
    PLAIN,
    Acceptance,
    CostTable,
    Option,
    Planner,
    Watch,
    accept_lengths,
    ngram_chances,
    table_path,
)
from bundled_prompts import held_out_prompts
from checkpoints import random_model, save, tiny_config

FLAT = CostTable((1, 512), (10.0, 10.001))  # rows are free: bound by weights that are read anyway
STEEP = CostTable((1, 512), (1.0, 512.0))  # every row costs a forward
MIDDLE = CostTable((1, 16, 32, 64, 272), (1.0, 1.6, 2.4, 4.0, 15.0))


def pick(costs, rate, sequences=1, masks=16, free=False):
    planner = Planner(costs, 16)
    options = planner.options([rate] * MAX_BLOCK, masks, 16, free)
    return planner.choose([options] * sequences)


def test_interpolation():
    assert [MIDDLE.time(rows, 1) for rows in (1, 8.5, 16, 24, 272)] == pytest.approx([1.0, 1.3, 1.6, 2.0, 15.0])
    assert MIDDLE.time(376, 1) == pytest.approx(20.5, rel=0.01)  # beyond the table: its last slope
    assert replace(MIDDLE, sequence_ms=0.2).time(16, 3) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("rows", "ms"), [((1,), (1.0,)), ((1, 1), (1.0, 2.0)), ((2, 1), (1.0, 2.0)), ((1, 2), (1.0, 0.0)), ((1, 2), (1.0,))]
)
def test_bad_tables(rows, ms):
    with pytest.raises(RequestError, match="cost table: wanted ascending rows and positive ms"):
        CostTable(rows, ms)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("rows", [2, 4, 16])
def test_accept_lengths_are_a_law(rate, rows):
    law = accept_lengths([rate] * MAX_BLOCK, rows)
    assert len(law) == rows
    assert sum(law) == pytest.approx(1.0)
    mean = sum(i * p for i, p in enumerate(law))
    assert mean == pytest.approx(sum(rate**i for i in range(1, rows)))


def test_choices_at_the_ends():
    assert pick(FLAT, 0.9)[0].levels == tuple(range(16))  # rows are free: a group for every outcome
    assert pick(STEEP, 0.9)[0].rows == 1  # rows cost a token each: nothing is gained
    assert pick(MIDDLE, 0.0)[0].rows == 1
    assert pick(MIDDLE, 0.9)[0].rows == 16
    assert pick(STEEP, 0.99, free=True)[0].rows == 1
    assert pick(MIDDLE, 0.9, masks=0, free=True)[0].levels == ()


def test_choice_is_the_best_of_all():
    """Against the rates worked out one by one from the simulated chain of forwards; small gains are left alone."""
    for rate in (0.2, 0.5, 0.7, 0.9, 0.97):
        options = Planner(MIDDLE, 16).options([rate] * MAX_BLOCK, 16, 16, False)
        speeds = {(o.rows, o.levels): simulate(MIDDLE, rate, o.rows, o.levels) for o in options}
        chosen = pick(MIDDLE, rate)[0]
        best = max(speeds.values())
        assert speeds[chosen.rows, chosen.levels] >= (0.97 * best if best > 1.02 * LEAST_GAIN else best / LEAST_GAIN)


def simulate(costs, rate, rows, levels, forwards=40_000):
    """Tokens per ms of draft, verify and what follows, with random acceptance; a miss drafts anew."""
    if rows == 1:
        return 1 / costs.time(1, 1)
    generator = torch.Generator().manual_seed(1)
    passed = (torch.rand(forwards, rows - 1, generator=generator) < rate).long().cumprod(1).sum(1).tolist()
    tokens = time = 0.0
    drafted = False
    for accepted in passed:
        if not drafted:
            tokens, time = tokens + 1, time + costs.time(17, 1)
        tokens, time = tokens + 1 + accepted, time + costs.time(rows + 16 * len(levels), 1)
        drafted = accepted in levels
    return tokens / time


def test_sequences_of_a_batch_differ():
    planner = Planner(MIDDLE, 16)
    good, bad = (planner.options([rate] * MAX_BLOCK, 16, 16, False) for rate in (0.95, 0.02))
    rows = [o.rows for o in planner.choose([good, bad, good, bad])]
    assert rows[0] == rows[2] > rows[1] == rows[3] == 1


def test_acceptance_counts():
    acceptance = Acceptance()
    acceptance.count(15, 3)
    acceptance.count(3, 3)
    assert acceptance.tested[1:6] == [2, 2, 2, 1, 0]
    assert acceptance.passed[1:6] == [2, 2, 2, 0, 0]
    rates = acceptance.rates([0.5] * MAX_BLOCK, 2.0)
    assert rates[1:6] == pytest.approx([3 / 4, 3 / 4, 3 / 4, 1 / 3, 0.5])


@pytest.fixture(scope="module")
def model():
    return ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)


def with_planner(model, costs, **config):
    """The model with a planner that knows nothing yet, and with other values in its configuration."""
    fresh = ZayaForCausalLM(
        replace(model.config, **config), model.decoder, model.tokenizer, model.dtype, model.device
    )  # fmt: skip
    fresh.planner = Planner(costs, 16)
    return fresh


class WrongNgrams(NgramDrafter):
    """Finds what an n-gram drafter finds, and never says what follows."""

    def follow(self, token):
        return super().follow(token)[0], False

    def draft(self, count):
        return [(token + 1) % 272 for token in super().draft(count)]


@pytest.mark.parametrize("drafter", ["mask", "auto"])
@pytest.mark.parametrize("batch", [1, 8])
def test_useless_drafts_cost_at_most_three_percent(model, batch, drafter, monkeypatch):
    """In the planner's own time, whatever the machine does: mask rows with a wrong mask token draft nothing right."""
    monkeypatch.setattr("blockdraft.sample.NgramDrafter", WrongNgrams)
    wrong = with_planner(model, MIDDLE, mask_token_id=7)
    prompts = [p[:60] for p in held_out_prompts(8)]
    outputs = []
    for first in range(0, 8, batch):
        params = SamplingParams(max_tokens=256, ignore_eos=True, temperature=1.0, seed=first, drafter=drafter)
        outputs += wrong.generate(prompts[first : first + batch], params)
    tokens = sum(o.stats.committed for o in outputs)
    assert sum(o.stats.accepted for o in outputs) < 0.3 * sum(o.stats.drafted for o in outputs)
    assert sum(o.stats.plan["ar"] for o in outputs) > 0.8 * tokens
    assert set().union(*(o.stats.verified_by for o in outputs)) == {"mask"} | (
        {"ngram"} if drafter == "auto" else set()
    )
    plain = tokens * MIDDLE.time(batch, batch) / batch
    assert wrong.planner.spent <= 1.03 * plain


def test_a_trial_ends_with_its_verification(model):
    """What a forward was spent on is looked at, whatever is left of the budget: or it pays and never learns."""
    fresh = with_planner(model, MIDDLE)
    params = SamplingParams(max_tokens=96, ignore_eos=True, drafter="mask", temperature=1.0, seed=0)
    for prompt in held_out_prompts(6):
        stats = fresh.generate(prompt[:80], params)[0].stats
        assert stats.verify_forwards >= stats.draft_forwards - 1  # the last one may have drafted past the end
    assert fresh.planner.verified(("mask", "gumbel, T=1.0, mix=0.0")) > 0


def test_what_a_trial_loses():
    """Alone, a token saves a forward; in a batch it saves what a sequence adds to one."""
    planner = Planner(replace(MIDDLE, sequence_ms=0.1), 16)
    planner.account_drafts(rows=17, sequences=1, tokens=1)
    assert planner.lost == pytest.approx(MIDDLE.time(17, 1) - 1)
    planner.account_drafts(rows=8, sequences=1, tokens=2)
    assert planner.lost == pytest.approx(MIDDLE.time(17, 1) - 1 + MIDDLE.time(8, 1) - 2)
    planner.lost = 0.0
    planner.account_drafts(rows=4 + 16, sequences=4, tokens=4 + 3)
    plain, fewer = MIDDLE.time(4, 1) + 0.3, MIDDLE.time(3, 1) + 0.2
    assert planner.lost == pytest.approx(MIDDLE.time(20, 1) + 0.3 - plain - 3 * (plain - fewer))


def test_ngrams_take_no_trial_from_masks(model):
    """A sample that waits for a match beside one whose mask rows are to be tried."""
    fresh = with_planner(model, SHAPE)
    params = SamplingParams(max_tokens=48, ignore_eos=True, temperature=1.0, seed=0)
    ways = [replace(params, drafter="ngram"), replace(params, drafter="mask")]
    first, second = fresh.generate([p[:60] for p in held_out_prompts(2)], ways)
    assert second.stats.verified_by["mask"] > 1
    assert set(first.stats.verified_by) <= {"ngram"}
    assert "a trial" not in first.stats.plan_reason


def test_price():
    """Tokens that make a forward as good as the option: the rest of the batch waits as long."""
    planner = Planner(MIDDLE, 16)
    (alone,) = planner.prices([PLAIN], True)
    assert [alone(rows) for rows in (1, 16, 32)] == pytest.approx([1.0, 1.6, 2.4])
    one, other = planner.prices([PLAIN] * 2, True)
    assert one is other
    assert one(16) == pytest.approx(1 + 2 * (MIDDLE.time(17, 2) - MIDDLE.time(2, 2)) / MIDDLE.time(2, 2))
    assert one.drafts(16) == one(17) - 1
    assert one.drafts(0) == 0


def test_price_where_nobody_waits():
    """A token is worth half of its share of a forward and half of what its sequence adds to one; alone, all of it."""
    planner = Planner(replace(MIDDLE, sequence_ms=0.05), 16)
    share, added = planner.costs.time(8, 8) / 8, planner.costs.time(8, 8) - planner.costs.time(7, 7)
    assert added < share
    prices = planner.prices([PLAIN] * 8, False)
    assert prices[0] is prices[7]
    assert 1 / prices[0].rate == pytest.approx((share + added) / 2)
    assert planner.prices([PLAIN], False)[0].rate == planner.prices([PLAIN], True)[0].rate
    assert prices[0].gained(4, 3) == pytest.approx((3 - prices[0](4)) / prices[0].rate)


def test_a_block_to_verify_has_its_own_cost():
    costs = replace(MIDDLE, verify_ms=0.25)
    assert costs.time(8, 2, 1) == pytest.approx(MIDDLE.time(8, 2) + 0.25)
    (price,), (free,) = (Planner(c, 16).prices([PLAIN], True) for c in (costs, MIDDLE))
    assert price(1) == free(1) == 1
    assert price(8) == pytest.approx(free(8) + 0.25 / MIDDLE.time(1, 1))
    plans = Planner(costs, 16)
    plans.account(8, 2, 1)
    assert plans.spent == costs.time(8, 2, 1)


def test_sequences_beside_a_block_have_their_cost():
    """Once for a forward, whoever verifies in it: a second one there does not pay it again."""
    costs = replace(MIDDLE, mixed_ms=0.125)
    assert costs.time(8, 4) == MIDDLE.time(8, 4)
    assert costs.time(8, 4, 0.5) == pytest.approx(MIDDLE.time(8, 4) + 0.1875)
    assert costs.time(8, 4, 1) == costs.time(8, 4, 3) == pytest.approx(MIDDLE.time(8, 4) + 0.375)
    verifying = Option(8, (), 3.0, 8.0, verifies=1.0)
    for beside, more in ((PLAIN, 0.125), (verifying, 0.0)):
        price, free = (Planner(c, 16).prices([PLAIN, beside], True)[0] for c in (costs, MIDDLE))
        assert price(8) - price(1) == pytest.approx(price.rate * ((free(8) - free(1)) / free.rate + more))


def test_texts_are_followed_while_that_pays():
    """For some hundred tokens at first; without gain one period in 64; with gain, on and on."""

    def periods(count, gained):
        watch, found = Watch(), []
        for _ in range(count):
            found.append(watch.next_period())
            if found[-1]:
                watch.followed += 128
                watch.gained += gained
        return found

    assert periods(132, 0.0) == [True, True] + ([False] * 63 + [True]) * 2 + [False] * 2
    assert all(periods(36, 1.01 * FOLLOWING_MS * 128))
    assert not all(periods(36, 0.99 * FOLLOWING_MS * 128))


def test_blocks_of_ngrams_by_their_worth():
    """The length that is best of all, found by trying each; none where drafts do not hold."""
    for option in (PLAIN, Option(16, (), 3.0, 16.5)):
        for rate in (0.05, 0.3, 0.6, 0.9, 0.99):
            (price,) = Planner(MIDDLE, 16).prices([option], True)
            tokens = [sum(rate**i for i in range(rows)) for rows in range(1, 17)]
            gains = [0.0] + [tokens[rows - 1] - LEAST_GAIN * price(rows) for rows in range(2, 17)]
            offer = price.best_block([rate] * 15, (), 16)
            assert offer.gain == pytest.approx(max(gains), abs=0.02)  # what hardly ever holds is not thought of
            assert (offer.rows > 1) == (offer.gain > 0)
    assert Planner(STEEP, 16).prices([PLAIN], True)[0].best_block([0.99] * 15, (), 16).rows == 1


def test_groups_beside_ngrams():
    """Where rows are free, drafts for what follows come along; where they are not, they do not."""
    levels = (0, 3, 15)
    free = Planner(FLAT, 16).prices([Option(16, levels, 6.0, 64)], True)[0].best_block([0.95] * 15, levels, 16)
    assert (free.rows, free.levels) == (16, levels)
    assert Planner(MIDDLE, 16).prices([PLAIN], True)[0].best_block([0.95] * 15, levels, 16).levels == ()
    short = Planner(FLAT, 16).prices([Option(16, levels, 2.0, 64)], True)[0].best_block([0.95] * 5, levels, 16)
    assert (short.rows, short.levels) == (6, (0, 3))  # none for more drafts than there are


def test_ngrams_are_judged_by_what_matched():
    """Each length of a match on its own; the request outweighs what others have shown, in time."""
    planner, kind, own = Planner(MIDDLE, 16), ("ngram", "a rule"), Acceptance()

    def chances(matched, count):
        return ngram_chances(planner.ngram_rates(kind, own), matched, count)

    assert chances(2, 3) == pytest.approx([2 / 5, 3 / 6, 4 / 7])
    planner.count_guesses(kind, Acceptance(), [(2, False)] * 50 + [(3, True)] * 50 + [(0, False)] * 50)
    low, high, same = chances(2, 3)
    assert low < 0.05 < 0.9 < high
    assert same == pytest.approx(4 / 7)
    planner.count_guesses(kind, own, [(2, True)] * 50)
    assert chances(2, 1)[0] > 0.8
    planner.count_guesses(kind, own, [(500, True)] * 50)
    assert chances(400, 2)[1] > 0.9  # all long matches are one


def test_what_ngrams_would_have_brought_does_not_count_for_masks():
    planner, kind = Planner(MIDDLE, 16), ("mask", "a rule")
    for _ in range(50):
        planner.count(kind, Acceptance(), 15, 10, guessed=10)
    assert planner.unguessed(kind) < 0.02
    counted = planner.options([0.9] * MAX_BLOCK, 16, 16, False, planner.unguessed(kind))
    assert planner.choose([counted])[0].rows == 1 < planner.choose([pick_options(planner, 0.9)])[0].rows


def pick_options(planner, rate):
    return planner.options([rate] * MAX_BLOCK, 16, 16, False)


SHAPE = CostTable((1, 4, 8, 16, 17, 32, 64, 272), (0.6, 0.7, 0.84, 1.08, 1.09, 1.46, 2.1, 6.4), 0.034)  # of two cores


def sources(outputs):
    return {name: sum(o.stats.verified_by.get(name, 0) for o in outputs) for name in ("mask", "ngram")}


def test_auto_takes_ngrams_where_text_repeats_and_masks_where_it_does_not(model):
    """A prompt that is there five times over, and prompts in which no two tokens recur."""
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    repeating = with_planner(model, SHAPE)
    outputs = [o for p in held_out_prompts(4) for o in repeating.generate(p[:40] * 5, params)]
    found = sources(outputs)
    assert found["ngram"] > 2 * found["mask"]
    assert sum(o.stats.accepted_by["ngram"] for o in outputs) > 4 * found["ngram"]
    assert any("n-gram drafts" in o.stats.plan_reason for o in outputs)
    never = with_planner(model, FLAT)
    outputs = [
        *never.generate([p[:40] for p in held_out_prompts(4)], replace(params, temperature=0.7, max_tokens=16, seed=1))
    ]
    found = sources(outputs)
    assert found["mask"] > 2 * found["ngram"]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 8])
def test_auto_is_as_good_as_the_better_drafter(model, batch, temperature):
    """By the table's time, no clock: 97% of plain decoding, of masks in turns, and of n-grams always verified."""
    prompts = [p[:120] for p in held_out_prompts(16)]

    def spent(**changes):
        fresh = with_planner(model, SHAPE)
        params = SamplingParams(max_tokens=96, ignore_eos=True, temperature=temperature, seed=0, **changes)
        outputs = [o for i in range(0, 16, batch) for o in fresh.generate(prompts[i : i + batch], params)]
        return fresh.planner.spent / sum(o.stats.committed for o in outputs)

    fixed = [spent(sampler="ar"), spent(drafter="mask", groups=0), spent(drafter="ngram", groups=0)]
    assert spent() <= min(fixed) / 0.97
    assert spent(drafter="mask") <= min(fixed[:2]) / 0.97
    if temperature == 0 and batch == 1:
        assert spent() < min(fixed)  # both together are better than either


def test_useful_drafts_are_used(model):
    model.planner = Planner(FLAT, 16)
    outputs = model.generate([p[:100] for p in held_out_prompts(4)], SamplingParams(max_tokens=96, ignore_eos=True))
    stats = [o.stats for o in outputs]
    assert sum(s.committed for s in stats) > 1.5 * sum(s.decode_forwards for s in stats)
    assert all("tokens expected of a forward of" in s.plan_reason or "n-gram" in s.plan_reason for s in stats)
    assert all(sum(s.plan.values()) == s.decode_forwards for s in stats)


def test_plans_repeat(model):
    """A table decides and no clock: the same requests get the same plans."""
    runs = []
    for _ in range(2):
        model.planner = Planner(MIDDLE, 16)
        outputs = model.generate([p[:80] for p in held_out_prompts(3)], SamplingParams(max_tokens=64, ignore_eos=True))
        runs.append([o.stats.plan for o in outputs])
    assert runs[0] == runs[1]


def test_modelled_table(model):
    table = CostTable.modelled(model.config, 2)
    assert list(table.ms) == sorted(table.ms)
    assert table.source == "modelled"


def test_calibrate_writes_what_the_planner_reads(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BLOCKDRAFT_COSTS", str(tmp_path))
    monkeypatch.setattr(calibrate, "ROWS", (1, 8, 16))
    assert main(["calibrate", "--rounds", "1", "--context", "16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    path = table_path(model.config, model.dtype, model.device)
    assert printed["path"] == str(path)
    table = CostTable.load(model.config, model.dtype, model.device)
    assert table.rows == (1, 8, 16)
    assert list(table.ms) == printed["ms"]
    assert table.late_ms == printed["late_ms"]
    assert ZayaForCausalLM.from_pretrained(bundled_model(), progress=False).planner.costs == table
    path.write_text("{}")
    with pytest.raises(RequestError, match="not a cost table.*blockdraft calibrate"):
        CostTable.load(model.config, model.dtype, model.device)


def test_a_checkpoint_may_bring_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKDRAFT_COSTS", str(tmp_path / "none"))
    folder = save(random_model(tiny_config()), tmp_path / "model")
    assert ZayaForCausalLM.from_pretrained(folder, progress=False).planner.costs.source == "modelled"
    replace(MIDDLE, late_ms=0.25).save(folder / "costs.json")
    costs = ZayaForCausalLM.from_pretrained(folder, progress=False).planner.costs
    assert costs == replace(MIDDLE, late_ms=0.25, source=str(folder / "costs.json"))


def test_calibrate_shows_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "ROWS", (1, 8, 16))
    assert main(["calibrate", "--rounds", "1", "--out", str(tmp_path / "costs.json")]) == 0
    assert "of one row" in capsys.readouterr().out
    assert main(["calibrate", "--rounds", "0"]) == 2
    assert "--context and --rounds must be at least 1" in capsys.readouterr().err
