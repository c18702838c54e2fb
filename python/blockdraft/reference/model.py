"""The whole model in plain PyTorch, with autograd: what the training recipes use and the tests compare with.

Parameter names are the checkpoint's own (native 40-layer layout), so `state_dict()` is a checkpoint.
Rows are parent-indexed like the operators' rows: one forward serves causal text and the doubled sequence of the TiDAR
objective. There is no cache; nothing here is fast.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockdraft.errors import RequestError
from blockdraft.model.config import ZayaConfig


@dataclass(frozen=True)
class Rows:
    """How the rows of a forward hang together; the same for every sequence of the batch.

    Attributes:
        parents: ``[N]`` int64, the row of the preceding token, -1 at the start of a sequence.
        positions: ``[N]`` int64, absolute positions (RoPE).
        visible: ``[N, N]`` bool, whether row i attends to row j. None means causal in row order.
        first_mask: From this row on they are mask rows, which alone feel an adapter (`blockdraft.convert`) and use the
            draft head. None where all rows are clean.
    """

    parents: Tensor
    positions: Tensor
    visible: Tensor | None = None
    first_mask: int | None = None

    @staticmethod
    def causal(length: int, device: torch.device | str = "cpu") -> "Rows":
        positions = torch.arange(length, device=device)
        return Rows(positions - 1, positions)


class Linear(nn.Linear):
    """`adapter`, where there is one, adds to the mask rows of ``x [B, N, inputs]`` alone."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor, first_mask: int | None = None) -> Tensor:
        y = super().forward(x)
        if self.adapter is None or first_mask is None:
            return y
        return torch.cat([y[:, :first_mask], y[:, first_mask:] + self.adapter(x[:, first_mask:])], 1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class ResidualScaling(nn.Module):
    """``(x + hb) * hs + (r + rb) * rs``: biases before the scales."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.hidden_states_scale = nn.Parameter(torch.ones(size))
        self.hidden_states_bias = nn.Parameter(torch.zeros(size))
        self.residual_scale = nn.Parameter(torch.ones(size))
        self.residual_bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        merged = (x + self.hidden_states_bias) * self.hidden_states_scale
        return merged.float() + (residual + self.residual_bias) * self.residual_scale


class QKNorm(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.temp = nn.Parameter(torch.ones(heads))


class CCAProjection(nn.Module):
    """q, k, v of compressed convolutional attention before the L2 norm."""

    def __init__(self, config: ZayaConfig) -> None:
        super().__init__()
        c = config
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        channels = (self.heads + self.kv_heads) * c.head_dim
        self.q_proj = Linear(c.hidden_size, self.heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * c.head_dim)
        self.v_proj_current = Linear(c.hidden_size, self.kv_heads * c.head_dim // 2)
        self.v_proj_delayed = Linear(c.hidden_size, self.kv_heads * c.head_dim // 2)
        self.conv_qk_depthwise = nn.Conv1d(channels, channels, 2, groups=channels)
        self.conv_qk_grouped = nn.Conv1d(channels, channels, 2, groups=self.heads + self.kv_heads)

    def convolve(self, u: Tensor, parents: Tensor) -> Tensor:
        """u ``[B, N, C]``; before a sequence u is 0, so its first convolution there is the bias alone."""
        B, N, C = u.shape
        w0, b0 = self.conv_qk_depthwise.weight[:, 0].T.contiguous(), self.conv_qk_depthwise.bias  # [2, C], [C]
        w1 = self.conv_qk_grouped.weight.view(-1, self.head_dim, self.head_dim, 2)  # [heads, out, in, tap]
        index = parents % (N + 1)  # -1 becomes the row appended below
        m = w0[0] * F.pad(u, (0, 0, 0, 1)).index_select(1, index) + w0[1] * u + b0  # [B, N, C]
        older = torch.cat([m, b0.expand(B, 1, C)], 1).index_select(1, index)  # [B, N, C]
        pair = torch.cat([older.view(B, N, -1, self.head_dim), m.view(B, N, -1, self.head_dim)], -1)
        weight = w1.permute(0, 3, 2, 1).reshape(w1.shape[0], 2 * self.head_dim, self.head_dim)  # [heads, tap*in, out]
        y = torch.einsum("bngi,gio->bngo", pair, weight)
        return y.reshape(B, N, C) + self.conv_qk_grouped.bias

    def forward(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        B, N, _ = x.shape
        D, G, first_mask = self.head_dim, self.heads // self.kv_heads, rows.first_mask
        q, k = self.q_proj(x, first_mask), self.k_proj(x, first_mask)
        y = self.convolve(torch.cat([q, k], -1), rows.parents)
        mean_q = 0.5 * (q.view(B, N, -1, G, D) + k.view(B, N, -1, 1, D))  # [B, N, Hkv, G, D]
        Q = y[..., : q.shape[-1]].view(B, N, -1, D) + mean_q.flatten(2, 3)
        K = y[..., q.shape[-1] :].view(B, N, -1, D) + mean_q.mean(3)
        older = F.pad(self.v_proj_delayed(x, first_mask), (0, 0, 0, 1)).index_select(1, rows.parents % (N + 1))
        V = torch.cat([self.v_proj_current(x, first_mask), older], -1).view(B, N, -1, D)
        return Q, K, V


class Attention(nn.Module):
    def __init__(self, config: ZayaConfig, layer: int) -> None:
        super().__init__()
        self.qkv_proj = CCAProjection(config)
        self.qk_norm = QKNorm(config.num_key_value_heads)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        rope = config.rope_parameters[config.layer_types[layer]]
        self.window = config.sliding_window if config.layer_types[layer] == "hybrid_sliding" else None
        rotary = int(config.head_dim * rope["partial_rotary_factor"])
        inverse = rope["rope_theta"] ** (-torch.arange(0, rotary, 2, device="cpu").double() / rotary)  # not meta
        self.frequencies = nn.Buffer(inverse.float(), persistent=False)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x ``[B, N, heads, D]``: pairs (i, i + rotary / 2); the rest of the head passes through."""
        half = self.frequencies.numel()
        angle = positions[:, None].float() * self.frequencies.float()  # [N, half]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        low, high, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        Q, K, V = self.qkv_proj(x, rows)
        D = Q.shape[-1]
        K = F.normalize(K.float(), dim=-1, eps=1e-6) * (D**0.5 * self.qk_norm.temp[:, None])
        Q = F.normalize(Q.float(), dim=-1, eps=1e-6) * D**0.5
        Q, K = self.rotate(Q, rows.positions), self.rotate(K, rows.positions)
        visible = rows.visible
        if self.window is not None:
            distance = rows.positions[:, None] - rows.positions
            causal = torch.ones_like(distance, dtype=torch.bool).tril() if visible is None else visible
            visible = causal & (distance < self.window)
        heads = (Q.to(x.dtype).transpose(1, 2), K.to(x.dtype).transpose(1, 2), V.transpose(1, 2))
        out = F.scaled_dot_product_attention(*heads, attn_mask=visible, is_causal=visible is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2), rows.first_mask)


class RouterMLP(nn.Module):
    def __init__(self, size: int, classes: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(size, eps)
        self.fc1 = Linear(size, size, bias=True)
        self.fc2 = Linear(size, size, bias=True)
        self.out_proj = Linear(size, classes)

    def forward(self, z: Tensor) -> Tensor:
        return self.out_proj(F.gelu(self.fc2(F.gelu(self.fc1(self.norm(z))))))


class Router(nn.Module):
    def __init__(self, config: ZayaConfig, layer: int) -> None:
        super().__init__()
        size, classes = config.router_hidden_size, config.num_experts + 1
        self.down_proj = Linear(config.hidden_size, size, bias=True)
        self.router_mlp = RouterMLP(size, classes, config.rms_norm_eps)
        if layer > 0:
            self.router_states_scale = nn.Parameter(torch.ones(size))
        self.balancing_biases = nn.Buffer(torch.zeros(classes))

    def forward(self, x: Tensor, router_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the chosen class ``[rows]`` (E is skip), its probability and the state for the next layer."""
        z = self.down_proj(x)
        if router_states is not None:
            z = z + router_states * self.router_states_scale
        probs = self.router_mlp(z).float().softmax(-1)
        chosen = (probs + self.balancing_biases).argmax(-1)
        return chosen, probs.gather(-1, chosen[..., None])[..., 0], z


class Experts(nn.Module):
    def __init__(self, config: ZayaConfig) -> None:
        super().__init__()
        E, H, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, inner))

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """x ``[rows, H]``; a skipped row gives 0."""
        E = self.gate_up_proj.shape[0]
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=E + 1).tolist()
        parts = []
        for e, part in enumerate(x.index_select(0, order).split(counts)):
            if e == E:
                parts.append(torch.zeros_like(part))
            elif len(part):
                gate, up = F.linear(part, self.gate_up_proj[e]).chunk(2, -1)
                parts.append(F.linear(F.silu(gate) * up, self.down_proj[e]))
        return torch.cat(parts).index_select(0, order.argsort()) * weight[:, None].to(x.dtype)


class MoE(nn.Module):
    def __init__(self, config: ZayaConfig, layer: int) -> None:
        super().__init__()
        self.gate = Router(config, layer)
        self.experts = Experts(config)

    def forward(self, x: Tensor, router_states: Tensor | None, first_mask: int | None = None) -> tuple[Tensor, Tensor]:
        """Mask rows go to the experts apart: how many there are must not change a clean row's bits."""
        chosen, weight, router_states = self.gate(x, router_states)
        self.chosen = chosen.detach()  # for load balancing and statistics
        sizes = [x.shape[1]] if first_mask is None else [first_mask, x.shape[1] - first_mask]
        parts = zip(x.split(sizes, 1), chosen.split(sizes, 1), weight.split(sizes, 1), strict=True)
        out = [self.experts(p.flatten(0, 1), c.flatten(), w.flatten()).view_as(p) for p, c, w in parts]
        return torch.cat(out, 1), router_states


class DecoderLayer(nn.Module):
    def __init__(self, config: ZayaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_residual_scale = ResidualScaling(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, layer)
        self.post_mlp_residual_scale = ResidualScaling(config.hidden_size)

    def forward(self, residual: Tensor, router_states: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        dtype = self.input_layernorm.weight.dtype
        x = self.self_attn(self.input_layernorm(residual.to(dtype)), rows)
        residual = self.post_attention_residual_scale(x, residual)
        x, router_states = self.mlp(self.post_attention_layernorm(residual.to(dtype)), router_states, rows.first_mask)
        return self.post_mlp_residual_scale(x, residual), router_states


class Model(nn.Module):
    def __init__(self, config: ZayaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.input_hidden_states_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.input_hidden_states_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, rows: Rows) -> Tensor:
        embedded = self.embed_tokens(input_ids)
        residual = ((embedded + self.input_hidden_states_bias) * self.input_hidden_states_scale).float()
        router_states = None
        for layer in self.layers:
            residual, router_states = layer(residual, router_states, rows)
        return self.norm(residual.to(embedded.dtype))


class MarkovHead(nn.Module):
    """A bias of the logits by the token before: ``w1[previous] @ w2``, w1 ``[V, rank]``, w2 ``[rank, V]``."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(vocab_size, rank))
        self.w2 = nn.Parameter(torch.empty(rank, vocab_size))

    def forward(self, previous: Tensor) -> Tensor:
        return F.embedding(previous, self.w1) @ self.w2


class ZayaReference(nn.Module):
    """ZAYA1 in plain PyTorch.

    Args:
        config: A `blockdraft.ZayaConfig`. By its `draft_head` mask rows have an output matrix of their own.
    """

    def __init__(self, config: ZayaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)
        if config.draft_head != "shared":
            self.diffusion_output_layer = Linear(config.hidden_size, config.vocab_size)
        if config.draft_head == "markov":
            self.diffusion_markov_head = MarkovHead(config.vocab_size, config.markov_rank)

    def forward(self, input_ids: Tensor, rows: Rows | None = None, previous: Tensor | None = None) -> Tensor:
        """Logits ``[B, N, V]`` in float32 for ``input_ids [B, N]``.

        Args:
            input_ids: Of all rows.
            rows: How these hang together; default: causal.
            previous: ``[B, N - first_mask]``, the token before the one that each mask row predicts, which a Markov head
                goes by (`convert.Batch.previous`).

        Raises:
            RequestError: There are mask rows and a Markov head, but no `previous`.
        """
        rows = rows or Rows.causal(input_ids.shape[1], input_ids.device)
        hidden_states, embedding = self.model(input_ids, rows), self.model.embed_tokens.weight
        if self.config.draft_head == "shared" or rows.first_mask is None:
            return F.linear(hidden_states, embedding).float()
        clean, masks = hidden_states[:, : rows.first_mask], hidden_states[:, rows.first_mask :]
        return torch.cat([F.linear(clean, embedding), self._draft_logits(masks, previous)], 1).float()

    def _draft_logits(self, hidden_states: Tensor, previous: Tensor | None) -> Tensor:
        logits = self.diffusion_output_layer(hidden_states)
        if self.config.draft_head == "separate":
            return logits
        if previous is None:
            raise RequestError("a Markov head needs previous, the token before each that a mask row predicts, got None")
        return logits + self.diffusion_markov_head(previous)
