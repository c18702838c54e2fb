"""Pages of keys and values, and the CCA state of each sequence: what decoding remembers.

A step is one transaction: `Cache.begin` gives it, the layers write into it, `commit` moves every sequence forward by
the rows it keeps, `rollback` (or committing 0 rows) leaves it as it was. Keys of rows that are not committed stay in
their slots and are never seen, because visibility ends at the sequence's length; the convolutions' state changes at
commit only.
"""

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blockdraft import ops
from blockdraft.errors import RequestError
from blockdraft.model.config import ZayaConfig
from blockdraft.steps import EMPTY_SLOT, Step

TILE = 32  # keys of a tile in a page: csrc/cpu/panel.h


@dataclass(eq=False)
class CachedSequence:
    """A sequence's place in the cache."""

    slot: int
    pages: list[int]
    length: int = 0  # committed tokens


@dataclass
class Cache:
    """Room for `num_pages` pages of `page_size` tokens and for `slots` sequences.

    Attributes:
        k_pages: ``[L, N, Hkv, page_size / 32, 32 * D]``; v_pages alike with D rounded up to 32 (`ops.cca_mix`).
        conv_states: ``[L, S, 2, C]``; recurrent_states: ``[L, S, Hkv * D / 2]``. S is one more than `slots`: slot 0 has
            the state before any token and is nobody's.
    """

    config: ZayaConfig
    num_pages: int
    slots: int
    dtype: torch.dtype
    device: torch.device
    page_size: int = TILE
    free_pages: list[int] = field(init=False)
    free_slots: list[int] = field(init=False)

    def __post_init__(self) -> None:
        c, L = self.config, self.config.num_hidden_layers
        tiles, D = (L, self.num_pages, c.num_key_value_heads, self.page_size // TILE), c.head_dim
        self.k_pages = self._zeros(*tiles, TILE * D)
        self.v_pages = self._zeros(*tiles, TILE * (-(-D // TILE) * TILE))
        self.conv_states = self._zeros(L, self.slots + 1, 2, c.conv_channels)
        self.recurrent_states = self._zeros(L, self.slots + 1, c.num_key_value_heads * D // 2)
        self.free_pages = list(range(self.num_pages))[::-1]
        self.free_slots = list(range(EMPTY_SLOT + 1, self.slots + 1))[::-1]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @staticmethod
    def token_bytes(config: ZayaConfig, dtype: torch.dtype) -> int:
        """Bytes of keys and values per token."""
        D = config.head_dim + -(-config.head_dim // TILE) * TILE
        return config.num_hidden_layers * config.num_key_value_heads * D * dtype.itemsize

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def can_allocate(self, tokens: int) -> bool:
        return bool(self.free_slots) and self.pages_for(tokens) <= len(self.free_pages)

    def allocate(self, tokens: int) -> CachedSequence:
        """Reserves room for a sequence of at most `tokens` tokens, with the state of an empty one."""
        if not self.can_allocate(tokens):
            raise RequestError(f"cache: no room for {tokens} tokens in {len(self.free_pages)} free pages")
        slot = self.free_slots.pop()
        self.conv_states[:, slot] = 0
        self.recurrent_states[:, slot] = 0
        return CachedSequence(slot, [self.free_pages.pop() for _ in range(self.pages_for(tokens))])

    def release(self, sequence: CachedSequence) -> None:
        """Returns a sequence's room; it must not be used again."""
        self.free_pages += sequence.pages
        self.free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], -1

    def begin(self, step: Step, sequences: Sequences[CachedSequence]) -> "Transaction":
        return Transaction(self, step, sequences)


class Transaction:
    """One step over some sequences of a cache, in the order of the step."""

    def __init__(self, cache: Cache, step: Step, sequences: Sequences[CachedSequence]) -> None:
        self.cache, self.step, self.sequences = cache, step, sequences
        self.projections: Tensor | None = None  # [L, T, C + Hkv * D]: the inputs of the convolutions

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.k_pages[layer], self.cache.v_pages[layer]

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.conv_states[layer], self.cache.recurrent_states[layer]

    def commit(self, committed: list[int], commit_rows: Tensor) -> None:
        """Moves sequence b forward by ``committed[b]`` rows, the last of which is ``commit_rows[b]``."""
        self.commit_states(commit_rows)
        for sequence, count in zip(self.sequences, committed, strict=True):
            sequence.length += count

    def commit_states(self, commit_rows: Tensor) -> None:
        """The device's part of `commit`."""
        cache, step = self.cache, self.step
        ops.commit_states(
            self.projections, step.row_parents, commit_rows, step.state_slots, cache.conv_states, cache.recurrent_states
        )
        self.projections = None

    def rollback(self) -> None:
        """Leaves every sequence as it was before the step."""
        self.projections = None
