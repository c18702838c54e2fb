"""Weights of a model folder, checked before the first is read, and read one by one into memory that torch owns.

There is no mmap: truncating a mapped file ends the process later, somewhere else. Names are those of the native layout
(transformers); the older layout of alternating half-layers is renamed and its experts are stacked while they are read.
"""

import ctypes
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockdraft.errors import CheckpointError
from blockdraft.model.config import ZayaConfig
from blockdraft.model.files import PLAIN_NAME, UnusableFile, open_regular, read_into, read_json, shown
from blockdraft.model.safetensors_header import MAX_HEADER_BYTES, NAME_RULE, TENSOR_NAME, StoredTensor, read_header
from blockdraft.model.tensor_names import (
    FLOATS,
    SCALES,
    adapter_shapes,
    expected_shapes,
    legacy_names,
    stored_dtypes,
)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE = "draft_adapter.safetensors"  # of `blockdraft.convert`
REFUSED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
# Exponents with which all products of scale and weight are 0 or normal numbers of bfloat16 (csrc/common/dtype.h).
LEAST_MX_SCALE, MOST_MX_SCALE = 2, 252
# Tied, so not used even where a file has it.
LM_HEAD = "lm_head.weight"
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.jinja"]


@dataclass(frozen=True)
class Shard:
    """An open safetensors file and what it held when its header was checked."""

    path: Path
    file: io.FileIO
    tensors: dict[str, StoredTensor]
    state: tuple[int, int]  # size, time of the last change in ns


@dataclass(frozen=True)
class Part:
    """A stored tensor: the whole of a native one, or one expert of it."""

    name: str
    shard: Shard

    @property
    def stored(self) -> StoredTensor:
        return self.shard.tensors[self.name]


class Checkpoint:
    """The weights of a model folder: ``model.safetensors``, or the shards of ``model.safetensors.index.json``.

    Opening reads and checks every header; tensors are read on demand. Use it as a context manager, or close it.

    Args:
        folder: The model folder.
        config: What its tensors must look like.

    Raises:
        CheckpointError: A file is missing, malformed or outside the folder, or the tensors are not exactly those of
            the config. The message is ``file: tensor: reason``.
    """

    def __init__(self, folder: Path, config: ZayaConfig) -> None:
        self.folder = Path(folder)
        self._shapes = expected_shapes(config)
        with ExitStack() as stack:
            shards = _open_shards(self.folder, stack)
            self._parts = _match(self.folder, shards, self._shapes, config)
            self._stack: ExitStack | None = stack.pop_all()

    def names(self) -> list[str]:
        """The native names, in the order of the layers."""
        return list(self._shapes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(part.stored.nbytes for parts in self._parts.values() for part in parts)

    def stored_dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._parts[name][0].stored.dtype]

    def read(self, name: str) -> Tensor:
        """Reads a tensor into new memory.

        Args:
            name: A native name.

        Returns:
            The tensor in the dtype it is stored in; ``balancing_biases`` and the scales of experts' rows in float32.

        Raises:
            CheckpointError: There is no such tensor, it holds NaN or infinity (in int8: -128; as a block's scale: what
                leaves the normal numbers of bfloat16), or its file has changed since opening.
        """
        if name not in self._parts or self._stack is None:
            reason = "not a tensor of this model" if self._stack else "the checkpoint is closed"
            raise CheckpointError(f"{self.folder}: {name}: {reason}")
        tensor = _read_parts(self._parts[name], self._shapes[name], name.endswith(SCALES))
        is_wide = name.endswith(("balancing_biases", *SCALES)) and tensor.dtype != torch.uint8
        return tensor.float() if is_wide else tensor

    def close(self) -> None:
        """Closes the files. Tensors that were read stay valid."""
        if self._stack is not None:
            self._stack.close()
        self._stack = None

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_adapters(folder: Path, config: ZayaConfig) -> dict[str, Tensor]:
    """The low-rank additions of rows that draft, by name, as stored; empty where the folder has none.

    Raises:
        CheckpointError: The file cannot be read, or does not hold the adapters of a model of this config, all of one
            rank.
    """
    path = Path(folder) / ADAPTER_FILE
    if not os.path.lexists(path):
        return {}
    with ExitStack() as stack:
        shard = _open_shard(Path(folder), ADAPTER_FILE, stack)
        shapes = {name: stored.shape for name, stored in shard.tensors.items()}
        ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".down") and shape}
        if len(ranks) != 1 or 0 in ranks:
            raise CheckpointError(f"{path}: rank: wanted one for all adapters, got {sorted(ranks)}")
        if shapes != adapter_shapes(config, ranks.pop()):
            raise CheckpointError(f"{path}: the adapters are not those of this model")
        parts = {name: Part(name, shard) for name in shapes}
        for part in parts.values():
            _check_dtype(part, FLOATS)
        return {name: _read_parts([part], shapes[name]) for name, part in parts.items()}


def _open_shards(folder: Path, stack: ExitStack) -> list[Shard]:
    has_single, has_index = (os.path.lexists(folder / name) for name in (SINGLE_FILE, INDEX_FILE))
    if has_single and has_index:
        raise CheckpointError(f"{folder}: {SINGLE_FILE}, {INDEX_FILE}: wanted one of them, got both")
    if not has_index:
        return [_open_shard(folder, SINGLE_FILE, stack)] if has_single else _refuse_formats(folder)
    weight_map = _weight_map(folder)
    shards = {name: _open_shard(folder, name, stack) for name in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise CheckpointError(f"{folder / file}: {name}: missing, although {INDEX_FILE} names it")
    for file, shard in shards.items():
        for name in shard.tensors:
            if weight_map.get(name) != file:
                wanted = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise CheckpointError(f"{shard.path}: {name}: {INDEX_FILE} has this tensor {wanted}")
    return list(shards.values())


def _open_shard(folder: Path, name: str, stack: ExitStack) -> Shard:
    path = folder / name
    with _reasons(path, "file"):
        file = stack.enter_context(open_regular(folder, name))
        state = _state(file)
        return Shard(path, file, read_header(file, path), state)


def _state(file: io.FileIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


@contextmanager
def _reasons(path: Path, subject: str) -> Iterator[None]:
    try:
        yield
    except UnusableFile as error:
        raise CheckpointError(f"{path}: {subject}: {error}") from error


def _refuse_formats(folder: Path) -> list[Shard]:
    """Nothing this module reads is there: says what is, in particular pickles, which can run code when loaded."""
    try:
        files = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: file: {error.strerror}") from error
    for file in files:
        if file.endswith(REFUSED_SUFFIXES):
            raise CheckpointError(f"{folder / file}: file: this format is not read, only safetensors is")
    shards = [file for file in files if file.endswith(".safetensors")]
    found = f", only {shown(', '.join(shards))}" if shards else ""
    raise CheckpointError(f"{folder}: file: no {SINGLE_FILE} and no {INDEX_FILE}{found}")


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    with _reasons(path, "file"):
        index = read_json(folder, INDEX_FILE, MAX_HEADER_BYTES)
    # metadata is not compared: its total_size is known to count tied tensors twice.
    if not isinstance(index, dict) or not {"weight_map"} <= index.keys() <= {"weight_map", "metadata"}:
        raise CheckpointError(f"{path}: weight_map: wanted an object with weight_map and metadata, got {shown(index)}")
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: wanted an object with tensors, got {shown(weight_map)}")
    for name, file in weight_map.items():
        _check_shard_name(path, name, file)
    return weight_map


def _check_shard_name(path: Path, name: str, file: Any) -> None:
    if not TENSOR_NAME.fullmatch(name):
        raise CheckpointError(f"{path}: {shown(name)}: {NAME_RULE}")
    if not isinstance(file, str):
        raise CheckpointError(f"{path}: {name}: wanted a file name, got {shown(file)}")
    if file.endswith(REFUSED_SUFFIXES):
        raise CheckpointError(f"{path}: {name}: {shown(file)}: this format is not read, only safetensors is")
    if not PLAIN_NAME.fullmatch(file) or not file.endswith(".safetensors"):
        raise CheckpointError(f"{path}: {name}: {shown(file)} is not the name of a safetensors file in the folder")


def _match(
    folder: Path, shards: list[Shard], shapes: dict[str, tuple[int, ...]], config: ZayaConfig
) -> dict[str, list[Part]]:
    """Finds the stored tensors of every native one; what is left over must be the tied head."""
    stored = {name: Part(name, shard) for shard in shards for name in shard.tensors}
    where = folder / (SINGLE_FILE if len(shards) == 1 and shards[0].path.name == SINGLE_FILE else INDEX_FILE)
    native = {name: (name,) for name in shapes}
    legacy = {name: legacy_names(name, config) for name in shapes}
    is_legacy = _count(stored, legacy) > _count(stored, native)  # a few names are in both layouts
    parts = {
        name: [_take(stored, source, where) for source in sources]
        for name, sources in (legacy if is_legacy else native).items()
    }
    for name, shape in shapes.items():
        _check_parts(parts[name], shape[1:] if is_legacy and ".experts." in name else shape)
        _check_dtype(parts[name][0], stored_dtypes(name, config))
    if LM_HEAD in stored:
        _check_parts([stored.pop(LM_HEAD)], shapes["model.embed_tokens.weight"])
    for part in stored.values():
        raise CheckpointError(f"{part.shard.path}: {part.name}: unexpected, the model has no such tensor")
    return parts


def _count(stored: dict[str, Part], sources: Mapping[str, tuple[str, ...]]) -> int:
    return sum(name in stored for names in sources.values() for name in names)


def _take(stored: dict[str, Part], name: str, where: Path) -> Part:
    if name not in stored:
        raise CheckpointError(f"{where}: {name}: missing")
    return stored.pop(name)


def _check_parts(parts: list[Part], shape: tuple[int, ...]) -> None:
    for part in parts:
        where = f"{part.shard.path}: {part.name}"
        if part.stored.shape != shape:
            raise CheckpointError(f"{where}: shape {list(part.stored.shape)}, wanted {list(shape)}")
        if part.stored.dtype != parts[0].stored.dtype:
            raise CheckpointError(f"{where}: dtype {part.stored.dtype}, but {parts[0].stored.dtype} in expert 0")


def _check_dtype(part: Part, dtypes: tuple[str, ...]) -> None:
    if part.stored.dtype not in dtypes:
        wanted = "F32, BF16 or F16" if len(dtypes) > 1 else f"{dtypes[0]}, because of quantization_config"
        raise CheckpointError(f"{part.shard.path}: {part.name}: dtype {part.stored.dtype}, wanted {wanted}")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, valid as long as the tensor lives."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _read_part(part: Part, rows: memoryview) -> None:
    with _reasons(part.shard.path, part.name):
        read_into(part.shard.file, rows, part.stored.offset)
        if _state(part.shard.file) != part.shard.state:
            raise UnusableFile("the file has changed since it was checked")


def _read_parts(parts: list[Part], shape: tuple[int, ...], is_scale: bool = False) -> Tensor:
    """One behind the other, checked."""
    tensor = torch.empty(shape, dtype=DTYPES[parts[0].stored.dtype], device="cpu")
    rows = bytes_of(tensor)
    for i, part in enumerate(parts):
        size = part.stored.nbytes
        _read_part(part, rows[i * size : (i + 1) * size])
    _check_values(tensor, parts[0], is_scale)
    return tensor


def _check_values(tensor: Tensor, part: Part, is_scale: bool) -> None:
    where = f"{part.shard.path}: {part.name}"
    if tensor.dtype == torch.float8_e4m3fn:  # 7f and ff are its NaN, the last of either sign; aminmax does not know it
        codes = tensor.view(torch.int8)
        if codes.max() == 127 or (codes == -1).any():
            raise CheckpointError(f"{where}: holds NaN or infinity")
        return
    # aminmax propagates NaN and runs at memory speed (12 GB/s of bfloat16 on 2 cores; isfinite().all(): 0.4).
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(f"{where}: holds NaN or infinity")
    if tensor.dtype == torch.int8 and low == -128:  # symmetric; the kernels' tables end at 127
        raise CheckpointError(f"{where}: holds -128, wanted -127 to 127")
    if tensor.dtype == torch.uint8 and is_scale and (low < LEAST_MX_SCALE or high > MOST_MX_SCALE):
        wanted = f"{LEAST_MX_SCALE} to {MOST_MX_SCALE}"
        raise CheckpointError(f"{where}: holds scales of exponent {int(low)} to {int(high)}, wanted {wanted}")


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a model: the path itself, or a download from the Hugging Face hub.

    Args:
        path_or_hub_id: A folder, or ``owner/name``.

    Raises:
        CheckpointError: There is neither a folder nor a hub id of that name, the download fails, or huggingface_hub is
            not installed.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    text = str(path_or_hub_id)
    if folder.exists():
        raise CheckpointError(f"{text}: folder: wanted a model folder, got a file")
    if not re.fullmatch(r"\w[\w-]*(\.[\w-]+)*/\w[\w-]*(\.[\w-]+)*", text, re.ASCII):
        raise CheckpointError(f"{text}: folder: there is none, and this is no hub id (owner/name) either")
    return _download(text)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # an extra, not needed for models on disk
    except ImportError as error:
        reason = "there is none; to look for it on the Hugging Face hub, install huggingface_hub"
        raise CheckpointError(f"{hub_id}: folder: {reason}") from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # of three libraries; which, depends on the version of huggingface_hub
        raise CheckpointError(f"{hub_id}: folder: there is none, and the hub gave: {error}") from error
