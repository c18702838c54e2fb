"""The recipe's tasks: each is solved by its file, and not by what is broken."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "nano"))
import tasks
from blockdraft import ZayaForCausalLM, bundled_model

COUNT = 6


@pytest.fixture(scope="module")
def made():
    return tasks.make(tasks.data.split()[1], COUNT)


def of_kind(made, kind):
    return [task for task in made if task["kind"] == kind]


def test_tasks_are_what_they_say(made):
    assert [task["id"] for task in made] == [f"{kind}-{i}" for kind in tasks.KINDS for i in range(COUNT)]
    assert made == tasks.make(tasks.data.split()[1], COUNT)
    assert made != tasks.make(tasks.data.split()[1], COUNT, seed=1)
    texts = {str(path): text for path, text in tasks.data.split()[1]}
    for task in made:
        assert task["prompt"] + task["reference"] in texts[task["file"]]
        assert tasks.data.is_held_out(Path(task["file"]))
        assert 2 <= len(task["reference"]) <= tasks.MISSING < tasks.PARAMS.max_tokens
        assert 0 <= task["begin"] < len(task["prompt"]) <= tasks.CONTEXT
    for kind in tasks.KINDS:
        assert len({task["file"] for task in of_kind(made, kind)}) == COUNT


@pytest.mark.parametrize("after", ["\n", "\nimport os\n", "\n)]}\"'"])
def test_the_file_s_own_continuation_passes(made, after):
    assert all(tasks.answered(task, task["reference"] + after) for task in made)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_broken_continuations_fail(made, kind):
    for task in of_kind(made, kind):
        reference = task["reference"]
        broken = ["", "\n", " " * 40, reference[:-1], reference[:-1] + "\n"]
        if kind in ("line", "name"):
            broken += [reference, "?" + reference[1:] + "\n", reference + "_1\n"]
        if kind == "brackets":
            broken += [reference[:-1] + {")": "]", "]": "}", "}": ")"}[reference[-1]], "\n" + reference[:-1] + '"']
        if kind == "docstring":
            broken += ['"""', 'a"""', reference[:-3] + "'''\n"]
        assert [text for text in broken if tasks.answered(task, text)] == []


def answered(kind, prompt, completion, begin=0):
    return tasks.answered({"kind": kind, "prompt": prompt, "begin": begin, "reference": ""}, completion)


@pytest.mark.parametrize(
    ("prompt", "completion", "passes"),
    [
        ("x = f(a, [1", "])", True),
        ("x = f(a, [1", "]) + g(", True),  # what comes behind is not judged
        ("x = f(a, [1", ")]", False),
        ("x = f(a, [1", "]", False),
        ("x = f(a, [1", "], ')'", False),
        ("x = f(a, [1", "], # )\n ')')", True),
        ("x = f(a, [1", "], '''", False),
        ("x = f(a, [1", "] + )", False),  # closed, but no Python
        ("x = f(a)[", "0]", True),
        ("x = f(a)[", "0", False),
        ("x = f('", "a)')", True),
        ("x = f('", "a)", False),
        ('x = f("""', 'a)\n""", 1)', True),
        ("x = 1", " + f(2)", True),
    ],
)
def test_brackets(prompt, completion, passes):
    assert answered("brackets", prompt, completion) == passes
    assert answered("brackets", "])\n" + prompt, completion, begin=3) == passes


@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        ('of the file."""', True),
        ('of\n        the file.\n        """\n        (', True),
        ('file."""', False),
        ('"""', False),
        ("of the file.", False),
        ('of the \\file\\"""', False),
    ],
)
def test_docstrings(completion, passes):
    assert answered("docstring", '    def f(self):\n        """The end ', completion, begin=4) == passes


def test_too_few_places_are_told():
    with pytest.raises(SystemExit, match="too few places for tasks of kind 'line'"):
        tasks.make([(Path("a.py"), "import os\n")], 2)


def test_prompts_hold_the_start_of_what_is_checked():
    short, long = (tasks.Source("a.py", "x = [\n" + "    1,\n" * count + "]\n") for count in (20, 100))
    assert short.task("brackets", next(short.brackets()), tasks.random.Random(0))["begin"] == 0
    assert long.task("brackets", next(long.brackets()), tasks.random.Random(0)) is None


def test_lossless_solves_what_plain_decoding_solves(made, monkeypatch, tmp_path):
    few = [of_kind(made, kind)[0] for kind in tasks.KINDS]
    monkeypatch.setattr(tasks, "PARAMS", replace(tasks.PARAMS, n=2, max_tokens=16))
    monkeypatch.setattr(tasks, "KS", (1, 2))
    model = ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)
    table, result = tasks.evaluate(model, few, 2)
    ar, lossless = (result["samplers"][name] for name in ("ar", "lossless"))
    assert ar["passed"] == lossless["passed"]
    assert lossless["tokens_per_forward"] > 1.2
    assert result["comparisons"][0]["identical_token_ids"] == 8
    assert result["samplers"].keys() == result["pass_at_1_by_kind"]["line"].keys()
    whole = sum(kind["ar"]["mean"] for kind in result["pass_at_1_by_kind"].values()) / 4
    assert whole == pytest.approx(ar["pass_at_k"]["1"]["mean"])
    assert "4 prompts x 2 samples" in table
    json.dumps(result)
