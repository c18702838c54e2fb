"""The bundled model on a GPU: blocks give the tokens of plain decoding, and float32 those of the CPU.

BLOCKDRAFT_TEST_FULL=1 takes 200 prompts of 96 tokens, otherwise a few.
"""

import argparse
import inspect
import json.decoder
import os
import textwrap
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from blockdraft import SamplingParams, ZayaForCausalLM, bundled_model
from blockdraft.runner import EagerRunner

DEVICE = "cuda"
FULL = bool(os.environ.get("BLOCKDRAFT_TEST_FULL"))
PROMPTS, TOKENS = (200, 96) if FULL else (24, 32)
# Batch sizes, and the share of the prompts that each gets: one at a time takes longest.
BATCHES = {1: 0.04, 3: 0.06, 16: 0.3, 64: 0.6}
WAYS = [{}, {"groups": 0}, {"groups": 1}, {"groups": 3}, {"drafter": "ngram"}, {"drafter": "ngram", "groups": 0}]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


def prompts(count: int) -> list[str]:
    """Beginnings of pieces of Python that every machine has, of different lengths."""
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, textwrap, json.decoder))
    starts = range(0, len(text) - 200, (len(text) - 200) // count)
    return [text[start : start + 20 + 140 * i // count] for i, start in enumerate(islice(starts, count))]


def load(dtype: torch.dtype, device: str = DEVICE) -> ZayaForCausalLM:
    return ZayaForCausalLM.from_pretrained(
        bundled_model(), dtype=dtype, device=device, max_batch_size=64, progress=False
    )


def laws(count: int, **changes: object) -> list[SamplingParams]:
    """Greedy and sampled by turns."""
    return [
        SamplingParams(max_tokens=TOKENS, temperature=0.8 * (i % 2), seed=i, ignore_eos=True, **changes)
        for i in range(count)
    ]


def tokens(model: ZayaForCausalLM, texts: list[str], params: list[SamplingParams]) -> list[list[int]]:
    return [output.token_ids for output in model.generate(texts, params)]


def shares(count: int) -> Iterator[tuple[int, slice]]:
    first = 0
    for batch, share in BATCHES.items():
        end = count if batch == max(BATCHES) else first + max(1, round(share * count))
        yield batch, slice(first, end)
        first = end


def test_lossless_equals_plain_decoding_in_bfloat16():
    model, texts = load(torch.bfloat16), prompts(PROMPTS)
    plain = tokens(model, texts, laws(PROMPTS, sampler="ar"))
    ways = [laws(PROMPTS, **way) for way in WAYS]
    blocks = [ways[i % len(WAYS)][i] for i in range(PROMPTS)]
    for batch, part in shares(PROMPTS):
        model.max_batch_size = batch
        for i, found in enumerate(tokens(model, texts[part], blocks[part]), part.start):
            assert found == plain[i], f"prompt {i}, batch {batch}, {WAYS[i % len(WAYS)]}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_graphs_equal_steps_as_they_come(dtype):
    model, texts = load(getattr(torch, dtype)), prompts(16)
    asked = texts, laws(16, groups=1)
    graphs, model.runner = model.runner, EagerRunner(model)
    expected = tokens(model, *asked)
    model.runner = graphs
    for _ in range(3):  # shapes come again
        assert tokens(model, *asked) == expected
    assert sum(graph.captured is not None for graph in graphs.graphs.values()) > 3


def test_greedy_float32_tokens_are_those_of_the_cpu():
    texts, params = prompts(20), SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    cpu = load(torch.float32, "cpu")
    expected, found = tokens(cpu, texts, [params] * 20), tokens(load(torch.float32), texts, [params] * 20)
    differences = [said for case in zip(texts, expected, found, strict=True) if (said := first_difference(cpu, *case))]
    assert not differences, "\n".join(differences)


def first_difference(cpu: ZayaForCausalLM, text: str, expected: list[int], found: list[int]) -> str:
    """Where it is and how near the two best logits are there; empty where there is none."""
    places = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    if not places:
        return ""
    logits = cpu.logits(torch.tensor([cpu.encode(text) + expected[: places[0]]]))[0, -1]
    best = logits.topk(2).values.tolist()
    return f"{text[:20]!r}, token {places[0]}: {best[0] - best[1]:.2e} between the best logits, {best[0]:.2f} the best"
