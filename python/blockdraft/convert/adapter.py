"""Low-rank additions that only mask rows feel: drafts are learned, plain decoding keeps its bits."""

import torch
from torch import Tensor, nn

from blockdraft.errors import RequestError
from blockdraft.model.tensor_names import ADAPTED
from blockdraft.reference.model import Linear, ZayaReference


class LowRank(nn.Module):
    """``x @ down.T @ up.T`` with down ``[rank, inputs]``, up ``[outputs, rank]``; nothing at first, as up is 0."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T @ self.up.T


def add_adapters(model: ZayaReference, rank: int) -> list[nn.Parameter]:
    """Gives the attention projections of every layer an adapter and freezes everything else.

    Clean rows never meet an adapter and see no mask row, so whatever is learned, a forward of the same shape gives them
    the same bits.

    Args:
        model: Of `convert.load`.
        rank: At least 1.

    Returns:
        The parameters to train.

    Raises:
        RequestError: The rank is no positive integer, or the model has adapters already.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RequestError(f"add_adapters: rank must be a positive integer, got {rank!r}")
    model.requires_grad_(False)
    for name, module in adapted(model):
        if module.adapter is not None:
            raise RequestError(f"add_adapters: {name} has an adapter already")
        module.adapter = LowRank(module.in_features, module.out_features, rank).to(module.weight)
    return [p for _, module in adapted(model) for p in module.adapter.parameters()]


def adapted(model: ZayaReference) -> list[tuple[str, Linear]]:
    """The matrices that take an adapter, by name."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, Linear) and n.endswith(ADAPTED)]
