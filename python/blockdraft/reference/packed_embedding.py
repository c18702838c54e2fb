from torch import Tensor

from blockdraft.reference.pack_weight import unpack_weight


def packed_embedding(token_ids: Tensor, packed_weight: Tensor, num_embeddings: int, embedding_dim: int) -> Tensor:
    """`blockdraft.ops.packed_embedding`."""
    return unpack_weight(packed_weight, num_embeddings, embedding_dim)[token_ids.long()]  # [T, H]
