import base64
import copy
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from blockdraft import RequestError, SamplingParams, StreamEvent, ZayaForCausalLM, bundled_model, cli, trace
from blockdraft.live import DIM, STRUCK, LiveView

PROMPT = "def read_lines(path):\n"
HOSTILE = "</script><img src=x onerror=alert(1)><!-- & \u2028 é漢🙂 script-hash trace-data"
PARAMS = {
    "blocks": SamplingParams(max_tokens=40, groups=1, seed=2**62 + 1),
    "sampled": SamplingParams(max_tokens=24, groups=0, temperature=0.9, seed=3, n=2, logprobs=2),
    "plain": SamplingParams(max_tokens=12, sampler="ar", seed=1, stop=("e r",)),
    "denoise": SamplingParams(max_tokens=24, sampler="denoise", denoising_steps=4, seed=1, logprobs=0),
}


@pytest.fixture(scope="module")
def model():
    return ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)


def record(model, prompt, params):
    """Records, and the events that they were made from."""
    recorder = trace.Recorder(model.tokenizer, model.encode(prompt))
    header = recorder.header(model, prompt, params, "a model")
    events = list(model.stream(prompt, params))
    return [header, *[recorder.step(event) for event in events], recorder.summary()], events


@pytest.fixture(scope="module")
def made(model):
    return record(model, PROMPT, PARAMS["blocks"])


@pytest.fixture
def records(made):
    return copy.deepcopy(made[0])


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_a_file_gives_the_stream_back(tmp_path, model, params):
    records, events = record(model, PROMPT, params)
    read = trace.read(write(tmp_path / "a.jsonl", records))
    assert read == records
    assert list(trace.events(read)) == events
    assert any(event.output for event in events)


def test_record_says_what_the_step_did(made):
    records, events = made
    verified = [(r, e) for r, e in zip(records[1:], events, strict=False) if 0 < e.accepted < len(e.drafted)]
    assert verified, "a step that accepts and rejects"
    for step, event in verified:
        assert [token["id"] for token in step["rejected"]] == list(event.drafted[event.accepted :])
        for i, token in enumerate(step["drafted"]):
            assert token["logprob"] == event.draft_logprobs[i] <= 0
        assert [token["logprob"] for token in step["emitted"]] == list(event.logprobs)
        assert step["plan"] == {"rows": event.plan[0], "groups": list(event.plan[1])}
    assert "".join(t["text"] for r in records[1:-1] for t in r["emitted"]) == events[-1].output.text
    assert records[0]["parameters"]["seed"] == 2**62 + 1
    assert records[-1]["outputs"][0]["stats"]["tokens_per_forward"] == events[-1].output.stats.tokens_per_forward


def test_the_header_names_a_seed_that_was_drawn(model):
    header, *_, summary = trace.trace(model, PROMPT, SamplingParams(max_tokens=2))
    assert header["parameters"]["seed"] == summary["outputs"][0]["seed"]


def test_a_character_of_several_tokens_is_the_text_of_the_last(model):
    """Also where it begins in one step and ends in the next, and in drafts after it."""
    before, ids = (model.tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "é漢🙂b"))
    assert len(ids) > 5
    for cut in range(len(ids) + 1):
        recorder = trace.Recorder(model.tokenizer, before)
        first = recorder.step(StreamEvent(0, 0, "ar", (), 0, tuple(ids[:cut]), "", tuple(ids[cut:])))
        second = recorder.step(StreamEvent(0, 0, "verify", tuple(ids[cut:]), len(ids) - cut, tuple(ids[cut:]), "", ()))
        emitted = [token["text"] for token in first["emitted"]]
        for rest in (first["provisional"], second["drafted"], second["emitted"]):
            assert "".join(emitted + [token["text"] for token in rest]) == "é漢🙂b"


def test_without_a_tokenizer_texts_are_null(capsys, model):
    recorder = trace.Recorder(None, [1, 2])
    step = recorder.step(StreamEvent(0, 0, "verify", (5, 6), 1, (5, 7), "", (8,), logprobs=(-0.5, float("-inf"))))
    assert step["emitted"] == [{"id": 5, "text": None, "logprob": -0.5}, {"id": 7, "text": None, "logprob": None}]
    header = recorder.header(model, [1, 2], SamplingParams(), "")
    assert (header["prompt"], header["prompt_token_ids"]) == (None, [1, 2])
    trace.show(iter([header, step]), io.StringIO())


def test_parameters_that_are_no_json_are_named(model):
    params = SamplingParams(drafter=lambda tokens, count: [], logit_bias={5: 1.0}, bad_words=[[1, 2]], groups=(0, 3))
    header = trace.Recorder(model.tokenizer, [2]).header(model, "x", params, "")
    parameters = json.loads(json.dumps(header))["parameters"]
    assert "lambda" in parameters["drafter"]
    assert (parameters["logit_bias"], parameters["bad_words"], parameters["groups"]) == ({"5": 1.0}, [[1, 2]], [0, 3])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_trace_plays_as_the_live_view_showed_it(tmp_path, terminal, model, made):
    records, events = made
    live = Terminal()
    view = LiveView(live, model.tokenizer)
    view.start(PROMPT)
    for event in events:
        view.event(event)
    view.finish()
    trace.show(iter(trace.read(write(tmp_path / "a.jsonl", records))), terminal, frame_seconds=0)
    assert terminal.getvalue() == live.getvalue()
    assert DIM in live.getvalue()
    assert STRUCK in live.getvalue()


def test_of_several_samples_the_first_is_shown(model):
    records, events = record(model, PROMPT, PARAMS["sampled"])
    stream = io.StringIO()
    trace.show(iter(records), stream)
    first, second = (event.output.text for event in sorted(events, key=lambda e: e.sample) if event.output)
    assert first != second
    assert stream.getvalue() == PROMPT + first + "\n"


# The page


class Page(HTMLParser):
    """Elements and their attributes, and the content of each."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.content, self.open = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append((tag, dict(attributes).get("id")))
        self.content.setdefault(self.open[-1], "")

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.content[self.open[-1]] += data


@pytest.fixture(scope="module")
def hostile(model):
    """A trace whose prompt and tokens are all markup, as if the model had written it."""
    records, _ = record(model, HOSTILE, PARAMS["blocks"])
    for step in records[1:-1]:
        for token in step["drafted"] + step["emitted"] + step["rejected"] + step["provisional"]:
            token["text"] = HOSTILE
    records[0]["model"]["name"] = HOSTILE
    return records


def test_page_holds_the_trace(records):
    page = Page(trace.page(records))
    assert json.loads(page.content["script", "trace"]) == records


def test_hostile_text_stays_data(records, hostile):
    text = trace.page(hostile)
    page = Page(text)
    assert json.loads(page.content["script", "trace"]) == hostile
    assert page.elements == Page(trace.page(records)).elements, "the same elements, whatever the trace says"
    assert "<img" not in text
    assert text.count("</script") == 2
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(", text)


def test_page_needs_nothing_else(records):
    text = trace.page(records)
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|XMLHttp|import\(", text)
    for tag, attributes in Page(text).elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not attributes.keys() & {"src", "href", "action", "style"}


def test_policy_admits_the_page_s_own_script_and_style_only(records):
    page = Page(trace.page(records))
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.content[tag, None].encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


DOM = """
class Node {
  constructor() {
    Object.assign(this, { children: [], text: "", className: "", style: {}, heard: {}, marks: new Set() });
  }
  get classList() { return { toggle: (name, on) => (on ? this.marks.add(name) : this.marks.delete(name)) }; }
  get textContent() { return this.text + this.children.map((child) => child.textContent).join(""); }
  set textContent(text) { this.children = []; this.text = String(text); }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; this.text = ""; }
  addEventListener(name, action) { this.heard[name] = action; }
  setAttribute() {}
}
const ids = {}, document = new Node();
document.createElement = () => new Node();
document.getElementById = (id) => (ids[id] ??= new Node());
const press = (key) => document.heard.keydown({ key, target: { tagName: "BODY" }, preventDefault() {} });
const frame = () => ({
  text: ids.text.children.map((span) => [span.className, span.textContent]),
  marks: [ids.steps, ids.line].map((chart) => chart.children.map((part) => [...part.marks].sort().join(" "))),
  rows: ids.tokens.children.map((row) => row.children.map((cell) => cell.textContent)),
});
"""
PLAY = """
const frames = [frame()];
for (let i = 0; i < steps.length; i++) { press("ArrowRight"); frames.push(frame()); }
press("ArrowLeft");
const back = frame();
press("Home");
const heights = ids.steps.children.map((bar) => bar.children.map((f) => [f.style.height, f.children[0].style.height]));
const histogram = ids.histogram.children.map((row) => [row.children[0].textContent, row.children[1].textContent]);
const facts = ids.outcome.textContent;
press(" ");
const playing = [ids.play.textContent, frame()];
press(" ");
console.log(JSON.stringify({ frames, back, heights, histogram, facts, playing, paused: ids.play.textContent }));
"""


def run_page(text, tmp_path):
    """What the page's own script shows, on the part of a browser's interface that it uses."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the page's script with")
    page = Page(text)
    data = f"document.getElementById('trace').textContent = {json.dumps(page.content['script', 'trace'])};"
    script = tmp_path / "page.js"
    script.write_text(DOM + data + page.content["script", None].replace('"use strict";', "") + PLAY, encoding="utf-8")
    result = subprocess.run([node, script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def expected_frame(records, count):
    steps, parts = records[1 : count + 1], [["prompt", records[0]["prompt"]]]
    for step in steps[:-1]:
        parts += [["", token["text"]] for token in step["emitted"]]
    for step in steps[-1:]:
        parts += [["held", token["text"]] for token in step["emitted"][: step["accepted"]]]
        parts += [["own", token["text"]] for token in step["emitted"][step["accepted"] :]]
        parts += [["rejected", token["text"]] for token in step["rejected"]]
        parts += [["provisional", token["text"]] for token in step["provisional"]]
    return parts


@pytest.mark.parametrize("which", ["records", "hostile"])
def test_page_plays_the_steps(request, tmp_path, which):
    records = request.getfixturevalue(which)
    shown = run_page(trace.page(records), tmp_path)
    steps = records[1:-1]
    assert len(shown["frames"]) == len(steps) + 1
    for count, frame in enumerate(shown["frames"]):
        assert frame["text"] == expected_frame(records, count)
        marks = ["past"] * (count - 1) + ["now past"] * (count > 0) + [""] * (len(steps) - count)
        assert frame["marks"] == [marks, marks]
    assert shown["back"] == shown["frames"][-2]
    assert shown["playing"] == ["pause", shown["frames"][1]]
    assert shown["paused"] == "play"
    histogram = records[-1]["outputs"][0]["stats"]["acceptance_histogram"]
    assert shown["histogram"] == [[str(n), str(count)] for n, count in enumerate(histogram)]
    assert f"seed {2**62 + 1}" in shown["facts"], "all its digits"
    most = max(len(step["drafted"]) for step in steps)
    for step, heights in zip(steps, shown["heights"], strict=True):
        drafted, accepted = len(step["drafted"]), step["accepted"]
        assert bool(heights) == bool(drafted)
        for frame, held in heights:
            assert float(frame.rstrip("%")) == pytest.approx(100 * drafted / most)
            assert float(held.rstrip("%")) == pytest.approx(100 * accepted / drafted)
    last = [row[3] for row in shown["frames"][-1]["rows"]]
    assert last == ["accepted"] * steps[-1]["accepted"] + ["rejected"] * len(steps[-1]["rejected"]) + ["decided"] * (
        len(steps[-1]["emitted"]) - steps[-1]["accepted"]
    )


# Files that are no trace


def verification(records):
    return next(i for i, r in enumerate(records) if r.get("kind") == "verify" and 0 < r["accepted"] < len(r["drafted"]))


def change(**values):
    """A change of the first step that accepts and rejects."""

    def tamper(records):
        line = verification(records)
        records[line].update(values)
        return line + 1

    return tamper


def drop(line):
    def tamper(records):
        del records[line]
        return line + 1 if line >= 0 else len(records) + 1

    return tamper


def accept_one_more(records):
    line = verification(records)
    records[line]["accepted"] += 1
    return line + 1


def another_token(records):
    line = verification(records)
    records[line]["emitted"][0]["id"] += 1
    return line + 1


def another_own_token(records):
    """Consistent in itself: only the output knows."""
    records[verification(records)]["emitted"][-1]["id"] += 1
    return len(records)


def another_logprob(records):
    del records[2]["emitted"][0]["logprob"]
    return 3


def another_text(records):
    records[2]["text"] += "x"
    return len(records)


def another_histogram(records):
    records[-1]["outputs"][0]["stats"]["acceptance_histogram"][0] += 1
    return len(records)


def number_of_steps(records):
    records[-1]["steps"] += 1
    return len(records)


def swapped(records):
    records[2], records[3] = records[3], records[2]
    return 3


def goes_on(records):
    records.append(records[1])
    return len(records)


def second_header(records):
    records.insert(1, records[0])
    return 2


def early_end(records):
    records[1]["finish_reason"] = "eos"
    return 3


def version(records):
    records[0]["version"] = 2
    return 1


def no_outputs(records):
    records[-1]["outputs"] = []
    return len(records)


def stats_of_text(records):
    records[-1]["outputs"][0]["stats"]["drafted"] = "many"
    return len(records)


def an_array(records):
    records[1] = [1]
    return 2


TAMPERED = {
    "kind": (change(kind="guess"), r"step.kind must be one of prefill, .*'guess'"),
    "kind of a number": (change(kind=5), "step.kind must be str, got 5"),
    "negative": (change(accepted=-1), "step.accepted must be 0 to 15"),
    "boolean": (change(accepted=True), "step.accepted must be int, got True"),
    "tokens": (change(provisional=[{"id": "7", "text": ""}]), r"step.provisional\[0\].id must be int, got '7'"),
    "field": (change(plan={"rows": 1}), "step.plan has no 'groups'"),
    "seconds": (change(seconds=None), r"step.seconds must be int \| float, got None"),
    "not a number": (change(seconds=float("nan")), "not JSON: NaN is not a JSON number"),
    "accepted": (accept_one_more, "step.rejected must be"),
    "emitted": (another_token, "step.emitted must be"),
    "own": (another_own_token, r"outputs\[0\].token_ids must be"),
    "logprob": (another_logprob, r"step.emitted\[0\] has no 'logprob'"),
    "text": (another_text, r"outputs\[0\].text must be"),
    "histogram": (another_histogram, "acceptance_histogram must be"),
    "stats": (stats_of_text, "stats.drafted must be int, got 'many'"),
    "number of steps": (number_of_steps, "summary.steps must be"),
    "outputs": (no_outputs, "summary.outputs, by sample and finish_reason, must be"),
    "order": (swapped, "step.step must be 1 .* got 2"),
    "line lost": (drop(3), "step.step must be 2 .* got 3"),
    "header lost": (drop(0), "wanted a header, got 'step'"),
    "summary lost": (drop(-1), "the trace ends here, without its summary"),
    "after the summary": (goes_on, "wanted nothing after the summary"),
    "second header": (second_header, "wanted a step or the summary, got 'header'"),
    "early end": (early_end, "had finished before"),
    "version": (version, "wanted 'blockdraft trace' version 1, got 'blockdraft trace' version 2"),
    "array": (an_array, r"wanted a step or the summary, got \[1\]"),
}


@pytest.mark.parametrize(("tamper", "message"), TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_file_is_refused_at_its_line(tmp_path, records, tamper, message):
    line = tamper(records)
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(RequestError, match=f"^{re.escape(str(path))}:{line}: .*{message}"):
        trace.read(path)


def test_any_truncation_is_refused(tmp_path, records):
    path = write(tmp_path / "a.jsonl", records)
    data = path.read_bytes()
    for size in [0, 1, *range(7, len(data) - 1, 997), len(data) - 2]:
        path.write_bytes(data[:size])
        line = data[:size].count(b"\n") + 1
        with pytest.raises(RequestError, match=f"^{re.escape(str(path))}:{line}: "):
            trace.read(path)
    path.write_bytes(data[:-1])  # a last line break is not missed
    assert trace.read(path) == records


@pytest.mark.parametrize("line", [b"\xff", b"{", b"[" * 100_000, b"9" * 5000], ids=["bytes", "brace", "deep", "digits"])
def test_what_is_no_json_is_refused(tmp_path, records, line):
    path = write(tmp_path / "a.jsonl", records[:2])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(RequestError, match=f"^{re.escape(str(path))}:3: not JSON: "):
        trace.read(path)


# The command


def run(capsys, *arguments, status=0):
    assert cli.main(["trace", *map(str, arguments)]) == status
    return capsys.readouterr()


def generate(*arguments):
    return ["--prompt", PROMPT, "--max-tokens", "16", "--seed", "5", *arguments]


def test_command_writes_json_lines_to_standard_output(capsys, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(run(capsys, *generate("--temperature", "0.7")).out, encoding="utf-8")
    header, *steps, summary = trace.read(path)
    assert (header["model"]["name"], header["prompt"]) == ("bundled", PROMPT)
    assert {"max_tokens": 16, "temperature": 0.7, "seed": 5}.items() <= header["parameters"].items()
    assert {"blockdraft", "python", "torch", "cpu kernels"} <= header["versions"].keys()
    assert (summary["steps"], len(summary["outputs"][0]["token_ids"])) == (len(steps), 16)


def test_command_writes_files_and_plays_them(capsys, tmp_path):
    path, page, again = (tmp_path / name for name in ("a.jsonl", "a.html", "b.html"))
    live = run(capsys, *generate("--out", path, "--html", page)).out
    records = trace.read(path)
    text = records[-1]["outputs"][0]["text"]
    assert live == PROMPT + text + "\n"
    assert page.read_text(encoding="utf-8") == trace.page(records)
    assert run(capsys, "--play", path, "--html", again).out == live
    assert again.read_bytes() == page.read_bytes()
    for arguments in (["--play", path], generate("--html", page)):
        assert json.loads(run(capsys, *arguments, "--json").out)["outputs"][0]["text"] == text


def test_an_interrupted_generation_leaves_its_records(monkeypatch, tmp_path, capsys):
    stream, path, written = ZayaForCausalLM.stream, tmp_path / "a.jsonl", []

    def interrupted(model, prompts, params):
        for i, event in enumerate(stream(model, prompts, params)):
            if i == 3:
                written.append(path.read_text().count("\n"))
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(ZayaForCausalLM, "stream", interrupted)
    run(capsys, *generate("--out", path), status=130)
    assert written == [4], "each record at once, in case nothing can be done any more"
    assert [json.loads(line)["record"] for line in path.read_text().splitlines()] == ["header", "step", "step", "step"]
    assert "a.jsonl:5: the trace ends here" in run(capsys, "--play", path, status=2).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt or --play"),
        (["--prompt", "x", "--play", "y"], "--prompt or --play"),
        (["--play", "no-such-file", "--out", "x"], "--out must not be given with --play"),
        (["--play", "no-such-file"], "no-such-file: No such file"),
        (["--prompt", "x", "--out", "no/such/folder"], "no/such/folder: No such file"),
        (["--prompt", "x", "--html", "."], "Is a directory"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens must be"),
    ],
)
def test_bad_arguments_are_a_message_and_status_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    error = run(capsys, *arguments, status=2).err
    assert error.startswith("blockdraft: ")
    assert message in error
