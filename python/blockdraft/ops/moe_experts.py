import torch
from torch import Tensor


def moe_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    intermediate_size: int,
    skip_identity: bool = False,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
) -> Tensor:
    """Each row through its expert: ``weight * down_proj[id] (silu(gate) * up)``, ``[gate; up] = gate_up_proj[id] x``.

    Rows are grouped by expert; each touched expert's weights are read once. A row with id E is skipped: it gives 0, or
    ``weight * x`` with skip_identity, and touches no weights. float32 sums; ``silu(gate) * up`` is rounded to the dtype
    of x. A weight of one byte is its value times the scale of its row: exact in bfloat16, it meets x in registers, and
    the sum is multiplied by the scale. A weight of MXFP4 is its value times the scale of its block, exact in bfloat16,
    too: the result has the bits of weights of bfloat16 with these values.

    Args:
        x: ``[T, H]``, float32 or bfloat16.
        topk_ids: ``[T]``, int32, in [0, E]; E is skip. On a GPU an id out of range gives a row of NaN.
        topk_weights: ``[T]``, float32.
        gate_up_proj: ``pack_weight(.., halves=2)`` of ``[E, 2 * I, H]``, gate rows first, in the dtype of x; int8 from
            -127 to 127 (-128 may count as 0); float8_e4m3fn, of which NaN may
            count as 480; or uint8, MXFP4, with H and I multiples of 32.
        down_proj: ``pack_weight`` of ``[E, H, I]`` in the dtype of gate_up_proj.
        intermediate_size: I.
        skip_identity: What a skipped row gives.
        gate_up_scales: ``[E, 2 * I]``, float32, with weights of int8 and float8_e4m3fn; with uint8
            ``pack_scales(.., halves=2)`` of ``[E, 2 * I, H / 32]``, uint8 from 2 to 252, n for 2^(n - 127); else None.
        down_scales: ``[E, H]``, likewise; ``pack_scales`` of ``[E, H, I / 32]``.

    Returns:
        ``[T, H]`` in the dtype of x.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype, layout or device, or (on the CPU) an id is out of range.
    """
    return torch.ops.blockdraft.moe_experts(
        x,
        topk_ids,
        topk_weights,
        gate_up_proj,
        down_proj,
        intermediate_size,
        skip_identity,
        gate_up_scales,
        down_scales,
    )


@torch.library.register_fake("blockdraft::moe_experts")
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)
