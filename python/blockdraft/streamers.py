"""Streams for the streamers of transformers, without importing it.

A streamer is any object with `put(value)` and `end()`, such as `TextStreamer` or `TextIteratorStreamer`; one that also
has `put_draft(value)`, as `TextDiffusionStreamer` has, sees the drafts while they wait:

    from transformers import AutoTokenizer, TextDiffusionStreamer
    from blockdraft import ZayaForCausalLM, bundled_model
    from blockdraft.streamers import stream_to

    model = ZayaForCausalLM.from_pretrained(bundled_model())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, sleep_time=0.1)
    prompt = model.encode("def parse(text):")
    output = stream_to(streamer, model.stream(prompt), prompt)

The rules of the interface are those of transformers' `generate`: the prompt is put first, drafts replace each other,
and the next `put` removes them.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from blockdraft.errors import RequestError
from blockdraft.outputs import GenerationOutput, StreamEvent


class Streamer(Protocol):
    """What is asked of a streamer; `put_draft(value)` is optional."""

    def put(self, value: Any) -> None: ...
    def end(self) -> None: ...


def stream_to(
    streamer: Streamer, events: Iterable[StreamEvent], prompt_token_ids: Sequence[int] = ()
) -> GenerationOutput | None:
    """Puts the tokens of one sample as they become final, and its drafts while they wait.

    Streamers decode the tokens themselves: a stop string that ended the output is shown, unlike in `output.text`.

    Args:
        streamer: Gets the prompt, int64 ``[1, T]``, then final tokens, int64 ``[n]``, by `put`; drafts, int64 ``[n]``
            (in denoising the block so far, masks included), by `put_draft` where it has that. `end` is called once,
            also where events fail: a reader of its queue would wait forever.
        events: Of `ZayaForCausalLM.stream`, for one prompt and one sample.
        prompt_token_ids: For streamers that show the prompt; empty puts a prompt without tokens, since a streamer with
            skip_prompt takes the first thing put for the prompt.

    Returns:
        The sample's output; None where the events end before it.

    Raises:
        RequestError: No streamer, one that wants logits with the drafts, or events of a second sample.
    """
    _check(streamer)
    put_draft = getattr(streamer, "put_draft", None)
    first, output = None, None
    try:
        streamer.put(torch.tensor([list(prompt_token_ids)], dtype=torch.int64))
        for event in events:
            first = first or (event.request, event.sample)
            _check_sample(event, first)
            if event.token_ids:
                streamer.put(torch.tensor(event.token_ids))
            if event.provisional and put_draft is not None:
                put_draft(torch.tensor(event.provisional))
            output = event.output  # of the last
    finally:
        streamer.end()
    return output


def _check(streamer: Streamer) -> None:
    for name in ("put", "end"):
        if not callable(getattr(streamer, name, None)):
            raise RequestError(f"streamer must have put(value) and end(), got {type(streamer).__name__} without {name}")
    if getattr(streamer, "_takes_logits", False):
        raise RequestError(
            f"streamer must take drafts as tokens, got {type(streamer).__name__} with _takes_logits: logits of drafts "
            "are never written"
        )


def _check_sample(event: StreamEvent, first: tuple[int, int]) -> None:
    if (event.request, event.sample) != first:
        raise RequestError(
            "events must be of one sample, as a streamer shows one; got "
            f"request {event.request}, sample {event.sample} after request {first[0]}, sample {first[1]}"
        )
