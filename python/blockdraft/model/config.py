from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ZayaConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    moe_intermediate_size: int
    router_hidden_size: int
    layer_types: tuple
    rope_parameters: dict
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    bos_token_id: int | None = 2
    eos_token_ids: tuple = ()
    pad_token_id: int | None = 0
    mask_token_id: int | None = None
    block_length: int = 16
