"""`blockdraft quantize`: a checkpoint whose experts have a byte a weight or half of one, and what that changes.

Tensors are read, quantized and written one by one. The two models of the report are in memory one after the other: what
is kept of the first are its hidden states, for both have the same LM head.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from blockdraft.convert.checkpoint import COPIED, config_dict, write_text
from blockdraft.errors import RequestError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.expert_formats import EXPERT_FORMATS, MXFP4
from blockdraft.model.tensor_names import QUANTIZED, SCALES, expected_shapes, is_quantized
from blockdraft.model.weights import (
    ADAPTER_FILE,
    DTYPES,
    LEAST_MX_SCALE,
    MOST_MX_SCALE,
    SINGLE_FILE,
    Checkpoint,
    bytes_of,
    resolve_folder,
)
from blockdraft.model.zaya import ZayaForCausalLM
from blockdraft.verify import BUILT_IN, PROMPTS

LARGEST_INT8, LARGEST_FP8 = 127, 448
MX_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# What lies in the middle goes to the code whose last bit is 0: there the border is the float32 below the middle.
MX_BORDERS = (0.25, 0.75 - 2.0**-24, 1.25, 1.75 - 2.0**-23, 2.5, 3.5 - 2.0**-22, 5.0)
WINDOW = 1024  # tokens of a sequence of the report
COMPARED_ROWS = 32  # with 262,272 tokens in the vocabulary: 67 MB of float64 logits
STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Spec = tuple[torch.dtype, tuple[int, ...]]


# Weights


def quantized(weight: Tensor, experts: str = "int8") -> tuple[Tensor, Tensor]:
    """Symmetric, rounded to the nearest, ties to even.

    Args:
        weight: ``[E, N, K]``.
        experts: One of EXPERT_FORMATS.

    Returns:
        int8: values ``[E, N, K]`` from -127 to 127, and float32 scales ``[E, N, 1]``, 1 for rows of zeros; their
        product is within half a scale of the weight. fp8: likewise, values to 448 in float8_e4m3fn. mxfp4: uint8
        ``[E, N, K / 2]``, two codes each, and uint8 ``[E, N, K / 32]``, the exponents of scales and 127.
    """
    to_format = {"int8": to_int8, "fp8": to_fp8, "mxfp4": to_mxfp4}[experts]
    parts = [to_format(expert.float()) for expert in weight]  # one at a time: float32 is twice the size of the weights
    values, scales = zip(*parts, strict=True)
    return torch.stack(values), torch.stack(scales)


def row_scales(wide: Tensor, largest: int) -> Tensor:
    scales = wide.abs().amax(-1, keepdim=True) / largest
    return scales.where(scales > 0, 1.0)


def to_int8(wide: Tensor) -> tuple[Tensor, Tensor]:
    scales = row_scales(wide, LARGEST_INT8)
    return (wide / scales).round_().clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8), scales


def to_fp8(wide: Tensor) -> tuple[Tensor, Tensor]:
    scales = row_scales(wide, LARGEST_FP8)
    return (wide / scales).clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn), scales


def to_mxfp4(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Of the scale with which a block's largest weight is 4 to 8, where above 6 it is cut, and the double of it, the
    one with the smaller square error."""
    blocks = wide.unflatten(-1, (-1, MXFP4.block))  # type: ignore[arg-type]
    exponents = blocks.abs().amax(-1, keepdim=True).frexp().exponent - 3  # of 0.5 to 1: 4 to 8
    exponents = exponents.clamp_(LEAST_MX_SCALE - 127, MOST_MX_SCALE - 1 - 127)
    small, large = (torch.ldexp(blocks, -exponents - more) for more in (0, 1))
    errors = [(mx_rounded(x) - x).square_().sum(-1, keepdim=True) for x in (small, large)]
    is_large = 4 * errors[1] < errors[0]
    codes = mx_codes(torch.where(is_large, large, small)).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + is_large + 127).squeeze(-1).to(torch.uint8)


def mx_codes(x: Tensor) -> Tensor:
    """The codes of E2M1 that are nearest to x, uint8."""
    sizes = torch.bucketize(x.abs(), torch.tensor(MX_BORDERS), out_int32=True)
    return (sizes + 8 * x.signbit()).to(torch.uint8)


def mx_rounded(x: Tensor) -> Tensor:
    """What those codes say."""
    return torch.tensor(MX_SIZES)[(mx_codes(x) & 7).int()].copysign(x)


def specs_of(checkpoint: Checkpoint, config: ZayaConfig) -> dict[str, Spec]:
    """dtype and shape of each tensor of the quantized model."""

    stored = EXPERT_FORMATS[config.quantized_experts or ""]

    def dtype_of(name: str) -> torch.dtype:
        if is_quantized(name, config):
            return DTYPES[stored.values]
        return DTYPES[stored.scales[0]] if name.endswith(SCALES) else checkpoint.stored_dtype(name)

    return {name: (dtype_of(name), shape) for name, shape in expected_shapes(config).items()}


def tensors_of(checkpoint: Checkpoint, experts: str) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        if name.endswith(QUANTIZED):
            values, scales = quantized(tensor, experts)
            yield name, values
            yield f"{name}_scale", scales
        else:
            yield name, tensor.to(checkpoint.stored_dtype(name))


def write_tensors(path: Path, specs: dict[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """A safetensors file, with one tensor at a time in memory, in the order of `specs`.

    Raises:
        RequestError: The file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": STORED_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors at 8 bytes, as the format's own library has them
    starts = {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items() if name in specs}
    try:
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in tensors:
                file.seek(starts[name])
                file.write(bytes_of(tensor))
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror}") from error


def quantize(folder: Path, out: Path, progress: bool = True, experts: str = "int8") -> None:
    """Writes a model folder with quantized experts: config.json in the native style, one file of weights, and the
    tokenizer and adapters as they are.

    Args:
        folder: A model that `ZayaForCausalLM.from_pretrained` reads, not quantized.
        out: A folder that is absent or empty.
        experts: One of EXPERT_FORMATS.

    Raises:
        RequestError: The model is quantized already, or `out` cannot be used.
        ConfigError, CheckpointError: The model cannot be read, or its sizes do not fit the format.
    """
    config = ZayaConfig.from_folder(folder)
    if config.quantized_experts:
        raise RequestError(f"{folder}: the experts are {config.quantized_experts} already, wanted floats")
    check_empty(out)
    config = replace(config, quantized_experts=experts)
    with Checkpoint(folder, replace(config, quantized_experts=None)) as checkpoint:
        specs = specs_of(checkpoint, config)
        check_space(out, sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values()))
        make_folder(out)
        partial = (out / SINGLE_FILE).with_suffix(".partial")
        try:
            tensors = tensors_of(checkpoint, experts)
            bar = tqdm(tensors, "quantizing", len(specs), unit="tensor", disable=not progress, leave=False)
            write_tensors(partial, specs, bar)
            partial.rename(out / SINGLE_FILE)
        finally:
            partial.unlink(missing_ok=True)
        dtype = checkpoint.stored_dtype("model.embed_tokens.weight")
    for pattern in (*COPIED, ADAPTER_FILE):
        for file in filter(Path.is_file, folder.glob(pattern)):
            shutil.copyfile(file, out / file.name)
    write_text(out / "config.json", json.dumps(config_dict(config, dtype), indent=2) + "\n")


def check_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out: wanted a folder, got the file {out}")
    if out.is_dir() and any(out.iterdir()):
        raise RequestError(f"--out: wanted a new or empty folder, got {out} with {len(list(out.iterdir()))} entries")


def check_space(out: Path, wanted: int) -> None:
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise RequestError(f"--out: {out}: wanted {wanted / 1e9:.1f} GB of free space, got {free / 1e9:.1f} GB")


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out: {out}: cannot be made: {error.strerror}") from error


# Report


@dataclass(frozen=True)
class Change:
    """What quantization changed on some text. Before: the model as it was, in bfloat16.

    Attributes:
        text: Where the text is from.
        positions: Where both laws of the next token were compared.
        kl_mean, kl_p99, kl_max: KL(before || after) in nats.
        top1_agreement: Share of positions with the same most probable token.
        scored: Tokens whose probability was looked at.
        bits_per_token, bits_per_byte: Cross-entropy of the text, before and after.
    """

    text: str
    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    scored: int
    bits_per_token: tuple[float, float]
    bits_per_byte: tuple[float, float]


def texts_of(source: str) -> list[str]:
    """The text of a file, or the built-in prompts.

    Raises:
        RequestError: The file cannot be read, or is empty.
    """
    if source == BUILT_IN:
        return list(PROMPTS)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--text: {source}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    if not text.strip():
        raise RequestError(f"--text: {source}: wanted some text, got none")
    return [text]


def windows_of(model: ZayaForCausalLM, texts: list[str], tokens: int) -> list[list[int]]:
    """Token ids of at most `tokens` tokens, in sequences of at most WINDOW that begin with bos where the config has it.

    Raises:
        RequestError: There is no tokenizer, or too little text.
    """
    if model.tokenizer is None:
        raise RequestError("the report needs a tokenizer.json beside the weights; --no-report leaves it out")
    size = min(WINDOW, model.config.max_position_embeddings) - 1
    bos = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    windows = []
    for text in texts:
        ids = model.tokenizer.encode(text, add_special_tokens=False).ids[: max(0, tokens)]
        windows += [bos + ids[i : i + size] for i in range(0, len(ids), size)]
        tokens -= len(ids)
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise RequestError("--text: wanted at least two tokens, got fewer")
    return windows


def states_of(model: ZayaForCausalLM, windows: list[list[int]], progress: bool) -> list[list[Tensor]]:
    bar = tqdm(windows, "computing", unit="sequence", disable=not progress, leave=False)
    return [[x.cpu() for x in model.hidden_states(window)] for window in bar]


@dataclass
class Comparison:
    """Sums up two laws, row by row."""

    kl: list[Tensor]
    agree: list[Tensor]
    nats: list[Tensor]

    def add(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        """Logits ``[n, V]``; the tokens ``[m]`` that follow the first m of them."""
        p, q = (logits.double().log_softmax(-1) for logits in (before, after))
        self.kl.append((p.exp() * (p - q)).sum(-1).clamp_(min=0))
        self.agree.append(p.argmax(-1) == q.argmax(-1))
        chosen = [law[: len(targets)].gather(1, targets[:, None])[:, 0] for law in (p, q)]
        self.nats.append(-torch.stack(chosen, 1))


def compare(model: ZayaForCausalLM, windows: list[list[int]], before: list[list[Tensor]], progress: bool) -> Comparison:
    """Hidden states of the first model beside those of `model`."""
    comparison = Comparison([], [], [])
    for window, old, new in zip(windows, before, states_of(model, windows, progress), strict=True):
        targets, a, b = torch.tensor(window[1:]), torch.cat(old), torch.cat(new)
        for first in range(0, len(window), COMPARED_ROWS):
            rows = slice(first, first + COMPARED_ROWS)
            before_logits, after_logits = (model.decoder.lm_head(x[rows], out_float32=True) for x in (a, b))
            comparison.add(before_logits, after_logits, targets[rows])
    return comparison


def change_of(model: ZayaForCausalLM, text: str, windows: list[list[int]], comparison: Comparison) -> Change:
    assert model.tokenizer is not None  # windows_of has looked
    kl, agree, nats = torch.cat(comparison.kl), torch.cat(comparison.agree), torch.cat(comparison.nats)
    size = sum(len(model.tokenizer.decode(window[1:]).encode()) for window in windows)
    before, after = (nats.sum(0) / math.log(2)).tolist()
    return Change(
        text=text,
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(agree.double().mean()),
        scored=len(nats),
        bits_per_token=(before / len(nats), after / len(nats)),
        bits_per_byte=(before / size, after / size),
    )


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def as_text(result: dict[str, Any]) -> str:
    before, after = result["bytes_before"], result["bytes_after"]
    lines = [
        f"{result['out']}: experts {result['experts']}, {EXPERT_FORMATS[result['experts']].about_scales}",
        f"weights: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({after / before:.0%})",
    ]
    change = result["report"]
    if change is None:
        return "\n".join([*lines, "no report: nothing is known of what this changes"])
    token, byte = change["bits_per_token"], change["bits_per_byte"]
    lines += [
        f"on {'built-in prompts' if change['text'] == BUILT_IN else change['text']}, {change['positions']} positions:",
        f"  KL(before || after)   mean {change['kl_mean']:.2e}, 99% below {change['kl_p99']:.2e}, "
        f"largest {change['kl_max']:.2e} nats",
        f"  most probable token   the same at {change['top1_agreement']:.2%}",
        f"  bits per token        {token[0]:.4f} before, {token[1]:.4f} after",
        f"  bits per byte         {byte[0]:.4f} before, {byte[1]:.4f} after",
    ]
    return "\n".join(lines)


# Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `blockdraft quantize`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub id")
    add("--format", choices=EXPERT_FORMATS, default="int8", help="of the experts; all else stays; default: %(default)s")
    add("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--text", default=BUILT_IN, metavar="FILE", help="of the report, UTF-8 that the model was not trained on")
    add("--tokens", type=int, default=4096, metavar="N", help="of the text, at most; default: %(default)s")
    add("--no-report", action="store_true", help="do not run the model before and after")
    add("--json", action="store_true", help="one object on standard output")
    add("--threads", type=int, metavar="N", help="default: torch's choice")


def load(folder: Path) -> ZayaForCausalLM:
    return ZayaForCausalLM.from_pretrained(folder, kv_cache_tokens=WINDOW)


def with_report(folder: Path, out: Path, experts: str, source: str, tokens: int) -> Change:
    """Quantizes between two runs of the text."""
    texts = texts_of(source)
    model = load(folder)
    windows = windows_of(model, texts, tokens)
    before = states_of(model, windows, progress=True)
    del model  # before the other one comes
    quantize(folder, out, experts=experts)
    model = load(out)
    return change_of(model, source, windows, compare(model, windows, before, progress=True))


@torch.inference_mode()
def main(args: argparse.Namespace) -> int:
    """Writes the folder and prints the report.

    Raises:
        RequestError, ConfigError, CheckpointError: As for `quantize`; the text cannot be used.
    """
    for name in ("tokens", "threads"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 1 << 24:
            raise RequestError(f"--{name}: wanted 1 to {1 << 24}, got {value}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    check_empty(args.out)
    folder = resolve_folder(args.model)
    if args.no_report:
        quantize(folder, args.out, experts=args.format)
    change = None if args.no_report else with_report(folder, args.out, args.format, args.text, args.tokens)
    result = {
        "model": str(args.model),
        "out": str(args.out),
        "experts": args.format,
        "bytes_before": size_of(folder),
        "bytes_after": size_of(args.out),
        "report": None if change is None else asdict(change),
    }
    print(json.dumps(result) if args.json else as_text(result))
    return 0
