"""`blockdraft verify`: that it passes where nothing differs, and finds, places and reports what does."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

import blockdraft
from blockdraft import SamplingParams, ZayaForCausalLM, cli, decide, verify
from checkpoints import random_model, save, tiny_config

SMALL = ["--count", "1", "--seeds", "1", "--max-tokens", "12", "--samples", "0", "--dtypes", "bfloat16"]


@pytest.fixture(scope="module")
def model():
    return ZayaForCausalLM.from_pretrained(blockdraft.bundled_model(), progress=False)


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def accept_everything(monkeypatch):
    """A verification that holds every draft to be right."""

    def wrong(token_ids, chosen, cu_rows, lengths, limits):
        committed = torch.minimum(lengths, limits)
        last = cu_rows[:-1] + committed - 1
        return committed - 1, committed, last, chosen[last.long()]

    monkeypatch.setattr(blockdraft.ops, "verify_tokens", wrong)


def accept_too_often(monkeypatch):
    """Coins of half their size: a rejection rule that accepts with min(1, 2 p / q)."""
    uniforms = decide.uniforms
    monkeypatch.setattr(decide, "uniforms", lambda *columns: uniforms(*columns) * torch.tensor([0.5, 1.0]))


def run_json(capsys, *arguments, status=0):
    assert cli.main(["verify", "--json", *arguments]) == status
    return json.loads(capsys.readouterr().out)


# The command


def test_passes_and_says_what_it_compared(capsys):
    report = run_json(capsys, *SMALL, "--seeds", "2", "--samples", "48", "--dtypes", "bfloat16,float32")
    checks = report["checks"]
    assert report["ok"]
    assert {check["status"] for check in checks} == {"ok"}
    tokens = [check for check in checks if check["kind"] == "tokens"]
    assert {check["dtype"] for check in tokens} == {"bfloat16", "float32"}
    assert all(check["compared"] == 12 * (1 + 2) for check in tokens)  # greedy, and sampled with two seeds
    named = [check["name"].rsplit(", ", 1) for check in tokens if check["dtype"] == "float32"]
    names = [setting.name for setting in verify.SETTINGS]
    assert [name for name, how in named if how == "in a batch"] == names
    assert [name for name, how in named if how == "alone"] == names[1:]
    drafting = [check for check in tokens if check["name"].startswith(("mask, groups", "random"))]
    assert all(check["facts"]["drafted"] > 0 for check in drafting)
    laws = [check for check in checks if check["kind"] == "law"]
    assert len(laws) == 2 * len(verify.LAW_CONTEXTS) * len(verify.LAW_DRAFTERS)
    for unit, kind in (("tokens", tokens), ("samples", laws)):
        assert report["summary"]["compared"][unit] == sum(check["compared"] for check in kind) > 0
    assert report["shape"]["vocab_size"] == 272
    assert report["machine"]["versions"]["torch"] == torch.__version__


def test_text_and_file(capsys, tmp_path):
    path = tmp_path / "report.json"
    assert cli.main(["verify", *SMALL, "--threads", "1", "--out", str(path)]) == 0
    text, report = capsys.readouterr().out, json.loads(path.read_text())
    assert all(f"{check['name']:<43}bfloat16" in text for check in report["checks"])
    assert f"{report['summary']['compared']['tokens']:,} tokens" in text
    assert "not about all" in text
    assert torch.__version__ in text
    assert "avx" in text or "no known features" in text
    assert "hidden_size 256" in text


def test_a_wrong_verification_is_found_placed_and_reported(capsys, monkeypatch, model):
    accept_everything(monkeypatch)
    report = run_json(capsys, *SMALL, status=1)
    assert not report["ok"]
    failed = [check for check in report["checks"] if check["status"] == "FAILED"]
    assert {"mask, groups 0, alone", "mask, groups 3, in a batch", "random, alone"} <= {c["name"] for c in failed}
    assert report["summary"]["FAILED"] == len(failed)
    assert next(c for c in report["checks"] if c["name"] == "plain, in a batch")["status"] == "ok"
    first = failed[0]["differences"][0]
    params = SamplingParams(
        max_tokens=12, ignore_eos=True, sampler="ar", seed=first["seed"], **verify.LAWS[first["law"]]
    )
    plain = model.generate(first["prompt_token_ids"], params)[0].token_ids
    blocks = model.generate(first["prompt_token_ids"], replace(params, sampler="lossless", groups=0))[0].token_ids
    at = first["position"]
    assert plain[:at] == blocks[:at]
    assert (plain[at], blocks[at]) == (first["ar_token"], first["block_token"])
    assert plain[at] != blocks[at]
    best = model.logits(torch.tensor([first["prompt_token_ids"] + plain[:at]]))[0, -1].sort(descending=True).values
    assert first["top2_margin"] == float(best[0] - best[1])


def test_a_difference_in_the_text(capsys, monkeypatch):
    accept_everything(monkeypatch)
    assert cli.main(["verify", *SMALL]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "top-2 margin of plain logits" in text
    assert "Something differs." in text
    assert "No difference" not in text


def test_without_a_mask_token_mask_drafts_are_skipped_with_a_reason(capsys, tmp_path):
    folder = save(random_model(tiny_config(mask_token_id=None)), tmp_path / "model")
    report = run_json(capsys, str(folder), *SMALL, "--samples", "40", "--max-tokens", "6")  # and without a tokenizer
    skipped = [check for check in report["checks"] if check["status"] == "skipped"]
    assert {check["name"] for check in skipped if check["kind"] == "tokens"} == {
        setting.name for setting in verify.SETTINGS if setting.drafter == "mask"
    }
    assert len([check for check in skipped if check["kind"] == "law"]) == len(verify.LAW_CONTEXTS)
    assert all("no mask_token_id" in check["note"] for check in skipped)
    assert report["summary"] == {**report["summary"], "FAILED": 0, "skipped": len(skipped)}
    assert report["summary"]["ok"] > 0


def test_prompts_of_a_file(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "import re"}\n{"prompt": [5, 6, 7]}\n{"prompt": "x"}\n')
    report = run_json(capsys, *SMALL, "--prompts", str(path), "--count", "2", "--max-tokens", "4")
    assert all(check["compared"] == 2 * 2 * 4 for check in report["checks"] if check["kind"] == "tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count must be from 1"),
        (["--seeds", "0"], "--seeds must be"),
        (["--max-tokens", "0"], "--max-tokens must be"),
        (["--samples", "-1"], "--samples must be"),
        (["--threads", "0"], "--threads must be"),
        (["--prompts", "no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--out", "no/such/folder/report.json"], "no/such/folder"),
        (["no/such/model"], "no/such/model"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_a_message_and_status_2(capsys, arguments, message):
    assert cli.main(["verify", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("blockdraft: ")
    assert message in captured.err


@pytest.mark.parametrize("dtypes", ["float16", "float32,", ""])
def test_a_dtype_that_there_is_not_is_wrong_usage(capsys, dtypes):
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(["verify", "--dtypes", dtypes])
    assert "must be of bfloat16, float32" in capsys.readouterr().err


# Bits


def test_bits_differ_in_rows_that_are_counted():
    alone = [torch.randn(5, 7), torch.randn(3, 7)]
    assert verify.bit_check("x", "float32", alone, [a.clone() for a in alone]).status == "ok"
    other = [a.clone() for a in alone]
    other[1][2, 6] = torch.nextafter(other[1][2, 6], torch.tensor(9.0))
    check = verify.bit_check("x", "float32", alone, other)
    assert (check.status, check.compared, check.facts["different"]) == ("FAILED", 8, 1)
    assert check.differences[0]["sequence"] == 1
    assert check.differences[0]["first_row"] == 2
    nan = [torch.full((1, 7), torch.nan)]
    assert verify.bit_check("x", "float32", nan, nan).status == "FAILED"


def test_rows_that_see_too_much_are_found(model, monkeypatch):
    """Negative control: a cache whose keys change under the rows that follow."""
    texts = [model.encode(text) for text in ("def f(x):\n    return x", "import os")]
    assert {check.status for check in verify.bit_checks(model, texts)} == {"ok"}
    commit = verify.Cache.begin

    def begin(cache, step, sequences):
        cache.k_pages[0, 0] *= 1.01
        return commit(cache, step, sequences)

    monkeypatch.setattr(verify.Cache, "begin", begin)
    failed = {check.name for check in verify.bit_checks(model, texts) if check.status == "FAILED"}
    assert {"a row a forward", "16 rows beside mask rows"} <= failed


# Law


def draws(law, count, seed=0):
    return torch.multinomial(law, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def counts_of(law, count, seed=0):
    return torch.bincount(draws(law, count, seed), minlength=len(law)).tolist()


def test_g_test_against_a_table():
    """Two cells of 50: G = 2 (60 ln 1.2 + 40 ln 0.8) over Williams' 1 + 3 / 600; p of chi-squared(1) is erfc."""
    result = verify.g_test([60, 40], [0.5, 0.5])
    assert result.statistic == pytest.approx(4.02710 / 1.005, abs=1e-5)
    assert result.p == pytest.approx(math.erfc(math.sqrt(result.statistic / 2)), rel=1e-9)
    assert result.cells == 2


def test_p_values_of_a_right_law_are_even():
    law = torch.rand(40, generator=torch.Generator().manual_seed(1)).double() ** 3
    law /= law.sum()
    ps = torch.tensor([verify.g_test(counts_of(law, 2000, seed), law.tolist()).p for seed in range(400)])
    for level in (0.05, 0.25, 0.5, 0.75):
        assert abs((ps < level).double().mean() - level) < 4 * (level * (1 - level) / 400) ** 0.5


def test_a_slightly_wrong_law_fails():
    law = torch.full((20,), 0.05, dtype=torch.float64)
    drawn = law.clone()
    drawn[:10] += 0.005
    drawn[10:] -= 0.005  # total variation 0.05
    assert verify.g_test(counts_of(law, 10_000), law.tolist()).p > 1e-3
    assert verify.g_test(counts_of(drawn, 10_000), law.tolist()).p < verify.WRONG


def test_an_impossible_draw_fails_at_once():
    result = verify.g_test([500, 499, 1], [0.5, 0.5, 0.0])
    assert (result.p, result.impossible) == (0.0, 1)


def test_rare_cells_are_pooled():
    counts, expected = verify.pooled([90, 6, 3, 1], [89.0, 6.0, 3.0, 2.0])
    assert (counts.tolist(), expected.tolist()) == ([90, 6, 4], [89.0, 6.0, 5.0])
    counts, expected = verify.pooled([90, 6, 1], [89.0, 6.0, 2.0])
    assert (counts.tolist(), expected.tolist()) == ([90, 7], [89.0, 8.0])
    assert verify.g_test([3], [1.0]).p == 1.0
    with pytest.raises(ValueError, match="sum to 1, got 0.9"):
        verify.g_test([1, 1], [0.5, 0.4])


def test_exact_law():
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0]).double()
    weights = [2.718281828**x for x in (4, 2, 2, 0)]
    assert verify.exact_law(logits, 0.5).tolist() == pytest.approx([w / sum(weights) for w in weights])
    kept = verify.exact_law(logits, 0.5, 0.85).tolist()  # 0.78 alone are too few, and equals stay together
    assert kept == pytest.approx([w / sum(weights[:3]) for w in weights[:3]] + [0.0])
    assert verify.exact_law(logits, 0.5, 0.5).tolist() == [1, 0, 0, 0]


def chain(path):
    """Law of a token by the one before it."""
    law = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    return law.roll(path[-1]) if path else law


def drawn_chains(count, law=chain, seed=0):
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        path = ()
        for _ in range(3):
            path += (rng.choices(range(4), law(path).tolist())[0],)
        out.append(path)
    return out


def test_law_tree_covers_all_and_tells_laws_apart():
    tree = verify.LawTree(chain, 3000, 3)
    assert sum(tree.cells.values()) == pytest.approx(1)
    assert len(tree.cells) > 4 + 4 * 3  # the third token, too
    assert tree.test(drawn_chains(3000)).p > 1e-3

    def later_wrong(path):
        law = chain(path)
        return law if len(path) < 2 else law**0.8

    assert tree.test(drawn_chains(3000, later_wrong)).p < verify.SUSPECT
    result = tree.test([*drawn_chains(2999), (0, 3, 0)])
    assert (result.p, result.impossible) == (0.0, 1)


def test_an_impossible_draw_does_not_hide_among_rare_ones():
    law = torch.tensor([0.99, 0.005, 0.005, 0.0], dtype=torch.float64)
    result = verify.LawTree(lambda path: law, 500, 1).test([(0,)] * 496 + [(1,)] * 3 + [(3,)])
    assert (result.p, result.impossible) == (0.0, 1)


@pytest.mark.parametrize("drafter", ["mask", "fixed"])
def test_a_rejection_rule_that_accepts_too_often_is_found(model, monkeypatch, drafter):
    prompt = model.encode("class Cache:\n    def __init__(self, size):\n        self.size =")
    check = verify.LawCheck(model, prompt, drafter, 0.7, 0.9, 256)
    right = check.run()
    assert right.status == "ok"
    assert 0 < right.facts["accepted"] < right.facts["drafted"]
    accept_too_often(monkeypatch)
    wrong = check.run()
    assert wrong.status == "FAILED"
    assert wrong.facts["p"] < verify.SUSPECT


def test_a_suspect_law_is_decided_by_fresh_draws(model, monkeypatch):
    check = verify.LawCheck(model, [5], "none", 1.0, 1.0, 100)
    asked = []

    def test(ps):
        asked.clear()

        def outcome(samples, seed):
            asked.append((samples, seed))
            facts = {"samples": samples, "drafted": 0, "accepted": 0}
            return verify.GTest(9.0, 5, ps[len(asked) - 1]), facts

        monkeypatch.setattr(check, "_test", outcome)
        return check.run().status

    assert (test([0.5]), asked) == ("ok", [(100, 0)])
    assert (test([1e-6]), len(asked)) == ("FAILED", 1)
    assert (test([1e-4, 0.5]), asked) == ("ok", [(100, 0), (400, 1)])
    assert (test([1e-4, 1e-4]), len(asked)) == ("FAILED", 2)


def test_a_rule_that_had_nothing_to_test_does_not_pass(model):
    check = verify.LawCheck(model, model.encode("import"), "fixed", 1.0, 1.0, 8)
    check._drafter = lambda: lambda known, count: []
    result = check.run()
    assert result.status == "FAILED"
    assert "no draft was tested" in result.note
