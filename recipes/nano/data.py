"""Text of the nano model: the Python standard library's sources (PSF licence), split by package."""

import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

# <mask> has the id it has in Gemma's vocabulary, 4, which ZAYA1 uses.
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
PAD, EOS, BOS, UNK, MASK = range(5)
# Whole packages and their tests; no file of these is seen in training.
HELD_OUT = ("json", "http", "tomllib", "wsgiref", "concurrent", "zoneinfo", "xmlrpc", "sched", "textwrap", "fractions")
TABLES = ("encodings", "pydoc_data", "__phello__", "site-packages", "dist-packages", "__pycache__")


def is_held_out(path: Path) -> bool:
    """True for a held-out package and for its tests (test_json, test/test_httpservers.py, ...)."""
    return any(part.removeprefix("test_").removesuffix(".py").startswith(HELD_OUT) for part in path.parts)


@functools.cache
def files() -> list[tuple[Path, str]]:
    return list(_files())


def _files() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not any(part in TABLES or part.startswith("config-") for part in relative.parts):
            text = path.read_bytes().decode("utf-8", "ignore")
            if len(text) > 200 and max(map(len, text.splitlines())) < 400:
                yield relative, text


def split(max_bytes: int | None = None) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
    """Training and held-out files; duplicates by content are dropped.

    max_bytes: About so much for training and a tenth of it held out, taken file by file from all over the library.
    """
    seen: set[str] = set()
    train, held_out = [], []
    for path, text in files():
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            (held_out if is_held_out(path) else train).append((path, text))
    if max_bytes is None:
        return train, held_out
    return _some(train, max_bytes), _some(held_out, max_bytes // 10)


def _some(files: list[tuple[Path, str]], max_bytes: int) -> list[tuple[Path, str]]:
    chosen, size = [], 0
    for path, text in sorted(files, key=lambda file: hashlib.sha256(str(file[0]).encode()).digest()):
        if size < max_bytes and len(text) < max_bytes // 4:
            chosen.append((path, text))
            size += len(text)
    return chosen


def manifest(train: list[tuple[Path, str]], held_out: list[tuple[Path, str]]) -> dict:
    """What the weights were made of: every file with its hash and part."""

    def entries(files: list[tuple[Path, str]]) -> dict[str, str]:
        return {str(path): hashlib.sha256(text.encode()).hexdigest() for path, text in files}

    return {
        "source": f"standard library of CPython {sys.version.split()[0]}",
        "licence": "PSF-2.0",
        "bytes": {name: sum(len(text.encode()) for _, text in part) for name, part in
                  (("train", train), ("held_out", held_out))},
        "train": entries(train),
        "held_out": entries(held_out),
    }  # fmt: skip


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], folder: Path) -> Tensor:
    """One int16 stream ``<bos> file <eos> <bos> file <eos> ...``, kept in the folder: 27 MB take two minutes."""
    key = hashlib.sha256("\0".join([tokenizer.to_str(), *texts]).encode("utf-8", "ignore")).hexdigest()[:16]
    path = folder / f"stream_{key}.pt"
    if not path.exists():
        torch.save(_encode(tokenizer, texts), path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    return torch.load(path)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    stream: list[int] = []
    for text in tqdm(texts, "encoding", mininterval=5):
        stream += [*tokenizer.encode(text).ids, EOS]
    return torch.tensor(stream, dtype=torch.int16)
