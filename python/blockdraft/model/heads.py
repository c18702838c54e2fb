"""The output matrices: of the AR rows, and of the drafts where a checkpoint has one of their own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockdraft.model.config import ZayaConfig
from blockdraft.model.layers import PackedLinear
from blockdraft.model.tensor_names import MARKOV_IN, MARKOV_OUT, OUTPUT
from blockdraft.model.weights import Checkpoint

if TYPE_CHECKING:
    from blockdraft.decide import Ask

MARKOV_PERIOD = 16  # positions after which a Markov head forgets the token before


class Heads:
    """Logits of target rows and of draft rows.

    Args:
        target: The tied LM head ``[V, H]``.
        draft: A separate output matrix of the drafts ``[V, H]``, or None.
        markov: A low-rank bias by the previous token, ``(w1 [V, R], w2 [R, V])`` as embedding and packed matrix
            ``[V, R]``, or None: draft logits are h W_d^T + w1[previous] w2. The previous token counts as id 0 at
            positions that are multiples of 16.
    """

    def __init__(
        self,
        target: PackedLinear,
        draft: PackedLinear | None = None,
        markov: tuple[Tensor, PackedLinear] | None = None,
    ) -> None:
        self.target, self.draft, self.markov = target, draft, markov

    @classmethod
    def read(
        cls, config: ZayaConfig, checkpoint: Checkpoint, target: PackedLinear, dtype: torch.dtype, device: torch.device
    ) -> "Heads":
        """By the config's draft_head: "shared", "separate", or "markov", which has both matrices of its own."""
        if config.draft_head == "shared":
            return cls(target)

        def matrix(name: str) -> Tensor:
            return checkpoint.read(name).to(device, dtype)

        draft = PackedLinear(matrix(OUTPUT))
        if config.draft_head == "separate":
            return cls(target, draft)
        return cls(target, draft, (matrix(MARKOV_IN), PackedLinear(matrix(MARKOV_OUT).T.contiguous())))

    @property
    def is_separate(self) -> bool:
        return self.draft is not None or self.markov is not None

    def target_logits(self, states: Tensor) -> Tensor:
        return self.target(states, out_float32=True)

    def base_draft_logits(self, states: Tensor) -> Tensor:
        return (self.draft or self.target)(states, out_float32=True)

    def add_markov(self, logits: Tensor, previous: Sequence[int], positions: Sequence[int]) -> Tensor:
        if self.markov is None:
            return logits
        w1, w2 = self.markov
        ids = [0 if at % MARKOV_PERIOD == 0 else token for token, at in zip(previous, positions, strict=True)]
        return logits + w2(w1[torch.tensor(ids, device=logits.device)], out_float32=True)

    def draft_logits(self, states: Tensor, ask: "Ask") -> Tensor:
        """Of rows that drew the ask's drafts, in order: the token before each is known by now."""
        logits = self.base_draft_logits(states)
        if self.markov is None:
            return logits
        n = len(states)
        previous = [ask.sample.last, *ask.drafts][:n]
        previous += [0] * (n - len(previous))
        return self.add_markov(logits, previous, range(ask.position, ask.position + n))
