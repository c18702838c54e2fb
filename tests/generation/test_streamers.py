"""transformers' own streamers on this package's events."""

import threading
from itertools import islice

import pytest
import torch

from blockdraft import RequestError, SamplingParams, StreamEvent, ZayaForCausalLM, bundled_model
from blockdraft.streamers import stream_to

transformers = pytest.importorskip("transformers")

PROMPT = "def read_lines(path):\n"
PARAMS = {
    "blocks": SamplingParams(max_tokens=40, groups=1),
    "sampled": SamplingParams(max_tokens=40, groups=0, temperature=0.8, seed=3),
    "plain": SamplingParams(max_tokens=20, sampler="ar"),
    "denoise": SamplingParams(max_tokens=24, sampler="denoise", denoising_steps=4),
}


@pytest.fixture(scope="module")
def model():
    return ZayaForCausalLM.from_pretrained(bundled_model(), progress=False)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(bundled_model() / "tokenizer.json"))


class Recording(transformers.TextDiffusionStreamer):
    """transformers' streamer, and what it was given: ("put" or "draft", tokens)."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.calls, self.ends = [], 0

    def put(self, value):
        assert value.dtype == torch.int64
        self.calls.append(("put", tuple(value.flatten().tolist())))
        super().put(value)

    def put_draft(self, value, **keywords):
        assert value.dtype == torch.int64
        assert not keywords
        self.calls.append(("draft", tuple(value.tolist())))
        super().put_draft(value)

    def end(self):
        self.ends += 1
        super().end()


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_text_streamer_prints_the_text_of_the_output(capsys, model, tokenizer, params):
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = stream_to(streamer, model.stream(PROMPT, params))
    assert capsys.readouterr().out == output.text + "\n"
    assert output.text


def test_prompt_is_put_first(capsys, model, tokenizer):
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    output = stream_to(streamer, model.stream(PROMPT, PARAMS["blocks"]), model.encode(PROMPT))
    assert capsys.readouterr().out == PROMPT + output.text + "\n"


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_final_tokens_are_put_and_waiting_ones_are_drafts(capsys, model, tokenizer, params):
    prompt, streamer = model.encode(PROMPT), Recording(tokenizer)
    events = list(model.stream(prompt, params))
    output = stream_to(streamer, events, prompt)
    expected = [("put", tuple(prompt))]
    for event in events:
        expected += [("put", event.token_ids)] * bool(event.token_ids)
        expected += [("draft", event.provisional)] * bool(event.provisional)
    assert streamer.calls == expected
    assert [t for call, tokens in streamer.calls[1:] if call == "put" for t in tokens] == output.token_ids
    assert ("draft" in dict(streamer.calls)) == (params.sampler != "ar")
    assert output is events[-1].output
    assert streamer.ends == 1


def test_diffusion_streamer_leaves_the_final_text_on_the_screen(capsys, model, tokenizer):
    streamer = transformers.TextDiffusionStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = stream_to(streamer, model.stream(PROMPT, PARAMS["blocks"]))
    printed = capsys.readouterr().out
    assert "\x1b[33m" in printed, "drafts are shown"
    shown, *rest = printed.split("\x1b7")  # the cursor is saved, the draft drawn, the cursor restored
    for part in rest:
        shown += part.split("\x1b8\x1b[J")[1]
    assert shown == output.text + "\n"


def test_iterator_streamer_in_a_thread(model, tokenizer):
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    outputs = []
    events = model.stream(PROMPT, PARAMS["plain"])
    thread = threading.Thread(target=lambda: outputs.append(stream_to(streamer, events)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == outputs[0].text


def test_streamer_is_ended_where_the_stream_fails(model, tokenizer):
    streamer = Recording(tokenizer)

    def failing():
        yield from islice(model.stream(PROMPT, PARAMS["blocks"]), 2)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        stream_to(streamer, failing())
    assert streamer.ends == 1


def test_events_without_an_output_give_none(model, tokenizer):
    assert stream_to(Recording(tokenizer), islice(model.stream(PROMPT, PARAMS["blocks"]), 2)) is None


def test_second_sample_is_refused(model, tokenizer):
    streamer = Recording(tokenizer)
    with pytest.raises(RequestError, match="one sample.*request 1, sample 0 after request 0, sample 0"):
        stream_to(streamer, model.stream([PROMPT, PROMPT], PARAMS["blocks"]))
    assert streamer.ends == 1


def test_what_is_no_streamer_is_refused(tokenizer):
    with pytest.raises(RequestError, match="put.value. and end.., got object without put"):
        stream_to(object(), [])
    streamer = Recording(tokenizer)
    streamer._takes_logits = True
    with pytest.raises(RequestError, match="_takes_logits"):
        stream_to(streamer, [StreamEvent(0, 0, "draft", (), 0, (), "", (5,))])
    assert not streamer.calls
