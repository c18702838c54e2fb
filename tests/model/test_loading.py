"""How a model comes onto a device: tensor by tensor, without a copy of the whole on the host."""

import weakref

import torch
from torch import Tensor

from blockdraft.model.decoder import Decoder
from blockdraft.model.weights import Checkpoint
from checkpoints import random_model, save, tiny_config


def test_host_holds_one_module_at_a_time(tmp_path, monkeypatch):
    """On the meta device nothing that was read has a reason to stay, as on a GPU."""
    config, read, there = (
        tiny_config(num_hidden_layers=8, layer_types=("hybrid", "hybrid_sliding") * 4),
        Checkpoint.read,
        {},
    )
    most, sizes = 0, []

    def watched(self: Checkpoint, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        there[name] = weakref.ref(tensor)
        alive = [found.nbytes for ref in there.values() if (found := ref()) is not None]
        most = max(most, sum(alive))
        sizes.append(tensor.nbytes)
        return tensor

    folder = save(random_model(config), tmp_path / "model", torch.bfloat16)
    monkeypatch.setattr(Checkpoint, "read", watched)
    with Checkpoint(folder, config) as checkpoint:
        decoder = Decoder(config, checkpoint, torch.bfloat16, torch.device("meta"))
    assert {buffer.device.type for buffer in decoder.buffers()} == {"meta"}
    assert max(sizes) <= most <= 1.2 * max(sizes)
    assert sum(sizes) > 10 * max(sizes)
