from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdraft import ops, reference
from blockdraft.bench.subject import Case, Copies, Setting, Subject, nbytes, pick

EPS = 1e-5


class MoeRouter(Case):
    op = "moe_router"

    def __init__(self, setting: Setting, weights: Copies, plain: Copies, rows: int) -> None:
        s = setting.shapes
        self.weights, self.plain, self.depth = weights, plain, s.hidden_size + 3 * s.router_hidden_size
        self.x = setting.normal(rows, s.hidden_size)
        self.router_states = torch.randn(rows, s.router_hidden_size)
        self.cold_bytes = weights.bytes
        self.touched_bytes = weights.bytes + nbytes(self.x) + 2 * nbytes(self.router_states) + 8 * rows

    def arguments(self, turn: int) -> tuple[Any, ...]:
        return self.x, self.router_states, *self.weights[turn], EPS

    def torch_arguments(self, turn: int) -> tuple[Any, ...]:
        return self.x, self.router_states, *self.plain[turn]

    @staticmethod
    def pytorch(
        x: Tensor,
        router_states: Tensor,
        router_states_scale: Tensor,
        down_proj: Tensor,
        down_proj_bias: Tensor,
        norm_weight: Tensor,
        fc1: Tensor,
        fc1_bias: Tensor,
        fc2: Tensor,
        fc2_bias: Tensor,
        out_proj: Tensor,
        balancing_biases: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = F.linear(x, down_proj, down_proj_bias) + router_states * router_states_scale
        h = F.rms_norm(z.to(x.dtype), norm_weight.shape, norm_weight, EPS)
        h = F.gelu(F.linear(F.gelu(F.linear(h, fc1, fc1_bias)), fc2, fc2_bias))
        probs = F.linear(h, out_proj).float().softmax(-1)
        ids = (probs + balancing_biases).argmax(-1)
        return ids, probs.gather(1, ids[:, None])[:, 0], z

    def first(self) -> tuple[Any, ...]:
        return self.x[:1], self.router_states[:1], *self.weights[0], EPS

    def pairs(self, outputs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """The choice counts as wrong by what its score lacks to the best, so that equals may be resolved either way."""
        ids, weights, states = outputs
        probs, exact_states = self.exact()
        scores = probs + self.weights[0][-1].double()
        return [
            (pick(scores, ids), scores.max(-1).values),
            (weights, pick(probs, ids)),
            (states, exact_states),
        ]

    def exact(self) -> tuple[Tensor, Tensor]:
        """Probabilities ``[T, E + 1]`` and router states in float64.

        The reference gives the probability of one class, so each class is made to win once.
        """
        wide = [w if w.dim() > 1 else w.double() for w in self.weights[0]]
        columns = []
        for e in range(wide[-1].numel()):
            bias = torch.zeros_like(wide[-1])
            bias[e] = 10
            _, prob, states = reference.moe_router(self.x, self.router_states.double(), *wide[:-1], bias, eps=EPS)
            columns.append(prob)
        return torch.stack(columns, -1), states


def subjects(setting: Setting) -> Iterator[Subject]:
    s, R = setting.shapes, setting.shapes.router_hidden_size
    matrices = [
        setting.normal(outputs, inputs, scale=inputs**-0.5)
        for outputs, inputs in ((R, s.hidden_size), (R, R), (R, R), (s.experts + 1, R))
    ]
    scale, bias, norm, bias1, bias2 = (setting.normal(R) for _ in range(5))
    balancing = 0.01 * torch.randn(s.experts + 1)

    def order(down: Tensor, fc1: Tensor, fc2: Tensor, out: Tensor, vectors: list[Tensor]) -> tuple[Tensor, ...]:
        scale, bias, norm, bias1, bias2 = vectors
        return scale, down, bias, norm, fc1, bias1, fc2, bias2, out, balancing

    vectors = [scale, bias, norm, bias1, bias2]
    weights = setting.copies(*order(*map(ops.pack_weight, matrices), [v.float() for v in vectors]))
    plain = setting.copies(*order(*matrices, [scale.float(), *vectors[1:]]))
    yield Subject("moe_router", partial(MoeRouter, setting, weights, plain))
