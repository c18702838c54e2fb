"""The header of a safetensors file, checked before anything is loaded.

Stricter than the format where a model needs no more: no empty tensor, no high rank, no unknown field. The data of the
tensors must fill the file without a hole or an overlap, so that every byte of it belongs to exactly one tensor.
"""

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdraft.errors import CheckpointError
from blockdraft.model.files import UnusableFile, parse_json, read_bytes, shown

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 << 20  # the largest known header has 0.4 MB (2,483 tensors); the format allows 100 MB
MAX_TENSORS = 1 << 16
MAX_RANK = 4
MAX_BYTES = 1 << 48  # of one tensor
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
NAME_RULE = "a name has 1 to 200 letters, digits, '_' and '.'"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``nbytes`` bytes from ``offset``, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: io.FileIO, path: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of an open safetensors file.

    Raises:
        CheckpointError: The header or the size of the file breaks a rule of this module.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        length = _header_length(file, size)
        header = parse_json(read_bytes(file, LENGTH_BYTES, length))
    except UnusableFile as error:
        raise CheckpointError(f"{path}: header: {error}") from error
    data_start = LENGTH_BYTES + length
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in _entries(path, header).items()}
    _check_layout(path, tensors, data_start, size)
    return tensors


def _header_length(file: io.FileIO, size: int) -> int:
    if size < LENGTH_BYTES:
        raise UnusableFile(f"the file has {size} bytes, its length field alone needs {LENGTH_BYTES}")
    length = int.from_bytes(read_bytes(file, 0, LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise UnusableFile(f"length {length}, at most {MAX_HEADER_BYTES} are read")
    if length > size - LENGTH_BYTES:
        raise UnusableFile(f"length {length} in a file of {size} bytes; the file is truncated")
    return length


def _entries(path: Path, header: Any) -> dict[str, Any]:
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header: wanted an object, got {shown(header)}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__: wanted an object of strings, got {shown(metadata)}")
    if not 0 < len(header) <= MAX_TENSORS:
        raise CheckpointError(f"{path}: header: {len(header)} tensors, wanted 1 to {MAX_TENSORS}")
    return header


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    where = f"{path}: {name if TENSOR_NAME.fullmatch(name) else shown(name)}"
    if not TENSOR_NAME.fullmatch(name):
        raise CheckpointError(f"{where}: {NAME_RULE}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: wanted dtype, shape and data_offsets, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: dtype {shown(dtype)}, wanted one of {', '.join(ITEM_BYTES)}")
    nbytes = _bytes_of(where, shape, ITEM_BYTES[dtype])
    if not _are_integers(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)}, wanted a span of {nbytes} bytes")
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _bytes_of(where: str, shape: Any, nbytes: int) -> int:
    if not _are_integers(shape) or len(shape) > MAX_RANK or not all(0 < extent < MAX_BYTES for extent in shape):
        raise CheckpointError(f"{where}: shape {shown(shape)}, wanted at most {MAX_RANK} positive extents")
    for extent in shape:
        nbytes *= extent
    if nbytes > MAX_BYTES:
        raise CheckpointError(f"{where}: shape {shown(shape)} has more than {MAX_BYTES} bytes")
    return nbytes


def _are_integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)  # a bool is no integer here


def _check_layout(path: Path, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            fault = "an overlap" if tensor.offset < end else "a hole"
            raise CheckpointError(f"{path}: {name}: data at byte {tensor.offset}, wanted {end}: {fault}")
        end += tensor.nbytes
    if end != size:
        fault = "the file is truncated" if size < end else "bytes belong to no tensor"
        raise CheckpointError(f"{path}: data: the tensors end at byte {end}, the file at {size}: {fault}")
