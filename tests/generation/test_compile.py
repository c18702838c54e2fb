"""torch.compile traces a decoder layer in one graph, and the graph computes the same bits."""

import pytest
import torch

from blockdraft.model.layers import LayerCache
from blockdraft.steps import Block, Group, make_step


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler
@pytest.mark.parametrize("layer", [0, 1])
def test_decoder_layer(tiny, layer):
    cache = tiny.new_cache(64, 1)
    sequence = cache.allocate(40)
    step = make_step([Block(0, sequence.slot, sequence.pages, [5, 6, 7], [Group(2, [4] * 4)])], cache.page_size)
    x = torch.randn(7, 64).to(tiny.dtype)
    residual = torch.randn(7, 64)
    states = None if layer == 0 else torch.randn(7, 24)

    def call(run):
        of_layer = (cache.k_pages[layer], cache.v_pages[layer], cache.conv_states[layer], cache.recurrent_states[layer])
        own = LayerCache(*(t.clone() for t in of_layer))
        return *run(x, residual, states, step, own), *own

    module = tiny.decoder.layers[layer]
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        for ours, eager in zip(call(compiled), call(module), strict=True):
            assert torch.equal(ours, eager)
