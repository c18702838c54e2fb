"""`blockdraft passk`: the estimate against enumeration, checks against programs that misbehave, and a run of it all."""

import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

import blockdraft
from blockdraft import cli, passk
from blockdraft.errors import RequestError
from blockdraft.passk import Checker, Interval, Limits, evaluation, pass_at_k, read_records
from blockdraft.passk.checker import RUNNER

PROMPTS = ["def read_lines(path):\n", "class Stack:\n", "import os\n"]
RECORD = {"id": 7, "prompt": "p", "completion": "c", "text": "pc", "tests": [1, "ä"]}
SHORT = Limits(timeout=1.0, memory_mb=500)
LONG = Limits(timeout=30.0, memory_mb=500)


# The estimate


def enumerated(n: int, c: int, k: int) -> Fraction:
    draws = list(itertools.combinations(range(n), k))
    return Fraction(sum(any(i < c for i in draw) for draw in draws), len(draws))


@pytest.mark.parametrize("n", range(1, 9))
def test_estimate_is_the_share_of_draws_that_pass(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(float(enumerated(n, c, k)), abs=1e-14)


@pytest.mark.parametrize(("n", "c", "k"), [(200, 3, 100), (5000, 2500, 7), (10**5, 10, 10**4), (10**4, 9000, 1000)])
def test_estimate_of_many_samples(n, c, k):
    """Binomials of this size leave float64; exact integers do not."""
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (0, 0, 1, "n must be an integer at least 1, got 0"),
        (5, 6, 1, r"c must be an integer in \[0, 5\], got 6"),
        (5, -1, 1, "c must be .* got -1"),
        (5, 1, 6, r"k must be an integer in \[1, 5\], got 6"),
        (5, 1, 0, "k must be .* got 0"),
        (5, 1, 1.0, "k must be .* got 1.0"),
        (5, True, 1, "c must be .* got True"),
    ],
)
def test_estimate_of_what_cannot_be(n, c, k, message):
    with pytest.raises(RequestError, match=message):
        pass_at_k(n, c, k)


# The interval


def rates(prompts: int, seed: int = 1) -> list[float]:
    draw = random.Random(seed)
    return [draw.random() ** 2 for _ in range(prompts)]


@pytest.mark.parametrize("prompts", [2, 10, 100])
def test_interval_is_around_the_mean_and_depends_on_the_seed_alone(prompts):
    values = rates(prompts)
    interval = Interval.bootstrap(values, seed=3)
    assert interval.mean == pytest.approx(sum(values) / prompts)
    assert min(values) <= interval.low < interval.mean < interval.high <= max(values)
    assert interval == Interval.bootstrap(values, seed=3)
    assert prompts == 2 or interval != Interval.bootstrap(values, seed=4)


def test_interval_shrinks_with_the_root_of_the_prompts():
    widths = [interval.high - interval.low for interval in (Interval.bootstrap(rates(n), 0) for n in (25, 400))]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)


def test_interval_has_the_width_of_the_normal_law():
    """The mean of 400 fair coins has a deviation of 1/40, and 95 % lie within 1.96 of them."""
    interval = Interval.bootstrap([0.0, 1.0] * 200, seed=0)
    assert (interval.low, interval.high) == pytest.approx((0.5 - 1.96 / 40, 0.5 + 1.96 / 40), abs=0.004)


def test_interval_covers_the_truth_as_often_as_it_says():
    """Of 200 samples of 40 coins each; by the binomial law, 95 % would be missed by 7 points once in 10,000 times."""
    draw = random.Random(0)
    covered = 0
    for trial in range(200):
        interval = Interval.bootstrap([float(draw.random() < 0.3) for _ in range(40)], trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 < 1


def test_one_prompt_has_no_interval():
    assert Interval.bootstrap([0.25], seed=0) == Interval(0.25, None, None)
    assert Interval(0.25, None, None).shown(".2f") == "0.25"


def test_resamples_in_parts_are_as_many(monkeypatch):
    monkeypatch.setattr(passk.estimate, "PICKS", 300)
    parts = list(passk.estimate._resamples(7, 0))
    assert sum(map(len, parts)) == passk.estimate.RESAMPLES
    assert all(part.numel() <= 300 for part in parts)


# Prompts


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def test_records_keep_their_fields(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a", "tests": [1]}', "", '{"id": "x", "prompt": [1, 2]}')
    assert read_records(path) == [{"id": 1, "prompt": "a", "tests": [1]}, {"id": "x", "prompt": [1, 2]}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON: "),
        (b'{"prompt": "\xff"}', "no JSON: .*utf-8"),
        ("[1]", r'must be an object with a "prompt", got \[1\]'),
        ("{}", '"prompt" must be text or a list of token ids, not empty, got None'),
        ('{"prompt": ""}', "\"prompt\" must be .* got ''"),
        ('{"prompt": []}', r'"prompt" must be .* got \[\]'),
        ('{"prompt": [1, true]}', r'"prompt" must be .* got \[1, True\]'),
        ('{"prompt": 5}', '"prompt" must be .* got 5'),
        ('{"prompt": "a", "text": "b"}', '"text" is reserved'),
        ('{"prompt": "a", "completion": "b"}', '"completion" is reserved'),
    ],
    ids=["broken", "bytes", "list", "none", "empty", "no-ids", "bool", "number", "text", "completion"],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}', line)
    with pytest.raises(RequestError, match=f"p.jsonl:2: {message}"):
        read_records(path)


def test_no_file_and_no_prompts(tmp_path):
    with pytest.raises(RequestError, match="p.jsonl: No such file"):
        read_records(tmp_path / "p.jsonl")
    with pytest.raises(RequestError, match="p.jsonl: must hold a prompt a line, got none"):
        read_records(write(tmp_path / "p.jsonl", "", " "))


# Checks: every program here misbehaves in a way that a completion can


def python(code: str) -> Checker:
    return Checker.command([sys.executable, "-c", code])


def function(folder: Path, body: str) -> Checker:
    """A checker function of that body."""
    lines = ["import os, sys, time", "def check(record):", *(f"    {line}" for line in body.splitlines())]
    return Checker.python(f"{write(folder / 'judge.py', *lines)}:check")


def outcome(checker: Checker, limits: Limits = LONG) -> tuple[str, str]:
    verdict = checker.check(RECORD, limits)
    assert 0 < verdict.seconds < limits.timeout + 2
    return verdict.outcome, verdict.detail


def gone(pid: int) -> bool:
    """Whether the process has ended; waits a little, for what the kernel still does after a kill."""
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


def pid_in(path: Path) -> int:
    for _ in range(500):
        if path.exists() and path.read_text().endswith("\n"):
            return int(path.read_text())
        time.sleep(0.02)
    raise AssertionError(f"{path} was not written")


def test_command_reads_the_record(tmp_path):
    code = f"import json, sys; sys.exit(json.loads(sys.stdin.readline()) != {RECORD!r})"
    assert outcome(python(code)) == ("pass", "")
    assert outcome(python(code.replace("!=", "=="))) == ("fail", "exit status 1")


def test_command_is_split_without_a_shell(tmp_path):
    assert outcome(Checker.command('grep -q \'"completion": "c"\''))[0] == "pass"
    assert outcome(Checker.command("grep -q $HOME"))[0] == "fail"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(3)", ("fail", "exit status 3")),
        ("assert 1 == 2, 'no'", ("fail", "AssertionError: no")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ("crash", "signal 11, Segmentation fault")),
        ("import os; os.kill(os.getpid(), 34)", ("crash", "signal 34, Real-time signal 0")),
        ("import os; os.killpg(0, 9)", ("crash", "signal 9, Killed")),
        ("bytearray(4 << 30)", ("memory", "MemoryError")),
        ("import ctypes; ctypes.CDLL(None).abort()", ("crash", "signal 6, Aborted")),
        ("import sys; sys.exit(87)", ("fail", "exit status 87")),  # what a function that passes ends with
    ],
    ids=["exit", "assert", "SIGSEGV", "real-time", "own-group", "4GB", "abort", "87"],
)
def test_command_that_ends_badly(code, expected):
    assert outcome(python(code)) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return record['text'] == 'pc'", ("pass", "")),
        ("return record['tests'] == []", ("fail", "")),
        ("assert False, 'no'", ("fail", "AssertionError: no")),
        ("return None", ("fail", "must return a bool, got None")),
        ("sys.exit(0)", ("fail", "SystemExit: 0")),
        ("os._exit(0)", ("fail", "")),
        ("os.abort()", ("crash", "signal 6, Aborted")),
        ("bytearray(4 << 30)", ("memory", "MemoryError")),
        ("return input() == ''", ("fail", "EOFError: EOF when reading a line")),
        ("def f(): f()\nf()", ("fail", "RecursionError: maximum recursion depth exceeded")),
        ("print('x' * (1 << 22))\nreturn True", ("pass", "")),
        ("sys.stderr.write('MemoryError: caught')\nreturn True", ("pass", "")),
    ],
    ids=["pass", "fail", "assert", "None", "exit", "_exit", "abort", "4GB", "input", "recursion", "print", "said"],
)
def test_function(tmp_path, body, expected):
    got = outcome(function(tmp_path, body))
    assert got[0] == expected[0]
    assert got[1].endswith(expected[1])


@pytest.mark.parametrize("body", ["while True: pass", "time.sleep(100)", "os.kill(os.getpid(), 19)\ntime.sleep(100)"])
def test_time_limit_of_a_function(tmp_path, body):
    assert outcome(function(tmp_path, body), SHORT) == ("timeout", "not done after 1 s")


@pytest.mark.parametrize(
    "command", ["sh -c 'while :; do :; done'", "yes", "sh -c 'yes >&2'", "sh -c \"trap '' TERM HUP INT; sleep 100\""]
)
def test_time_limit_of_a_command(command):
    assert outcome(Checker.command(command), SHORT) == ("timeout", "not done after 1 s")


WAYS = {"child": "{} &", "own-session": "setsid {} &", "orphan": "(setsid {} &);"}


def starts_sleeper(way: str, path: Path, then: str) -> Checker:
    """A shell that starts a process that sleeps, waits until that has written its id, and goes on with `then`."""
    start = WAYS[way].format(f"sh -c 'echo $$ > {path}; exec sleep 1000'")
    return Checker.command(["sh", "-c", f"{start} while ! [ -s {path} ]; do sleep 0.01; done; {then}"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("then", "expected", "limits"),
    [
        ("sleep 1000", "timeout", Limits(timeout=2.0)),
        ("exit 0", "pass", LONG),
        ("kill -ABRT $$", "crash", LONG),
    ],
    ids=["timeout", "pass", "crash"],
)
def test_nothing_outlives_a_check(tmp_path, way, then, expected, limits):
    path = tmp_path / "pid"
    assert starts_sleeper(way, path, then).check(RECORD, limits).outcome == expected
    assert gone(pid_in(path))


def supervisor(folder: Path, checker: Checker, timeout: float = 100) -> str:
    """Python code that runs a supervisor to its end, as `Checker.check` does, and sets `status`."""
    job = {**checker.job, "record": RECORD, "timeout": timeout, "memory_bytes": 10**9}
    path = write(folder / "job.json", json.dumps(job))
    command = [sys.executable, "-P", str(RUNNER)]
    return f"import subprocess; status = subprocess.run({command}, stdin=open({str(path)!r})).returncode"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupted_supervisor_ends_its_check(tmp_path, number):
    path = tmp_path / "pid"
    supervisor(tmp_path, starts_sleeper("own-session", path, "sleep 1000"))
    with (tmp_path / "job.json").open() as job:
        # A shell's background jobs, and what they start, ignore SIGINT.
        heed = partial(signal.signal, number, signal.SIG_DFL)
        command = [sys.executable, "-P", RUNNER]
        process = subprocess.Popen(command, stdin=job, stdout=subprocess.DEVNULL, preexec_fn=heed)
    pid = pid_in(path)
    process.send_signal(number)
    assert process.wait(30) == 130
    assert gone(pid)


def test_check_ends_with_who_asked_for_it(tmp_path):
    path = tmp_path / "pid"
    code = supervisor(tmp_path, starts_sleeper("orphan", path, "sleep 1000"))
    asker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    pid = pid_in(path)
    asker.kill()
    asker.wait()
    assert gone(pid)


@pytest.mark.parametrize("command", ["yes", "sh -c 'yes >&2'"], ids=["stdout", "stderr"])
def test_flood_takes_no_memory(tmp_path, command):
    """In a second a flood is hundreds of megabytes; each process of the check stays below 64."""
    code = supervisor(tmp_path, Checker.command(command), timeout=1)
    measured = "; import resource; print(); print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code + measured], capture_output=True, text=True, check=True)
    status, kib = map(int, done.stdout.split("\n")[-2].split())
    assert status == 0
    assert kib < 64 << 10


def test_last_words_survive_a_flood():
    code = "import sys; sys.stderr.write('x\\n' * (1 << 21)); sys.stderr.write('last words\\n'); sys.exit(1)"
    assert outcome(python(code)) == ("fail", "last words")


def test_only_the_end_of_what_was_said_is_kept():
    assert outcome(python("import sys; sys.exit('A' + 'b' * 10000)")) == ("fail", "b" * 200)


def test_long_record_to_a_checker_that_does_not_read(tmp_path):
    """Longer than a pipe holds."""
    verdict = Checker.command("true").check({**RECORD, "prompt": "x" * (1 << 22)}, LONG)
    assert verdict.outcome == "pass"


def test_no_core_file_and_limits_for_children():
    code = "import resource as r; assert r.getrlimit(r.RLIMIT_CORE) == (0, 0); assert r.getrlimit(r.RLIMIT_AS)[1] == {}"
    nested = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {!r}]).returncode)"
    assert outcome(python(nested.format(code.format(LONG.memory_mb * 10**6)))) == ("pass", "")


def test_command_has_the_usual_signals():
    """Python ignores SIGPIPE and SIGXFSZ, and would hand that on."""
    _, line = outcome(Checker.command("sh -c 'grep SigIgn /proc/self/status >&2; exit 1'"))
    ignored = int(line.removeprefix("SigIgn:"), 16)
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


def test_checker_that_attacks_its_supervisor(monkeypatch):
    monkeypatch.setattr(passk.checker, "GRACE_SECONDS", 0.5)
    code = "import os, signal; os.kill(os.getppid(), signal.{})"
    assert python(code.format("SIGKILL")).check(RECORD, LONG).outcome == "crash"
    assert python(code.format("SIGSTOP")).check(RECORD, SHORT).outcome == "timeout"


def test_supervisor_that_cannot_work_is_no_outcome(monkeypatch):
    monkeypatch.setattr(passk.checker, "RUNNER", "no/such/runner.py")
    with pytest.raises(RuntimeError, match="no check was possible: .*no/such/runner.py"):
        Checker.command("true").check(RECORD, SHORT)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:no_such_function", "AttributeError: module 'json' has no attribute 'no_such_function'"),
        ("json:__name__", "must be a function, got 'json'"),
        ("no/such/file.py:f", "FileNotFoundError"),
    ],
)
def test_function_that_cannot_be_loaded(spec, message):
    with pytest.raises(RequestError, match=f"checker {spec!r} cannot be loaded within 30 s and 500 MB: .*{message}"):
        Checker.python(spec).try_load(LONG)


@pytest.mark.parametrize("spec", ["json", ":f", "json:", 5], ids=str)
def test_function_must_be_named_in_full(spec):
    with pytest.raises(RequestError, match="checker must be MODULE:FUNCTION"):
        Checker.python(spec)


@pytest.mark.parametrize("command", ["", "no-such-program -x", "sh -c 'open", []], ids=str)
def test_command_must_exist(command):
    with pytest.raises(RequestError, match="checker must be a command"):
        Checker.command(command)


def test_callable_is_found_again(tmp_path, monkeypatch):
    write(tmp_path / "found_again.py", "def check(record): return record['id'] == 7", "class A: check = check")
    monkeypatch.syspath_prepend(tmp_path)
    import found_again

    checker = Checker.python(found_again.check)
    assert checker.name == "found_again:check"
    assert outcome(checker) == ("pass", "")
    with pytest.raises(RequestError, match="at the top level of a module, got <function .*<lambda>"):
        Checker.python(lambda record: True)
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    main.check = found_again.check
    monkeypatch.setattr(found_again.check, "__module__", "__main__")
    with pytest.raises(RequestError, match="must be a function in a file"):
        Checker.python(main.check)
    main.__file__ = found_again.__file__
    assert outcome(Checker.python(main.check)) == ("pass", "")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"timeout": 0}, "timeout must be a number of seconds"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"timeout": True}, "timeout must be"),
        ({"memory_mb": 0}, "memory_mb must be an integer"),
        ({"memory_mb": 0.5}, "memory_mb must be an integer"),
    ],
    ids=str,
)
def test_limits_are_checked(limits, message):
    with pytest.raises(RequestError, match=message):
        Limits(**limits)


# All of it, on the bundled model


@pytest.fixture(scope="module")
def model():
    return blockdraft.ZayaForCausalLM.from_pretrained(blockdraft.bundled_model(), progress=False)


@pytest.fixture
def prompts(tmp_path):
    records = [{"prompt": prompt, "letter": letter} for prompt, letter in zip(PROMPTS, "efi", strict=True)]
    return write(tmp_path / "prompts.jsonl", *map(json.dumps, records))


HAS_LETTER = "return record['completion'].count(record['letter']) > 1 and record['text'].startswith(record['prompt'])"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["passk", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def options(prompts, tmp_path):
    checker = function(tmp_path, HAS_LETTER).name
    return [prompts, "--checker-python", checker, "--samples", 4, "--max-tokens", 16, "--seed", 5, "--jobs", 2]


def test_report_is_what_the_completions_say(capsys, tmp_path, model, options):
    out = tmp_path / "out.jsonl"
    status, printed, err = run(capsys, *options, "--k", "3,1", "--json", "--out", out)
    assert (status, err) == (0, "passk: ar: 12 completions\npassk: lossless: 12 completions\n")
    report, completions = json.loads(printed), [json.loads(line) for line in out.read_text().splitlines()]

    params = [replace(evaluation.DEFAULT_PARAMS, n=4, max_tokens=16, seed=5 + i, sampler="ar") for i in range(3)]
    expected = model.generate(PROMPTS, params)
    for sampler in ("ar", "lossless"):
        mine = [completion for completion in completions if completion["sampler"] == sampler]
        assert [(c["completion"], c["token_ids"]) for c in mine] == [(o.text, o.token_ids) for o in expected]
        places = [(completion["id"], completion["sample"], completion["seed"]) for completion in mine]
        assert places == [(i + 1, sample, 5 + i) for i in range(3) for sample in range(4)]
        check_report(report["samplers"][sampler], mine)


def check_report(result: dict, completions: list[dict]) -> None:
    """One sampler's part of a report, from its completions: 3 prompts x 4 samples."""
    judged = [completion["completion"].count("efi"[completion["id"] - 1]) > 1 for completion in completions]
    assert 0 < sum(judged) < 12, "else the prompts are no test"
    assert [completion["outcome"] == "pass" for completion in completions] == judged
    passed = [sum(judged[first : first + 4]) for first in (0, 4, 8)]
    assert result["passed"] == [{"id": i + 1, "passed": count} for i, count in enumerate(passed)]
    counts = {"pass": sum(judged), "fail": 12 - sum(judged), "timeout": 0, "memory": 0, "crash": 0}
    assert result["outcomes"] == counts
    assert result["tokens"] == sum(len(completion["token_ids"]) for completion in completions)
    for k in (1, 3):
        estimate = result["pass_at_k"][str(k)]
        assert estimate["mean"] == pytest.approx(sum(enumerated(4, c, k) for c in passed) / 3)
        assert estimate["low"] <= estimate["mean"] <= estimate["high"]


def test_tokens_per_forward_counts_all_forwards(model, monkeypatch):
    """Not the mean of the completions' own figures, in which a short one weighs as much as a long one."""
    outputs = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda *a: outputs.append(generate(*a)) or outputs[-1])
    report = passk.evaluate(model, records_of(3), Checker.command("true"), small(max_tokens=12, stop=["e"]))
    for result, of_sampler in zip(report.results, outputs, strict=True):
        stats = [output.stats for output in of_sampler]
        forwards = sum(s.draft_forwards + s.verify_forwards + s.ar_forwards for s in stats)
        assert result.tokens_per_forward == sum(s.committed for s in stats) / forwards
    assert [result.params.sampler for result in report.results] == ["ar", "lossless"]
    assert report.results[0].tokens_per_forward == 1


def test_json_has_these_keys(capsys, options):
    options += ["--samples", 2, "--json", "--sampler", "ar,lossless:block_length=4", "--timeout", 9]
    _, printed, _ = run(capsys, *options)
    report = json.loads(printed)
    assert report.keys() == {
        "prompts", "samples", "k", "estimator", "interval", "params", "checker", "limits", "samplers", "comparisons",
    }  # fmt: skip
    assert (report["prompts"], report["samples"], report["k"]) == (3, 2, [1, 2])
    assert report["limits"] == {"timeout": 9.0, "memory_mb": 2048}
    assert report["params"].items() >= {"temperature": 0.8, "top_p": 0.95, "n": 2, "max_tokens": 16, "seed": 5}.items()
    interval = {"method": "percentile bootstrap over prompts", "level": 0.95, "resamples": 10_000, "seed": 5}
    assert report["interval"] == interval
    assert list(report["samplers"]) == ["ar", "lossless:block_length=4"]
    for result in report["samplers"].values():
        assert result.keys() == {"pass_at_k", "outcomes", "tokens", "tokens_per_forward", "seconds", "passed"}
    (comparison,) = report["comparisons"]
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert comparison == {
        "sampler": "lossless:block_length=4", "baseline": "ar", "samples": 6, "identical_texts": 6,
        "identical_token_ids": 6, "difference": {"1": zero, "2": zero},
    }  # fmt: skip


def test_table(capsys, options):
    status, printed, _ = run(capsys, *options, "--samples", 2)
    assert status == 0
    lines = printed.splitlines()
    headings = ["sampler", "pass@1", "pass@2", "pass", "fail", "timeout", "memory", "crash", "tokens/forward"]
    assert lines[0] == "3 prompts x 2 samples, temperature 0.8, top-p 0.95, at most 16 tokens, seed 5"
    assert lines[3].split() == headings
    assert [line.split()[0] for line in lines[4:6]] == ["ar", "lossless"]
    assert lines[7] == "lossless against ar: 6 of 6 texts identical"
    assert lines[8] == "Intervals: 95%, percentile bootstrap over prompts, 10000 resamples."


def records_of(count: int) -> list[dict]:
    return [{"prompt": prompt} for prompt in PROMPTS[:count]]


def small(n: int = 2, **changes) -> blockdraft.SamplingParams:
    return blockdraft.SamplingParams(**{"temperature": 1.0, "n": n, "max_tokens": 4, "seed": 1} | changes)


def test_outcomes_are_counted_apart(model, tmp_path):
    """Prompts as token ids, whose text the checker is given all the same."""
    body = """
if record["kind"] == "timeout": time.sleep(100)
if record["kind"] == "memory": bytearray(4 << 30)
if record["kind"] == "crash": os.abort()
return record["kind"] == "pass" and record["text"] == "import os\\n" + record["completion"]
"""
    kinds = ["timeout", "memory", "crash", "fail", "pass", "pass"]
    records = [{"prompt": model.encode("import os\n"), "kind": kind} for kind in kinds]
    params = small(n=1, temperature=0.0)
    report = passk.evaluate(model, records, function(tmp_path, body), params, limits=Limits(3.0, 500), jobs=2)
    for result in report.results:
        assert result.outcomes == {"pass": 2, "fail": 1, "timeout": 1, "memory": 1, "crash": 1}
    assert report.pass_at_k(report.results[0], 1).mean == pytest.approx(2 / 6)


def test_same_completion_is_checked_once(model, monkeypatch):
    asked = []
    check = Checker.check
    monkeypatch.setattr(Checker, "check", lambda self, *a: asked.append(a[0]) or check(self, *a))
    report = passk.evaluate(model, records_of(2), Checker.command("true"), small(n=3, temperature=0.0))
    assert len(asked) == 2  # not 2 prompts x 3 samples x 2 samplers
    assert [result.outcomes["pass"] for result in report.results] == [6, 6]


def test_model_without_tokenizer(model, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", None)
    code = "import json, sys; r = json.load(sys.stdin); sys.exit(r['text'] is not None or len(r['completion']) != 4)"
    report = passk.evaluate(model, [{"prompt": [5, 6, 7]}], python(code), small(), samplers=["ar"])
    assert report.results[0].outcomes["pass"] == 2
    assert report.results[0].completions[0].completion == report.results[0].completions[0].token_ids


def test_difference_is_told_prompt_by_prompt(model):
    """A sampler that passes where the first does not; and no sampler is known by name but to SamplingParams."""
    report = passk.evaluate(
        model, records_of(3), Checker.command("true"), small(), samplers=["ar", "ar:temperature=0"], k=[2]
    )
    first, second = report.results
    assert second.params.temperature == 0
    failed = [replace(completion, outcome="fail") for completion in second.completions[:2]]
    second = replace(second, completions=[*failed, *second.completions[2:]])
    assert report.difference(second, 2).mean == pytest.approx(-1 / 3)
    assert report.pass_at_k(second, 2).mean == pytest.approx(2 / 3)
    assert report.identical(first, "completion") == 6
    assert report.identical(second, "completion") == sum(
        a.completion == b.completion for a, b in zip(first.completions, second.completions, strict=True)
    )


def test_fails_where_lossless_differs(capsys, monkeypatch, options):
    generate = blockdraft.ZayaForCausalLM.generate

    def altered(model, prompts, params):
        outputs = generate(model, prompts, params)
        if params[0].sampler == "lossless":
            outputs[-1] = replace(outputs[-1], token_ids=[*outputs[-1].token_ids[:-1], 0], text="other")
        return outputs

    monkeypatch.setattr(blockdraft.ZayaForCausalLM, "generate", altered)
    options += ["--samples", 2]
    status, printed, err = run(capsys, *options)
    assert status == 1
    assert "lossless differs from plain decoding" in err
    assert re.search(r"lossless against ar: 5 of 6 texts identical; pass@1 [+-]0.\d{3} \[.*\], pass@2 [+-]0", printed)
    assert run(capsys, *options, "--sampler", "ar,lossless:temperature=0.9")[0] == 0  # promised for equal laws only
    assert run(capsys, *options, "--sampler", "ar,lossless:groups=1:block_length=4")[0] == 1  # and whatever is drafted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "1,5"], "k must be an integer in [1, 4], got 5"),
        (["--k", "0"], "k must be an integer in [1, 4], got 0"),
        (["--sampler", "ar,magic"], "sampler must be "),
        (["--sampler", "ar,ar"], "samplers must be different names, one at least, got ['ar', 'ar']"),
        (["--sampler", "lossless:seed=3"], "sampler 'lossless:seed=3': must be NAME:PARAMETER=VALUE, one of "),
        (["--sampler", "lossless:block_length"], "must be NAME:PARAMETER=VALUE"),
        (["--sampler", "lossless:block_length=99"], "block_length must be "),
        (["--sampler", "lossless:stop=5"], "sampler 'lossless:stop=5': "),
        (["--samples", "0"], "n must be "),
        (["--temperature", "-1"], "temperature must be "),
        (["--timeout", "0"], "timeout must be "),
        (["--memory-mb", "0"], "memory_mb must be "),
        (["--jobs", "0"], "jobs must be "),
        (["--checker-python", "no_such_module:f"], "No module named 'no_such_module'"),
        (["--out", "no/such/folder/out.jsonl"], "--out no/such/folder/out.jsonl: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_before_anything_is_generated(capsys, monkeypatch, options, arguments, message):
    def no_generating(*_):
        raise AssertionError("it came to generating")

    monkeypatch.setattr(blockdraft.ZayaForCausalLM, "generate", no_generating)
    status, printed, err = run(capsys, *options, *arguments)
    assert (status, printed) == (2, "")
    assert err.startswith("blockdraft: ")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "5"], "k must be"),
        (["--sampler", "magic"], "sampler must be"),
        (["--checker-python", "no_such_module:f"], "no_such_module"),
        (["--out", "no/such/folder/out.jsonl"], "--out"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_told_before_the_model_is_loaded(options, arguments, message):
    args = cli.build_parser().parse_args(["passk", *map(str, options), *arguments])
    with pytest.raises(RequestError, match=message):
        passk.main(args, load=lambda _: pytest.fail("it came to loading"))


def test_prompts_are_not_written_over(capsys, options, prompts):
    before = prompts.read_bytes()
    status, _, err = run(capsys, *options, "--out", prompts)
    assert (status, prompts.read_bytes()) == (2, before)
    assert "must be another file than the prompts" in err


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "records must hold a prompt, got none"),
        (["text"], "record 1: must be an object"),
        ([{"prompt": "a"}, {"prompt": [10**9]}], "prompt 2: token ids must be integers"),
        ([{"prompt": "a", "id": "x", "extra": {1, 2}}], "prompt 'x': .*set is not JSON"),
    ],
)
def test_bad_records(model, records, message):
    with pytest.raises(RequestError, match=message):
        passk.evaluate(model, records, Checker.command("true"), small())


def test_wrong_usage(capsys, prompts):
    for arguments in ([prompts], [prompts, "--checker", "true", "--checker-python", "a:b"], ["--checker", "true"],
                      [prompts, "--checker", "true", "--k", "1,x"]):  # fmt: skip
        with pytest.raises(SystemExit, match="^2$"):
            cli.main(["passk", *map(str, arguments)])
    assert "must be integers separated by commas, got '1,x'" in capsys.readouterr().err


def test_usual_k():
    assert evaluation.make_ks(None, 10) == (1, 2, 5, 10)
    assert evaluation.make_ks(None, 1) == (1,)
    assert evaluation.make_ks([5, 1, 5], 9) == (1, 5)


def test_drawn_seed_is_reported_and_repeats(model):
    once = passk.evaluate(model, records_of(2), Checker.command("true"), small(seed=None), samplers=["ar"])
    again = passk.evaluate(model, records_of(2), Checker.command("true"), once.params, samplers=["ar"])
    assert once.params.seed is not None
    assert [c.token_ids for c in once.results[0].completions] == [c.token_ids for c in again.results[0].completions]
