"""Every operator in plain PyTorch: the definition that the tests and benchmarks hold the kernels to."""

from blockdraft.reference.block_attention import block_attention
from blockdraft.reference.cca_mix import cca_mix
from blockdraft.reference.choose_tokens import choose_tokens
from blockdraft.reference.commit_states import commit_states
from blockdraft.reference.decoder_forward import decoder_forward
from blockdraft.reference.lm_head_choose import lm_head_choose
from blockdraft.reference.moe_experts import moe_experts
from blockdraft.reference.moe_router import moe_router
from blockdraft.reference.pack_weight import pack_weight
from blockdraft.reference.packed_embedding import packed_embedding
from blockdraft.reference.packed_linear import packed_linear
from blockdraft.reference.reject_drafts import reject_drafts
from blockdraft.reference.residual_norm import residual_norm
from blockdraft.reference.verify_tokens import verify_tokens

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
