import errno
import json
import os
import re
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from blockdraft.errors import CheckpointError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.tensor_names import legacy_names
from blockdraft.model.weights import Checkpoint, expected_shapes, resolve_folder

ROPE: dict[str, Any] = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"}
CONFIG = ZayaConfig(
    vocab_size=12,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    num_experts=3,
    moe_intermediate_size=5,
    router_hidden_size=6,
    layer_types=("hybrid",) * 3,
    rope_parameters={"hybrid": ROPE},
)
RELEASED_8B = replace(
    CONFIG,
    vocab_size=262272,
    hidden_size=2048,
    num_hidden_layers=40,
    num_attention_heads=8,
    head_dim=128,
    num_experts=16,
    moe_intermediate_size=2048,
    router_hidden_size=256,
    layer_types=("hybrid",) * 40,
)
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
Header = dict[str, Any]


def make_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    weights = {name: torch.randn(shape).to(dtype) for name, shape in expected_shapes(CONFIG).items()}
    return {name: w.float() if name.endswith("balancing_biases") else w for name, w in weights.items()}


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def lay_out(weights: dict[str, Tensor]) -> tuple[Header, bytes]:
    header, data = {}, b""
    for name, w in weights.items():
        raw = bytes_of(w)
        span = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[w.dtype], "shape": list(w.shape), "data_offsets": span}
        data += raw
    return header, data


def pack(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(path: Path, weights: dict[str, Tensor]) -> None:
    path.write_bytes(pack(*lay_out(weights)))


def write_shards(folder: Path, weights: dict[str, Tensor], count: int = 3) -> dict[str, str]:
    names, weight_map = list(weights), {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        write(folder / file, {name: weights[name] for name in names[i::count]})
        weight_map |= dict.fromkeys(names[i::count], file)
    write_index(folder, {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return weight_map


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_reads(folder: Path, weights: dict[str, Tensor], config: ZayaConfig = CONFIG) -> None:
    with Checkpoint(folder, config) as checkpoint:
        assert checkpoint.names() == list(expected_shapes(config))
        assert set(checkpoint.names()) == set(weights)
        for name, w in weights.items():
            got = checkpoint.read(name)
            assert (got.dtype, got.shape) == (w.dtype, w.shape), name
            assert bytes_of(got) == bytes_of(w), name


def read_all(folder: Path, config: ZayaConfig) -> None:
    with Checkpoint(folder, config) as checkpoint:
        for name in checkpoint.names():
            checkpoint.read(name)


def refused(folder: Path, message: str, config: ZayaConfig = CONFIG) -> None:
    """The error has the message, and the form ``file: subject: reason``, not long and in ASCII."""
    with pytest.raises(CheckpointError, match=message) as error:
        read_all(folder, config)
    text = str(error.value)
    assert re.match(re.escape(str(folder)) + r"[^:]*: [^ ].*?: ", text), text
    assert len(text) < len(str(folder)) + 400
    assert text.isascii()


# The converse of what the package does: from native to older names, as in the Zyphra converter. Order matters.
LEGACY_LEAVES = [
    ("qkv_proj.conv_qk_depthwise", "qkv.conv_qk.0"),
    ("qkv_proj.conv_qk_grouped", "qkv.conv_qk.1"),
    ("qkv_proj.q_proj", "qkv.linear_q"),
    ("qkv_proj.k_proj", "qkv.linear_k"),
    ("qkv_proj.v_proj_current", "qkv.val_proj1"),
    ("qkv_proj.v_proj_delayed", "qkv.val_proj2"),
    ("qk_norm.temp", "qkv.temp"),
    ("mlp.gate.router_mlp.norm", "zaya_block.router.rmsnorm_eda"),
    ("mlp.gate.router_mlp.fc1", "zaya_block.router.router_mlp.0"),
    ("mlp.gate.router_mlp.fc2", "zaya_block.router.router_mlp.2"),
    ("mlp.gate.router_mlp.out_proj", "zaya_block.router.router_mlp.4"),
    ("mlp.gate.", "zaya_block.router."),
    ("post_attention_residual_scale.", "res_scale."),
    ("post_attention_layernorm.", "input_norm."),
    ("input_layernorm.", "input_norm."),
]


def to_legacy(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    out = {}
    for name, w in weights.items():
        match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if not match:
            name = name.replace("model.norm.", "model.final_norm.")
            out[name.replace("model.input_hidden_states_", "model.layers.0.res_scale.hidden_states_")] = w
            continue
        layer, leaf = int(match[1]), match[2]
        if leaf.startswith("mlp.experts."):
            fc = "linear_fc1" if "gate_up" in leaf else "linear_fc2"
            for e, expert in enumerate(w):
                out[f"model.layers.{2 * layer + 1}.zaya_block.experts.local_experts.{e}.{fc}.weight"] = expert
        elif leaf.startswith("post_mlp_residual_scale."):
            owner = "model.res_scale." if layer + 1 == layers else f"model.layers.{2 * layer + 2}.res_scale."
            out[owner + leaf.split(".", 1)[1]] = w
        else:
            half = 2 * layer + leaf.startswith(("mlp.", "post_attention_"))
            for native, legacy in LEGACY_LEAVES:
                leaf = leaf.replace(native, legacy)
            out[f"model.layers.{half}.{leaf}"] = w
    return out


# --- what loads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["F32", "BF16", "F16"])
@pytest.mark.parametrize("legacy", [False, True], ids=["native", "legacy"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_reads_every_bit(tmp_path, sharded, legacy, dtype):
    weights = make_weights(dtype)
    stored = to_legacy(weights, CONFIG.num_hidden_layers) if legacy else weights
    if sharded:
        write_shards(tmp_path, stored)
    else:
        write(tmp_path / "model.safetensors", stored)
    assert_reads(tmp_path, weights)


def test_older_layout_stores_a_residual_scale_one_layer_later(tmp_path):
    weights = to_legacy(make_weights(), 3)
    for name, value in [
        ("model.layers.0.res_scale.hidden_states_bias", 1.0),
        ("model.layers.2.res_scale.hidden_states_bias", 2.0),
        ("model.layers.3.res_scale.hidden_states_bias", 3.0),
        ("model.res_scale.hidden_states_bias", 4.0),
    ]:
        weights[name].fill_(value)
    write(tmp_path / "model.safetensors", weights)
    with Checkpoint(tmp_path, CONFIG) as checkpoint:
        assert checkpoint.read("model.input_hidden_states_bias")[0] == 1
        assert checkpoint.read("model.layers.0.post_mlp_residual_scale.hidden_states_bias")[0] == 2
        assert checkpoint.read("model.layers.1.post_attention_residual_scale.hidden_states_bias")[0] == 3
        assert checkpoint.read("model.layers.2.post_mlp_residual_scale.hidden_states_bias")[0] == 4


def test_counts_of_the_released_8b():
    shapes = expected_shapes(RELEASED_8B)
    assert len(shapes) == 1283
    elements = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    biases = sum(n for name, n in elements.items() if name.endswith("balancing_biases"))
    assert (sum(elements.values()) - biases, biases) == (8_840_488_784, 680)
    assert len({old for name in shapes for old in legacy_names(name, RELEASED_8B)}) == 2483


def test_balancing_biases_are_float32_whatever_is_stored(tmp_path):
    weights = {name: w.bfloat16() for name, w in make_weights().items()}
    write(tmp_path / "model.safetensors", weights)
    with Checkpoint(tmp_path, CONFIG) as checkpoint:
        got = checkpoint.read("model.layers.1.mlp.gate.balancing_biases")
    assert got.dtype == torch.float32
    assert torch.equal(got, weights["model.layers.1.mlp.gate.balancing_biases"].float())


def test_tensors_own_aligned_memory(tmp_path):
    weights = make_weights()
    write(tmp_path / "model.safetensors", weights)
    with Checkpoint(tmp_path, CONFIG) as checkpoint:
        assert checkpoint.nbytes == sum(w.nbytes for w in weights.values())
        first, second = (checkpoint.read("model.norm.weight") for _ in range(2))
    first.fill_(7)  # writable, of its own, and valid after closing
    assert torch.equal(second, weights["model.norm.weight"])
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0


def test_ignores_the_tied_head_metadata_and_padding(tmp_path):
    weights = make_weights()
    header, data = lay_out(weights | {"lm_head.weight": torch.full((12, 8), torch.nan)})
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode() + b"   "
    (tmp_path / "model.safetensors").write_bytes(pack(text, data))
    assert_reads(tmp_path, weights)


def test_order_and_alignment_in_the_file_do_not_matter(tmp_path):
    weights = make_weights()
    shuffled = dict(sorted(weights.items(), key=lambda item: hash(item[0][::-1])))
    header, data = lay_out(shuffled)
    text = json.dumps(dict(sorted(header.items()))).encode()
    (tmp_path / "model.safetensors").write_bytes(pack(text + b" " * (len(text) % 2 == 0), data))  # odd data offsets
    assert_reads(tmp_path, weights)


def test_files_beside_the_weights_are_ignored(tmp_path):
    weights = make_weights()
    write(tmp_path / "model.safetensors", weights)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (tmp_path / "modeling_zaya.py").write_text("raise SystemExit")
    assert_reads(tmp_path, weights)


def test_links_inside_the_folder_and_the_hub_cache_are_followed(tmp_path):
    weights = make_weights()
    write(tmp_path / "weights.safetensors", weights)
    (tmp_path / "model.safetensors").symlink_to("weights.safetensors")
    assert_reads(tmp_path, weights)

    snapshot, blobs = tmp_path / "hub/snapshots/67d34da5", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(blobs / "c0ffee", weights)
    (snapshot / "model.safetensors").symlink_to("../../blobs/c0ffee")
    assert_reads(snapshot, weights)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    """The system reads at most 2 GiB at a time, and less where it likes."""
    preadv = os.preadv
    weights = make_weights()
    write(tmp_path / "model.safetensors", weights)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:97]], offset))
    assert_reads(tmp_path, weights)


def test_a_failed_read_is_a_checkpoint_error(tmp_path, monkeypatch):
    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    write(tmp_path / "model.safetensors", make_weights())
    with Checkpoint(tmp_path, CONFIG) as checkpoint:
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(CheckpointError, match=r"safetensors: model\.norm\.weight: Input/output error"):
            checkpoint.read("model.norm.weight")


def test_closed_and_unknown(tmp_path):
    write(tmp_path / "model.safetensors", make_weights())
    checkpoint = Checkpoint(tmp_path, CONFIG)
    with checkpoint, pytest.raises(CheckpointError, match=r"lm_head\.weight: not a tensor of this model"):
        checkpoint.read("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: the checkpoint is closed"):
        checkpoint.read("model.norm.weight")
    checkpoint.close()  # once more is no error


def test_a_refused_checkpoint_leaves_no_file_open(tmp_path):
    write_shards(tmp_path, make_weights())
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    before = len(os.listdir("/proc/self/fd"))
    refused(tmp_path, "No such file")
    assert len(os.listdir("/proc/self/fd")) == before


# --- one malformed safetensors file


def entry(header: Header, **changes: Any) -> Header:
    """Changes the entry of the last tensor, model.norm.weight ([8], 16 bytes)."""
    return header | {"model.norm.weight": header["model.norm.weight"] | changes}


def renamed(header: Header, name: str) -> Header:
    return {name if old == "model.norm.weight" else old: value for old, value in header.items()}


def without(header: Header, *keys: str) -> Header:
    return {key: value for key, value in header.items() if key not in keys}


def length(value: int) -> Callable[[Header, bytes], bytes]:
    return lambda header, data: (value % 2**64).to_bytes(8, "little") + pack(header, data)[8:]


def text(change: Callable[[bytes], bytes]) -> Callable[[Header, bytes], bytes]:
    return lambda header, data: pack(change(json.dumps(header).encode()), data)


def shape(value: Any) -> Callable[[Header, bytes], bytes]:
    return lambda header, data: pack(entry(header, shape=value), data)


def offsets(begin: Any, end: Any, *more: Any) -> Callable[[Header, bytes], bytes]:
    """Counted from where the last tensor should lie."""

    def mutate(header: Header, data: bytes) -> bytes:
        start = len(data) - 16
        values = [value + start if type(value) is int else value for value in (begin, end)]
        return pack(entry(header, data_offsets=[*values, *more]), data)

    return mutate


def swap_offsets(header: Header, data: bytes) -> bytes:
    first, second = "model.input_hidden_states_scale", "model.norm.weight"
    spans = header[first]["data_offsets"], header[second]["data_offsets"]
    header[first]["data_offsets"] = header[second]["data_offsets"] = spans[0]
    return pack(header, data)


WANTED_EXTENTS = "model.norm.weight: shape .* wanted at most 4 positive extents"
HOSTILE: dict[str, tuple[Callable[[Header, bytes], bytes], str]] = {
    "file of 0 bytes": (lambda h, d: b"", "the file has 0 bytes, its length field"),
    "file of 7 bytes": (lambda h, d: b"\2\0\0\0\0\0\0", "the file has 7 bytes"),
    "file of 8 bytes": (lambda h, d: b"\2\0\0\0\0\0\0\0", "length 2 in a file of 8 bytes"),
    "length 0": (length(0), "header: not valid JSON"),
    "length 1": (length(1), "header: not valid JSON"),
    "length to the end": (lambda h, d: length(len(pack(h, d)) - 8)(h, d), "header: not valid JSON"),
    "length to the end + 1": (lambda h, d: length(len(pack(h, d)) - 7)(h, d), "the file is truncated"),
    "length one short": (lambda h, d: length(len(json.dumps(h)) - 1)(h, d), "not valid JSON"),
    "length one long": (lambda h, d: length(len(json.dumps(h)) + 1)(h, d), "not valid JSON"),
    "length 2^31": (length(2**31), "length 2147483648, at most 16777216 are read"),
    "length 2^32": (length(2**32), "at most 16777216"),
    "length 2^63": (length(2**63), "at most 16777216"),
    "length 2^64 - 8": (length(-8), "at most 16777216"),
    "length 2^64 - 1": (length(-1), "at most 16777216"),
    "length big endian": (lambda h, d: length(int.from_bytes(pack(h, d)[:8], "big"))(h, d), "at most 16777216"),
    "BOM": (text(lambda t: b"\xef\xbb\xbf" + t), "not valid JSON"),
    "NUL after": (text(lambda t: t + b"\0"), "not valid JSON"),
    "NUL before": (text(lambda t: b"\0" + t), "not valid JSON"),
    "not UTF-8": (text(lambda t: t.replace(b"norm", b"n\xffrm")), "not valid JSON"),
    "UTF-16": (text(lambda t: t.decode().encode("utf-16")), "not valid JSON"),
    "array": (text(lambda t: b"[" + t + b"]"), "header: wanted an object"),
    "array of entries": (text(lambda t: b"[]"), "header: wanted an object"),
    "null": (text(lambda t: b"null"), "header: wanted an object"),
    "second document": (text(lambda t: t + b"{}"), "not valid JSON"),
    "100,000 deep": (text(lambda t: b"[" * 100_000), "nested deeper than 16"),
    "100,000 objects deep": (text(lambda t: b'{"a":' * 100_000), "nested deeper than 16"),
    "17 deep": (text(lambda t: b"[" * 17 + b"]" * 17), "nested deeper than 16"),
    "unterminated string": (text(lambda t: b'{"' + b'\\"' * 100_000), "not valid JSON"),
    "unterminated": (text(lambda t: t[:-1]), "not valid JSON"),
    "trailing comma": (text(lambda t: t[:-1] + b",}"), "not valid JSON"),
    "single quotes": (text(lambda t: t.replace(b'"', b"'")), "not valid JSON"),
    "no tensors": (lambda h, d: pack({}, b""), "header: 0 tensors"),
    "100,000 tensors": (
        text(lambda t: json.dumps(dict.fromkeys(map(str, range(100_000)), 0)).encode()),
        "header: 100000 tensors, wanted 1 to 65536",
    ),
    "tensor twice": (
        text(lambda t: t[:-1] + b', "model.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}'),
        "the name 'model.norm.weight' occurs 2 times",
    ),
    "field twice": (text(lambda t: t.replace(b'{"dtype": "BF16"', b'{"dtype": "F32", "dtype": "BF16"')), "occurs 2"),
    "entry null": (lambda h, d: pack(h | {"model.norm.weight": None}, d), "model.norm.weight: wanted dtype, shape"),
    "entry list": (lambda h, d: pack(h | {"model.norm.weight": ["BF16", [8], [0, 16]]}, d), "wanted dtype, shape"),
    "entry string": (lambda h, d: pack(h | {"model.norm.weight": "BF16"}, d), "wanted dtype, shape"),
    "field extra": (lambda h, d: pack(entry(h, strides=[1]), d), "model.norm.weight: wanted dtype, shape"),
    **{
        f"{key} missing": (
            lambda h, d, key=key: pack(h | {"model.norm.weight": without(h["model.norm.weight"], key)}, d),
            "model.norm.weight: wanted dtype, shape and data_offsets",
        )
        for key in ("dtype", "shape", "data_offsets")
    },
    "metadata list": (lambda h, d: pack(h | {"__metadata__": []}, d), "__metadata__: wanted an object of strings"),
    "metadata of numbers": (lambda h, d: pack(h | {"__metadata__": {"a": 1}}, d), "__metadata__: wanted"),
    "metadata nested": (lambda h, d: pack(h | {"__metadata__": {"a": {}}}, d), "__metadata__: wanted"),
    "name empty": (lambda h, d: pack(renamed(h, ""), d), "'': a name has 1 to 200 letters"),
    "name with NUL": (lambda h, d: pack(renamed(h, "model.norm\0"), d), "a name has"),
    "name with path": (lambda h, d: pack(renamed(h, "../../etc/passwd"), d), "'../../etc/passwd': a name has"),
    "name of 64 KiB": (lambda h, d: pack(renamed(h, "a" * 65536), d), r"aaa\.\.\.: a name has"),
    "name with newline": (lambda h, d: pack(renamed(h, "model.norm.weight\n"), d), "a name has"),
    "name not ASCII": (lambda h, d: pack(renamed(h, "model.nörm.weight"), d), "a name has"),
    "name lone surrogate": (lambda h, d: pack(renamed(h, "\ud800"), d), "a name has"),
    **{
        f"dtype {dtype}": (lambda h, d, dtype=dtype: pack(entry(h, dtype=dtype), d), "dtype .* wanted one of F32, BF16")
        for dtype in ("F31", "bf16", "", "F64", "I64", "BOOL", "F8_E5M2", "U16", 16, None, ["BF16"], {}, True)
    },
    "dtype of other size": (lambda h, d: pack(entry(h, dtype="F32"), d), "wanted a span of 32 bytes"),
    "shape negative": (shape([-8]), WANTED_EXTENTS),
    "shape two negative": (shape([-2, -4]), WANTED_EXTENTS),
    "shape zero": (shape([0]), WANTED_EXTENTS),
    "shape 0 x 2^63 - 1": (shape([0, 2**63 - 1]), WANTED_EXTENTS),
    "shape float": (shape([8.0]), WANTED_EXTENTS),
    "shape bool": (shape([True, 8]), WANTED_EXTENTS),
    "shape string": (shape("8"), WANTED_EXTENTS),
    "shape null": (shape(None), WANTED_EXTENTS),
    "shape object": (shape({"0": 8}), WANTED_EXTENTS),
    "shape nested": (shape([[8]]), WANTED_EXTENTS),
    "shape 2^64": (shape([2**64]), WANTED_EXTENTS),
    "shape 2^64 + 8": (shape([2**64 + 8]), WANTED_EXTENTS),
    "shape product wraps to 8": (shape([2**62 + 1, 8]), WANTED_EXTENTS),
    "shape product wraps to 0": (shape([2**32, 2**32]), "has more than"),
    "shape product 2^160": (shape([2**40] * 4), "has more than"),
    "shape rank 5": (shape([8, 1, 1, 1, 1]), WANTED_EXTENTS),
    "shape rank 1000": (shape([1] * 1000), WANTED_EXTENTS),
    "shape rank 0": (shape([]), "model.norm.weight: data_offsets .* wanted a span of 2 bytes"),
    "shape off by one": (shape([9]), "wanted a span of 18 bytes"),
    "shape of the same size": (shape([2, 4]), r"model.norm.weight: shape \[2, 4\], wanted \[8\]"),
    "shape with a 1": (shape([8, 1]), r"shape \[8, 1\], wanted \[8\]"),
    "transposed": (
        lambda h, d: pack(h | {"model.embed_tokens.weight": h["model.embed_tokens.weight"] | {"shape": [8, 12]}}, d),
        r"embed_tokens.weight: shape \[8, 12\], wanted \[12, 8\]",
    ),
    "offsets overlap": (offsets(-2, 14), "wanted .* an overlap"),
    "offsets shared": (swap_offsets, "an overlap"),
    "offsets hole": (offsets(2, 18), "a hole"),
    "offsets past the end": (offsets(2**40, 2**40 + 16), "a hole"),
    "offsets 2^63": (offsets(2**63, 2**63 + 16), "a hole"),
    "offsets reversed": (offsets(16, 0), "data_offsets .* wanted a span of 16 bytes"),
    "offsets equal": (offsets(0, 0), "wanted a span of 16 bytes"),
    "offsets negative": (
        lambda h, d: pack(entry(h, data_offsets=[-16, 0]), d),
        "an overlap|a hole",
    ),
    "offsets into the header": (
        lambda h, d: pack(entry(h, data_offsets=[-len(json.dumps(h)), 16 - len(json.dumps(h))]), d),
        "an overlap|a hole",
    ),
    "offsets float": (offsets(0.0, 16.0), "data_offsets"),
    "offsets strings": (offsets("0", "16"), "data_offsets"),
    "offsets null": (offsets(None, None), "data_offsets"),
    "offsets three": (offsets(0, 16, 32), "data_offsets"),
    "offsets one": (lambda h, d: pack(entry(h, data_offsets=[16]), d), "data_offsets"),
    "offsets no list": (lambda h, d: pack(entry(h, data_offsets=16), d), "data_offsets"),
    "offsets bool": (lambda h, d: pack(entry(h, data_offsets=[False, True]), d), "data_offsets"),
    "not from 0": (
        lambda h, d: pack(
            {k: v | {"data_offsets": [n + 8 for n in v["data_offsets"]]} for k, v in h.items()}, b"\0" * 8 + d
        ),
        "embed_tokens.weight: data at byte .* a hole",
    ),
    "data one byte short": (lambda h, d: pack(h, d[:-1]), "data: .* the file is truncated"),
    "data half": (lambda h, d: pack(h, d[: len(d) // 2]), "the file is truncated"),
    "data absent": (lambda h, d: pack(h, b""), "the file is truncated"),
    "data one byte long": (lambda h, d: pack(h, d + b"\0"), "bytes belong to no tensor"),
    "data NaN": (lambda h, d: pack(h, d[:-2] + b"\xc0\x7f"), "model.norm.weight: holds NaN or infinity"),
    "data infinity": (lambda h, d: pack(h, d[:-2] + b"\x80\xff"), "model.norm.weight: holds NaN or infinity"),
}


@pytest.mark.parametrize(("mutate", "message"), HOSTILE.values(), ids=HOSTILE)
def test_refuses_file(tmp_path, mutate, message):
    (tmp_path / "model.safetensors").write_bytes(mutate(*lay_out(make_weights())))
    start = time.monotonic()
    refused(tmp_path, message)
    assert time.monotonic() - start < 5  # nothing here is worth more


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_to_a_header_is_refused_or_harmless(tmp_path, seed):
    """200 files each: bytes changed, removed or repeated. No exception but CheckpointError."""
    random = Random(seed)
    whole = pack(*lay_out(make_weights()))
    data_start = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(200):
        at, length = random.randrange(data_start), random.choice([1, 1, 1, 2, 20])
        new = random.choice([bytes([random.randrange(256)]), b"9", b'"', b"", whole[at : at + length] * 2])
        (tmp_path / "model.safetensors").write_bytes(whole[:at] + new + whole[at + length :])
        with suppress(CheckpointError):
            read_all(tmp_path, CONFIG)


@pytest.mark.parametrize("size", [(16 << 20) + 1, 100 * 10**6 + 1], ids=["16 MiB + 1", "100 MB + 1"])
def test_refuses_a_header_that_is_large_and_there(tmp_path, size):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(size + 8)  # sparse
    refused(tmp_path, f"header: length {size}, at most 16777216 are read")


def test_every_truncation_is_refused(tmp_path):
    whole = pack(*lay_out(make_weights()))
    for size in range(0, len(whole), 487):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        refused(tmp_path, "truncated|has . bytes")


# --- the wrong tensors

MODELS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "tensor missing": (lambda w: without(w, "model.norm.weight"), "model.norm.weight: missing"),
    "tensors missing": (lambda w: {"model.norm.weight": w["model.norm.weight"]}, "embed_tokens.weight: missing"),
    "tensor unexpected": (lambda w: w | {"model.extra": torch.zeros(1)}, "model.extra: unexpected"),
    "layer unexpected": (
        lambda w: w | {"model.layers.3.input_layernorm.weight": torch.zeros(8)},
        "model.layers.3.input_layernorm.weight: unexpected",
    ),
    "router state scale in layer 0": (
        lambda w: w | {"model.layers.0.mlp.gate.router_states_scale": torch.zeros(6)},
        "layers.0.mlp.gate.router_states_scale: unexpected",
    ),
    "bias where there is none": (
        lambda w: w | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(8)},
        "o_proj.bias: unexpected",
    ),
    "head of another shape": (
        lambda w: w | {"lm_head.weight": torch.zeros(11, 8)},
        r"lm_head.weight: shape \[11, 8\], wanted \[12, 8\]",
    ),
    "head without embedding": (
        lambda w: without(w, "model.embed_tokens.weight") | {"lm_head.weight": torch.zeros(12, 8)},
        "model.embed_tokens.weight: missing",
    ),
    "integers": (lambda w: w | {"model.norm.weight": torch.ones(8).long()}, "dtype 'I64', wanted one of"),
    "E instead of E + 1 biases": (
        lambda w: w | {"model.layers.0.mlp.gate.balancing_biases": torch.zeros(3)},
        r"balancing_biases: shape \[3\], wanted \[4\]",
    ),
    "wrong names": (lambda w: {f"transformer.{k}": v for k, v in w.items()}, "model.embed_tokens.weight: missing"),
    "legacy, tensor missing": (
        lambda w: without(to_legacy(w, 3), "model.layers.4.res_scale.residual_bias"),
        "model.layers.4.res_scale.residual_bias: missing",
    ),
    "legacy, expert missing": (
        lambda w: without(to_legacy(w, 3), "model.layers.1.zaya_block.experts.local_experts.2.linear_fc2.weight"),
        "layers.1.zaya_block.experts.local_experts.2.linear_fc2.weight: missing",
    ),
    "legacy, one expert more": (
        lambda w: (
            to_legacy(w, 3) | {"model.layers.1.zaya_block.experts.local_experts.3.linear_fc2.weight": torch.zeros(8, 5)}
        ),
        "local_experts.3.linear_fc2.weight: unexpected",
    ),
    "legacy, expert of another shape": (
        lambda w: (
            to_legacy(w, 3)
            | {"model.layers.1.zaya_block.experts.local_experts.1.linear_fc1.weight": torch.zeros(8, 10)}
        ),
        r"local_experts.1.linear_fc1.weight: shape \[8, 10\], wanted \[10, 8\]",
    ),
    "legacy, expert of another dtype": (
        lambda w: (
            to_legacy(w, 3)
            | {"model.layers.1.zaya_block.experts.local_experts.1.linear_fc1.weight": torch.zeros(10, 8)}
        ),
        "local_experts.1.linear_fc1.weight: dtype F32, but BF16 in expert 0",
    ),
    "legacy, residual in front of the first": (
        lambda w: to_legacy(w, 3) | {"model.layers.0.res_scale.residual_scale": torch.zeros(8)},
        "layers.0.res_scale.residual_scale: unexpected",
    ),
    "legacy, infinite expert": (
        lambda w: (
            to_legacy(w, 3)
            | {
                "model.layers.1.zaya_block.experts.local_experts.1.linear_fc1.weight": torch.full(
                    (10, 8), torch.inf, dtype=torch.bfloat16
                )
            }
        ),
        "holds NaN or infinity",
    ),
    "mostly native": (
        lambda w: without(w, "model.norm.weight") | {"model.final_norm.weight": torch.zeros(8)},
        "model.norm.weight: missing",
    ),
    "mostly legacy": (
        lambda w: without(to_legacy(w, 3), "model.final_norm.weight") | {"model.norm.weight": torch.zeros(8)},
        "model.final_norm.weight: missing",
    ),
    "native and a bit of legacy": (
        lambda w: w | {"model.res_scale.residual_bias": torch.zeros(8)},
        "model.res_scale.residual_bias: unexpected",
    ),
}


@pytest.mark.parametrize(("change", "message"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_refuses_tensors(tmp_path, sharded, change, message):
    weights = change(make_weights())
    if sharded:
        write_shards(tmp_path, weights, count=min(2, len(weights)))
    else:
        write(tmp_path / "model.safetensors", weights)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "field",
    ["vocab_size", "hidden_size", "num_experts", "moe_intermediate_size", "router_hidden_size", "head_dim"],
)
def test_refuses_a_config_of_another_size(tmp_path, field):
    write(tmp_path / "model.safetensors", make_weights())
    refused(tmp_path, "shape .* wanted", replace(CONFIG, **{field: getattr(CONFIG, field) * 2}))


def test_refuses_a_config_of_another_depth(tmp_path):
    write(tmp_path / "model.safetensors", make_weights())
    for layers, message in [(2, r"layers\.2\..*: unexpected"), (4, r"layers\.3\..*: missing")]:
        refused(tmp_path, message, replace(CONFIG, num_hidden_layers=layers, layer_types=("hybrid",) * layers))


# --- the index

NORM = "model.norm.weight"
INDICES: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "array": (lambda m: [m], "weight_map: wanted an object"),
    "weight_map missing": (lambda m: {"metadata": {}}, "weight_map: wanted"),
    "weight_map empty": (lambda m: {"weight_map": {}}, "weight_map: wanted"),
    "weight_map list": (lambda m: {"weight_map": [m]}, "weight_map: wanted"),
    "key unknown": (lambda m: {"weight_map": m, "loader": "evil"}, "weight_map: wanted"),
    "file no string": (lambda m: {"weight_map": m | {NORM: 3}}, "model.norm.weight: wanted a file name, got 3"),
    "file null": (lambda m: {"weight_map": m | {NORM: None}}, "wanted a file name"),
    "file .bin": (lambda m: {"weight_map": m | {NORM: "pytorch_model.bin"}}, "pytorch_model.bin': this format"),
    "file .pt": (lambda m: {"weight_map": m | {NORM: "x.pt"}}, "this format is not read"),
    "file .gguf": (lambda m: {"weight_map": m | {NORM: "x.gguf"}}, "this format is not read"),
    "file of no kind": (lambda m: {"weight_map": m | {NORM: "x"}}, "is not the name of a safetensors file"),
    "file empty": (lambda m: {"weight_map": m | {NORM: ""}}, "is not the name of a safetensors file"),
    "parent": (lambda m: {"weight_map": m | {NORM: "../x.safetensors"}}, "is not the name of a safetensors file"),
    "absolute": (lambda m: {"weight_map": m | {NORM: "/tmp/x.safetensors"}}, "is not the name"),
    "sub-folder": (lambda m: {"weight_map": m | {NORM: "sub/x.safetensors"}}, "is not the name"),
    "backslash": (lambda m: {"weight_map": m | {NORM: "..\\x.safetensors"}}, "is not the name"),
    "NUL": (lambda m: {"weight_map": m | {NORM: "\0.safetensors"}}, "is not the name"),
    "dots": (lambda m: {"weight_map": m | {NORM: "..safetensors"}}, "is not the name"),
    "long name": (lambda m: {"weight_map": m | {NORM: "a" * 5000 + ".safetensors"}}, "is not the name"),
    "shard missing": (lambda m: {"weight_map": m | {NORM: "x.safetensors"}}, "x.safetensors: file: No such file"),
    "tensor name long": (lambda m: {"weight_map": m | {"a" * 65536: m[NORM]}}, r"aaa\.\.\.: a name has"),
    "tensor name not ASCII": (lambda m: {"weight_map": m | {"\ud800": m[NORM]}}, "a name has"),
    "tensor in another shard": (
        lambda m: {"weight_map": m | {NORM: next(file for file in m.values() if file != m[NORM])}},
        "model.norm.weight: missing, although",
    ),
    "tensor in no shard": (lambda m: {"weight_map": m | {"extra": m[NORM]}}, "extra: missing, although"),
    "tensor not in the index": (lambda m: {"weight_map": without(m, NORM)}, "model.norm.weight: .* nowhere"),
}


@pytest.mark.parametrize(("change", "message"), INDICES.values(), ids=INDICES)
def test_refuses_index(tmp_path, change, message):
    weight_map = write_shards(tmp_path, make_weights())
    write_index(tmp_path, change(weight_map))
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the name 'a' occurs 2 times"),
        (b'{"weight_map": {"a": NaN}}', "NaN is not a number"),
        (b"[" * 10**6, "nested deeper"),
        (b"\xff\xfe{}", "not valid JSON"),
    ],
    ids=["empty", "tensor twice", "NaN", "deep", "not UTF-8"],
)
def test_refuses_index_text(tmp_path, text, message):
    write_shards(tmp_path, make_weights())
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    refused(tmp_path, r"index\.json: file: .*" + message)


def test_refuses_a_tensor_in_two_shards(tmp_path):
    weights = make_weights()
    weight_map = write_shards(tmp_path, weights, count=2)
    first = "model-00001-of-00002.safetensors"
    owned = {name: w for name, w in weights.items() if weight_map[name] == first}
    stranger = next(name for name in weights if weight_map[name] != first)
    write(tmp_path / first, owned | {stranger: weights[stranger]})
    refused(tmp_path, f"{stranger}: .* has this tensor in model-00002-of-00002.safetensors")


def test_refuses_a_shard_of_another_kind(tmp_path):
    write_shards(tmp_path, make_weights())
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"\x80\x04\x95" + b"\0" * 100)  # a pickle
    refused(tmp_path, r"00002-of-00003\.safetensors: header: length")


def test_refuses_single_file_and_index_together(tmp_path):
    weights = make_weights()
    write_shards(tmp_path, weights)
    write(tmp_path / "model.safetensors", weights)
    refused(tmp_path, "wanted one of them, got both")


# --- files that are none


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "zaya.gguf", "model.ckpt"])
def test_refuses_other_formats_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    refused(tmp_path, f"{name}: file: this format is not read, only safetensors is")


def test_refuses_a_folder_without_weights(tmp_path):
    refused(tmp_path, "no model.safetensors and no model.safetensors.index.json$")
    write_shards(tmp_path, make_weights())
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "only 'model-00001-of-00003.safetensors, ")
    refused(tmp_path / "absent", "No such file")


def link_out(path: Path) -> None:
    write(path.parent.parent / "outside.safetensors", make_weights())
    path.symlink_to("../outside.safetensors")


def link_to_blobs(path: Path) -> None:
    """As in the hub's cache, but the folder is no snapshot."""
    (path.parent.parent / "blobs").mkdir()
    write(path.parent.parent / "blobs/c0ffee", make_weights())
    path.symlink_to("../blobs/c0ffee")


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (os.mkfifo, "not a regular file"),
    "directory": (Path.mkdir, "not a regular file"),
    "link out": (link_out, "links to a file outside the model folder"),
    "link to blobs": (link_to_blobs, "links to a file outside the model folder"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "links to a file outside"),
    "link to nothing": (lambda path: path.symlink_to("gone"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path), "ymbolic link|ymlink loop"),
}


@pytest.mark.parametrize(("make", "message"), NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "model-00002-of-00003.safetensors"]
)
def test_refuses_what_is_no_file(tmp_path, name, make, message):
    folder = tmp_path / "models" / "zaya"
    folder.mkdir(parents=True)
    if name != "model.safetensors":
        write_shards(folder, make_weights())
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    refused(folder, message)


def test_refuses_a_file_without_permission(tmp_path, monkeypatch):
    def open_denied(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    write(tmp_path / "model.safetensors", make_weights())
    monkeypatch.setattr(os, "open", open_denied)  # root, as in a container, reads whatever the mode
    refused(tmp_path, "file: Permission denied$")


def truncate(path: Path) -> None:
    os.truncate(path, 4000)


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, (1, 1))  # clocks of file systems are coarse


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("change", "message"),
    [(truncate, "the file ends before byte"), (rewrite, "has changed since"), (lengthen, "has changed since")],
)
def test_refuses_a_file_that_changes_while_it_is_read(tmp_path, change, message):
    write(tmp_path / "model.safetensors", make_weights())
    with Checkpoint(tmp_path, CONFIG) as checkpoint:
        checkpoint.read("model.norm.weight")
        change(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"model.norm.weight: .*{message}"):
            checkpoint.read("model.norm.weight")


def test_a_file_replaced_while_it_is_read_is_not_noticed(tmp_path):
    weights = make_weights()
    write(tmp_path / "model.safetensors", weights)
    with Checkpoint(tmp_path, CONFIG) as checkpoint:
        write(tmp_path / "new", make_weights())
        (tmp_path / "new").rename(tmp_path / "model.safetensors")
        assert torch.equal(checkpoint.read("model.norm.weight"), weights["model.norm.weight"])


# --- resolve_folder


def test_resolves_a_folder(tmp_path):
    assert resolve_folder(tmp_path) == resolve_folder(str(tmp_path)) == tmp_path


def test_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="wanted a model folder, got a file"):
        resolve_folder(tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ["zaya", "../Zyphra/ZAYA1-8B", "a/b/c", "/no/such", "a/..", "../b", "a/b\n", "a b/c"])
def test_refuses_what_is_neither_folder_nor_hub_id(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="folder: there is none, and this is no hub id"):
        resolve_folder(text)


def test_a_hub_id_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="^Zyphra/ZAYA1-8B: folder: there is none; .* install huggingface_hub$"):
        resolve_folder("Zyphra/ZAYA1-8B")


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert resolve_folder("Zyphra/ZAYA1-8B") == tmp_path
    [(repo, options)] = calls
    assert repo == "Zyphra/ZAYA1-8B"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any("bin" in pattern or pattern.endswith(".py") for pattern in options["allow_patterns"])


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError], ids=lambda error: error.__name__)
def test_a_failed_download_is_a_checkpoint_error(monkeypatch, error):
    def snapshot_download(*_: object, **__: object) -> str:
        raise error("404 Client Error")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(CheckpointError, match="the hub gave: 404 Client Error"):
        resolve_folder("Zyphra/absent")


# --- against transformers


@pytest.fixture(scope="module")
def reference_model() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ZayaConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=40,
        num_experts=5,
        router_hidden_size=24,
        layer_types=["hybrid", "hybrid_sliding"] * 2,
        sliding_window=5,
        max_position_embeddings=256,
        eos_token_id=95,
    )
    torch.manual_seed(0)
    model = transformers.ZayaForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:  # from_pretrained keeps this buffer in float32, .to(bfloat16) does not
        layer.mlp.gate.balancing_biases = torch.nn.Buffer(torch.randn(6))
    for parameter in model.parameters():  # equal tensors, as biases of zeros, could be swapped unseen
        torch.nn.init.normal_(parameter)
    return model


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: w.detach() for name, w in model.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["single", "sharded"])
def test_reads_what_transformers_saves(tmp_path, reference_model, shard_size):
    reference_model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size != "1GB")
    config = ZayaConfig.from_folder(tmp_path)
    assert_reads(tmp_path, weights_of(reference_model), config)


def test_legacy_and_native_are_equal_bit_by_bit(tmp_path, reference_model):
    weights = weights_of(reference_model)
    config = ZayaConfig.from_dict(json.loads(reference_model.config.to_json_string()))
    write(tmp_path / "model.safetensors", to_legacy(weights, 4))
    assert_reads(tmp_path, weights, config)
