"""The operators that `blockdraft bench` measures. Each module has `subjects(setting)`, which makes the weights."""

from collections.abc import Callable, Iterator

from blockdraft.bench.subject import Setting, Subject
from blockdraft.bench.subjects import (
    block_attention,
    cca_mix,
    choose_tokens,
    commit_states,
    lm_head_choose,
    moe_experts,
    moe_router,
    packed_linear,
    reject_drafts,
    residual_norm,
    verify_tokens,
)

SUBJECTS: dict[str, Callable[[Setting], Iterator[Subject]]] = {
    "residual_norm": residual_norm.subjects,
    "packed_linear": packed_linear.subjects,
    "cca_mix": cca_mix.subjects,
    "block_attention": block_attention.subjects,
    "moe_router": moe_router.subjects,
    "moe_experts": moe_experts.subjects,
    "lm_head_choose": lm_head_choose.subjects,
    "choose_tokens": choose_tokens.subjects,
    "reject_drafts": reject_drafts.subjects,
    "verify_tokens": verify_tokens.subjects,
    "commit_states": commit_states.subjects,
}
"""In the order in which a step calls them."""
