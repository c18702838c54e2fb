import torch
from torch import Tensor

from blockdraft.reference.pack_weight import unpack_weight
from blockdraft.reference.pages import write_keys


def cca_mix(
    qkv: Tensor,
    row_parents: Tensor,
    row_positions: Tensor,
    row_states: Tensor,
    row_slots: Tensor,
    conv_states: Tensor,
    recurrent_states: Tensor,
    conv_qk_depthwise: Tensor,
    conv_depthwise_bias: Tensor,
    conv_qk_grouped: Tensor,
    conv_grouped_bias: Tensor,
    temp: Tensor,
    inverse_frequencies: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`blockdraft.ops.cca_mix`; float32 between storage, float64 for float64 arguments."""
    T, (heads, _, D, _), Hkv = qkv.shape[0], conv_qk_grouped.shape, temp.shape[0]
    Hq, C, half = heads - Hkv, heads * D, Hkv * D // 2
    wide = temp.dtype
    parents, states = row_parents.long(), row_states.long()
    first = (parents < 0)[:, None]

    def of_parent(rows: Tensor, committed: Tensor) -> Tensor:
        return torch.where(first, committed, rows[parents])

    u = qkv[:, :C].to(wide)  # [T, C]
    older, newer = conv_states[states].to(wide).unbind(1)  # [T, C] each
    u1 = of_parent(u, newer)
    u2 = of_parent(u1, older)
    w0, b0 = conv_qk_depthwise, conv_depthwise_bias
    m1 = w0[0] * u2 + w0[1] * u1 + b0  # of the parent
    m0 = w0[0] * u1 + w0[1] * u + b0  # of the row
    w1 = unpack_weight(conv_qk_grouped, D, 2 * D).to(wide)  # [heads, D out, 2 * D]
    pair = torch.cat([m1.view(T, heads, D), m0.view(T, heads, D)], -1)  # [T, heads, 2 * D]
    y = torch.einsum("tgi,goi->tgo", pair, w1) + conv_grouped_bias.view(heads, D)

    q, k = u[:, : Hq * D].view(T, Hkv, Hq // Hkv, D), u[:, Hq * D :].view(T, Hkv, 1, D)
    mean_q = 0.5 * (q + k)  # [T, Hkv, G, D]
    Q = y[:, :Hq] + mean_q.reshape(T, Hq, D)
    K = y[:, Hq:] + mean_q.mean(2)
    root = D**0.5
    Q = Q * root / Q.norm(dim=-1, keepdim=True).clamp_min(1.1920929e-7)
    K = K * root / K.norm(dim=-1, keepdim=True).clamp_min(1.1920929e-7) * temp[:, None]
    Q, K = (rotate(x, row_positions, inverse_frequencies).to(qkv.dtype) for x in (Q, K))

    delayed = of_parent(qkv[:, C + half :], recurrent_states[states])
    V = torch.cat([qkv[:, C : C + half], delayed], -1).view(T, Hkv, D)
    write_keys(k_pages, v_pages, K, V, row_slots)
    return Q, K, V


def rotate(x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotary embedding of pairs (i, i + rotary / 2) of ``x [T, heads, D]``; the angle is a float32 product."""
    half = inverse_frequencies.numel()
    angle = (positions[:, None].float() * inverse_frequencies.float()).to(x.dtype)[:, None]  # [T, 1, rotary / 2]
    low, high, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin(), rest], -1)
