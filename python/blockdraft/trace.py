"""`blockdraft trace`: a generation as records, to keep as JSON lines, to play back in a terminal, or to show on a page.

The records are one header, one per event of the stream, and one summary (docs/trace.md has their fields). Everything
that shows a trace, live or later, gets it from the records, so that a file plays back as it was seen.
"""

import argparse
import base64
import hashlib
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO, cast

import blockdraft
from blockdraft import info
from blockdraft.errors import RequestError
from blockdraft.live import make_view
from blockdraft.outputs import GenerationOutput, GenerationStats, StreamEvent
from blockdraft.sampler import SamplingParams
from blockdraft.text import UNFINISHED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from blockdraft.model.zaya import Prompt, ZayaForCausalLM

FORMAT, VERSION = "blockdraft trace", 1
KINDS = ("prefill", "draft", "verify", "ar", "denoise")
DERIVED = ("tokens_per_forward", "tokens_per_verify", "tokens_per_second")
FRAME_SECONDS = 0.08  # in a terminal: a forward of a small model is too short to see
_CONTEXT = 16  # tokens before a token that are decoded with it
_SHOWN_CHARACTERS = 60

Record = dict[str, Any]


# Making records


def trace(
    model: "ZayaForCausalLM", prompt: "Prompt", params: SamplingParams | None = None, name: str = ""
) -> Iterator[Record]:
    """Generates, and yields the records as forwards end.

    Args:
        prompt: Text or token ids; one.
        params: As for `ZayaForCausalLM.stream`. A seed that is None is drawn here and stands in the header.
        name: What the header calls the model.

    Raises:
        RequestError: As `ZayaForCausalLM.stream`.
    """
    params = (params or SamplingParams()).with_seed()
    recorder = Recorder(model.tokenizer, model.encode(prompt))
    events = model.stream([recorder.prompt], params)
    yield recorder.header(model, prompt, params, name)
    for event in events:
        yield recorder.step(event)
    yield recorder.summary()


class Recorder:
    """Makes the records of one prompt.

    Args:
        tokenizer: None leaves the text of tokens null.
        prompt: Its token ids.
    """

    def __init__(self, tokenizer: "Tokenizer | None", prompt: list[int]) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.steps = 0
        self.context: dict[tuple[int, int], list[int]] = {}  # by sample: the tokens before the next one
        self.outputs: list[GenerationOutput] = []

    def header(self, model: "ZayaForCausalLM", prompt: "Prompt", params: SamplingParams, name: str) -> Record:
        config = model.config
        text = self.tokenizer.decode(self.prompt) if self.tokenizer and not isinstance(prompt, str) else prompt
        return {
            "record": "header",
            "format": FORMAT,
            "version": VERSION,
            "model": {
                "name": name,
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": str(model.device),
                "layers": config.num_hidden_layers,
                "vocab_size": config.vocab_size,
                "block_length": config.block_length,
                "draft_layout": config.draft_layout,
                "mask_token_id": config.mask_token_id,
            },
            "parameters": {f.name: _plain(getattr(params, f.name)) for f in fields(params)},
            "prompt": text if isinstance(text, str) else None,
            "prompt_token_ids": self.prompt,
            "versions": {**info.versions(), "cpu kernels": blockdraft.cpu_isa()},
        }

    def step(self, event: StreamEvent) -> Record:
        """Texts are those that a token adds after the ones before it: a draft's after the drafts before it."""
        context = self.context.setdefault((event.request, event.sample), self.prompt[-_CONTEXT:])
        drafted = self._tokens(context, event.drafted)
        emitted = self._tokens(context, event.token_ids)
        context[:] = [*context, *event.token_ids][-_CONTEXT:]
        logprobs = _plain(event.logprobs) or [None] * len(emitted)
        guessed = _plain(event.draft_logprobs) or [None] * len(drafted)
        if event.output:
            self.outputs.append(event.output)
        self.steps += 1
        return {
            "record": "step",
            "step": self.steps - 1,
            "request": event.request,
            "sample": event.sample,
            "kind": event.kind,
            "drafter": event.drafter,
            "drafted": [{**token, "logprob": x} for token, x in zip(drafted, guessed, strict=True)],
            "accepted": event.accepted,
            "emitted": [{**token, "logprob": x} for token, x in zip(emitted, logprobs, strict=True)],
            "rejected": drafted[event.accepted :],
            "provisional": self._tokens(context, event.provisional),
            "text": event.text,
            "plan": {"rows": event.plan[0], "groups": list(event.plan[1])},
            "seconds": event.seconds,
            "finish_reason": event.finish_reason,
        }

    def summary(self) -> Record:
        return {"record": "summary", "steps": self.steps, "outputs": [_output_as_json(o) for o in self.outputs]}

    def _tokens(self, context: Sequence[int], tokens: Sequence[int]) -> list[Record]:
        """A character that several tokens spell is the text of the last of them."""
        if self.tokenizer is None:
            return [{"id": int(token), "text": None} for token in tokens]
        before = len(self.tokenizer.decode(list(context)).rstrip(UNFINISHED)) if tokens else 0
        out = []
        for i, token in enumerate(tokens):
            text = self.tokenizer.decode([*context, *tokens[: i + 1]]).rstrip(UNFINISHED)
            out.append({"id": int(token), "text": text[before:]})
            before = len(text)
        return out


def _plain(value: Any) -> Any:
    """Value as JSON has it: a function by its name, null for a number that is not finite."""
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else type(value).__name__
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _output_as_json(output: GenerationOutput) -> Record:
    derived = {name: getattr(output.stats, name) for name in DERIVED}
    out = asdict(output) | {"stats": asdict(output.stats) | derived}
    del out["prompt_token_ids"]  # in the header
    return _plain(out)


# Reading records: what the fields are is said by types, [of each element], {key: of its value}, and (of it or null,).

_NUMBER = int | float
_TOKEN = {"id": int, "text": str | None}
_HEADER = {"model": dict, "parameters": dict, "prompt": str | None, "prompt_token_ids": [int], "versions": dict}
_STEP = {
    "step": int,
    "request": int,
    "sample": int,
    "kind": str,
    "drafter": str,
    "drafted": [_TOKEN | {"logprob": _NUMBER | None}],
    "accepted": int,
    "emitted": [_TOKEN | {"logprob": _NUMBER | None}],
    "rejected": [_TOKEN],
    "provisional": [_TOKEN],
    "text": str,
    "plan": {"rows": int, "groups": [int]},
    "seconds": _NUMBER,
    "finish_reason": str | None,
}
_STATS = {
    name: {list: [int], dict: dict, str: str, int: int}.get(type(default), _NUMBER | None)
    for name, default in asdict(GenerationStats()).items()
} | dict.fromkeys(DERIVED, _NUMBER)
_OUTPUT = {
    "request": int,
    "sample": int,
    "token_ids": [int],
    "text": str | None,
    "finish_reason": str,
    "seed": int,
    "logprobs": ([_NUMBER | None],),
    "drawn_logprobs": ([_NUMBER | None],),
    "top_logprobs": ([[[_NUMBER | None]]],),
    "stats": _STATS,
}
_SUMMARY = {"steps": int, "outputs": [_OUTPUT]}


def read(path: str | Path) -> list[Record]:
    """The records of a file, checked: each for its fields, and all of them for agreeing with each other.

    Raises:
        RequestError: Naming file and line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    if lines[-1] == b"":
        del lines[-1]
    reader = _Reader()
    for number, line in enumerate(lines, 1):
        try:
            reader.add(_parse(line))
        except ValueError as error:
            raise RequestError(f"{path}:{number}: {error}") from None
    if not reader.done:
        raise RequestError(f"{path}:{len(lines) + 1}: the trace ends here, without its summary")
    return reader.records


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # or bytes that are no text
        raise ValueError(f"not JSON: {error}") from None


def _conform(value: Any, wanted: Any, name: str) -> None:
    """Raises ValueError that names the first place in value that is not as wanted."""
    if isinstance(wanted, tuple):
        if value is None:
            return
        (wanted,) = wanted
    kind = type(wanted) if isinstance(wanted, list | dict) else wanted
    if not isinstance(value, kind) or isinstance(value, bool):
        shown = repr(value)[:_SHOWN_CHARACTERS]
        raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}, got {shown}")
    if isinstance(wanted, dict):
        for key, inner in wanted.items():
            if key not in value:
                raise ValueError(f"{name} has no {key!r}")
            _conform(value[key], inner, f"{name}.{key}")
    elif isinstance(wanted, list):
        for i, element in enumerate(value):
            _conform(element, wanted[0], f"{name}[{i}]")


def _agree(found: Any, expected: Any, name: str) -> None:
    if found != expected:
        shown = [repr(value)[:_SHOWN_CHARACTERS] for value in (expected, found)]
        raise ValueError(f"{name} must be {shown[0]} by the rest of the trace, got {shown[1]}")


def _ids(tokens: Sequence[Record]) -> list[int]:
    return [token["id"] for token in tokens]


class _Reader:
    """Takes a trace's records in order and raises ValueError at the first that does not fit."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.steps: dict[tuple[int, int], list[Record]] = {}  # by sample
        self.done = False

    def add(self, record: Any) -> None:
        expected = "nothing after the summary" if self.done else "a step or the summary" if self.records else "a header"
        kind = record.get("record") if isinstance(record, dict) else None
        checks = {"step": self._step, "summary": self._summary} if self.records else {"header": self._header}
        if self.done or kind not in checks:
            raise ValueError(f"wanted {expected}, got {repr(kind or record)[:_SHOWN_CHARACTERS]}")
        checks[kind](record)
        self.records.append(record)

    def _header(self, record: Record) -> None:
        if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
            made = f"{record.get('format')!r} version {record.get('version')!r}"
            raise ValueError(f"wanted {FORMAT!r} version {VERSION}, got {made[:_SHOWN_CHARACTERS]}")
        _conform(record, _HEADER, "header")

    def _step(self, record: Record) -> None:
        _conform(record, _STEP, "step")
        _agree(record["step"], len(self.records) - 1, "step.step")
        if record["kind"] not in KINDS:
            raise ValueError(f"step.kind must be one of {', '.join(KINDS)}, got {record['kind'][:_SHOWN_CHARACTERS]!r}")
        drafted, accepted = _ids(record["drafted"]), record["accepted"]
        if not 0 <= accepted <= len(drafted):
            raise ValueError(f"step.accepted must be 0 to {len(drafted)}, the drafts, got {accepted}")
        _agree(_ids(record["rejected"]), drafted[accepted:], "step.rejected")
        emitted = _ids(record["emitted"])[:accepted]  # fewer where the text ended among them
        _agree(emitted, drafted[: len(emitted)], "step.emitted")
        steps = self.steps.setdefault((record["request"], record["sample"]), [])
        if steps and steps[-1]["finish_reason"]:
            raise ValueError(f"request {record['request']}, sample {record['sample']} had finished before")
        steps.append(record)

    def _summary(self, record: Record) -> None:
        _conform(record, _SUMMARY, "summary")
        _agree(record["steps"], len(self.records) - 1, "summary.steps")
        finished = {sample: steps[-1]["finish_reason"] for sample, steps in self.steps.items()}
        found = {(o["request"], o["sample"]): o["finish_reason"] for o in record["outputs"]}
        _agree(found, finished, "summary.outputs, by sample and finish_reason,")
        for i, output in enumerate(record["outputs"]):
            self._output(output, f"summary.outputs[{i}]")
        self.done = True

    def _output(self, output: Record, name: str) -> None:
        steps, stats = self.steps[output["request"], output["sample"]], output["stats"]
        emitted = [token for r in steps for token in r["emitted"]]
        _agree(output["token_ids"], _ids(emitted), f"{name}.token_ids")
        if output["logprobs"] is not None:
            _agree(output["logprobs"], [token["logprob"] for token in emitted], f"{name}.logprobs")
        _agree(output["text"] or "", "".join(r["text"] for r in steps), f"{name}.text")
        verified = [r["accepted"] for r in steps if r["kind"] == "verify"]
        histogram = [verified.count(n) for n in range(max(verified, default=-1) + 1)]
        _agree(stats["acceptance_histogram"], histogram, f"{name}.stats.acceptance_histogram")


# Events from records


class RecordedToken(int):
    """A token id that knows its text; equal to the plain id."""

    text: str


class RecordedTokenizer:
    """What a live view asks of a tokenizer, for recorded tokens: their text already stands after what came before."""

    def encode(self, text: str, add_special_tokens: bool = False) -> SimpleNamespace:
        return SimpleNamespace(ids=[])

    def decode(self, tokens: Sequence[RecordedToken]) -> str:
        return "".join(token.text for token in tokens)


def _recorded(tokens: Sequence[Record]) -> tuple[RecordedToken, ...]:
    out = tuple(RecordedToken(token["id"]) for token in tokens)
    for made, token in zip(out, tokens, strict=True):
        made.text = token["text"] or ""
    return out


def as_event(record: Record, output: GenerationOutput | None = None) -> StreamEvent:
    """The event that a step was made from; its tokens are `RecordedToken`s."""
    logprobs = [token["logprob"] for token in record["emitted"]]
    guessed = [token["logprob"] for token in record["drafted"]]
    return StreamEvent(
        request=record["request"],
        sample=record["sample"],
        kind=record["kind"],
        drafted=_recorded(record["drafted"]),
        accepted=record["accepted"],
        token_ids=_recorded(record["emitted"]),
        text=record["text"],
        provisional=_recorded(record["provisional"]),
        finish_reason=record["finish_reason"],
        output=output,
        plan=(record["plan"]["rows"], tuple(record["plan"]["groups"])),
        logprobs=() if None in logprobs else tuple(logprobs),
        draft_logprobs=() if None in guessed else tuple(guessed),
        drafter=record["drafter"],
        seconds=record["seconds"],
    )


def events(records: Sequence[Record]) -> Iterator[StreamEvent]:
    """The stream that a whole trace was made from, outputs included."""
    header, *steps, summary = records
    outputs = {(o["request"], o["sample"]): _as_output(o, header["prompt_token_ids"]) for o in summary["outputs"]}
    for record in steps:
        ended = record["finish_reason"] is not None
        yield as_event(record, outputs[record["request"], record["sample"]] if ended else None)


def _as_output(record: Record, prompt: list[int]) -> GenerationOutput:
    known = {f.name: record["stats"][f.name] for f in fields(GenerationStats)}
    top = record["top_logprobs"]
    values = record | {
        "stats": GenerationStats(**known),
        "top_logprobs": None if top is None else [[tuple(pair) for pair in row] for row in top],
    }
    return GenerationOutput(prompt_token_ids=prompt, **{name: values[name] for name in _OUTPUT})


# Showing records


def show(records: Iterator[Record], stream: TextIO, frame_seconds: float = FRAME_SECONDS) -> None:
    """Shows the first sample of a trace as its records come."""
    header = next(records)
    tokenizer = None if header["prompt"] is None else cast("Tokenizer", RecordedTokenizer())
    view = make_view(stream, tokenizer, frame_seconds)
    view.start(header["prompt"] or "")
    for record in records:
        if record["record"] == "step" and (record["request"], record["sample"]) == (0, 0):
            view.event(as_event(record))
    view.finish()


def page(records: Sequence[Record]) -> str:
    """A page of HTML that plays the trace and needs nothing but itself.

    What the model wrote cannot become markup: the data's brackets are escaped, the script puts text only into text
    nodes, and the page's policy lets no script run but that one.
    """
    template = Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    for tag in ("style", "script"):
        content = template.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        template = template.replace(f"{tag}-hash", f"sha256-{digest}")
    before, after = template.split("trace-data")
    data = json.dumps(records, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return before + data + after


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `blockdraft trace` beside those of `generate`."""
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="the trace; default: standard output")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="a page that plays the trace")
    parser.add_argument("--play", type=Path, metavar="FILE.jsonl", help="play a trace instead of generating")


def main(
    args: argparse.Namespace,
    load: "Callable[[argparse.Namespace], ZayaForCausalLM]",
    sampling_params: Callable[[argparse.Namespace], SamplingParams],
) -> int:
    """Runs the command: records go to the files, and the text or with --json the summary to standard output."""
    if (args.prompt is None) == (args.play is None):
        raise RequestError("--prompt or --play must be given, one of them")
    if args.play is not None and args.out is not None:
        raise RequestError("--out must not be given with --play, which makes no trace")
    records = iter(read(args.play)) if args.play else _generated(args, load, sampling_params)
    to_stdout = not (args.out or args.html or args.play)
    kept: list[Record] = []
    with ExitStack() as files:
        out, html = (files.enter_context(_open(path)) if path else None for path in (args.out, args.html))
        records = _written(records, kept, sys.stdout if to_stdout else out)
        if to_stdout or args.json:
            deque(records, maxlen=0)
        else:
            show(records, sys.stdout)
        if html:
            html.write(page(kept))
    if args.json and not to_stdout:
        print(json.dumps(kept[-1], ensure_ascii=False))
    return 0


def _generated(
    args: argparse.Namespace,
    load: "Callable[[argparse.Namespace], ZayaForCausalLM]",
    sampling_params: Callable[[argparse.Namespace], SamplingParams],
) -> Iterator[Record]:
    params = sampling_params(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    return trace(load(args), prompt, params, args.model or "bundled")


def _open(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None


def _written(records: Iterator[Record], kept: list[Record], stream: TextIO | None) -> Iterator[Record]:
    """Passes records on, and writes each at once: what was reached stays where a generation is interrupted."""
    for record in records:
        kept.append(record)
        if stream is not None:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
        yield record
