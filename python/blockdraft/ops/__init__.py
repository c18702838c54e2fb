"""The operators. Each has a module of its name here and in `blockdraft.reference`."""

from blockdraft.ops.block_attention import block_attention
from blockdraft.ops.cca_mix import cca_mix
from blockdraft.ops.choose_tokens import choose_tokens
from blockdraft.ops.commit_states import commit_states
from blockdraft.ops.decoder_forward import decoder_forward
from blockdraft.ops.lm_head_choose import lm_head_choose
from blockdraft.ops.moe_experts import moe_experts
from blockdraft.ops.moe_router import moe_router
from blockdraft.ops.pack_weight import pack_weight
from blockdraft.ops.packed_embedding import packed_embedding
from blockdraft.ops.packed_linear import packed_linear
from blockdraft.ops.reject_drafts import reject_drafts
from blockdraft.ops.residual_norm import residual_norm
from blockdraft.ops.verify_tokens import verify_tokens

__all__ = [
    "block_attention",
    "cca_mix",
    "choose_tokens",
    "commit_states",
    "decoder_forward",
    "lm_head_choose",
    "moe_experts",
    "moe_router",
    "pack_weight",
    "packed_embedding",
    "packed_linear",
    "reject_drafts",
    "residual_norm",
    "verify_tokens",
]
