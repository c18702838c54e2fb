import torch
from torch import Tensor


def packed_embedding(token_ids: Tensor, packed_weight: Tensor, num_embeddings: int, embedding_dim: int) -> Tensor:
    """Rows of a packed matrix, so that a tied embedding and LM head are one copy of the weights.

    Args:
        token_ids: ``[T]``, int32, in [0, num_embeddings).
        packed_weight: ``pack_weight`` of ``[num_embeddings, embedding_dim]``, float32 or bfloat16.
        num_embeddings: V.
        embedding_dim: H.

    Returns:
        ``[T, H]`` in the dtype of packed_weight; on a GPU, zeros for an id that is out of range.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype or layout, or (on the CPU) an id is out of range.
    """
    return torch.ops.blockdraft.packed_embedding(token_ids, packed_weight, num_embeddings, embedding_dim)


@torch.library.register_fake("blockdraft::packed_embedding")
def _(token_ids: Tensor, packed_weight: Tensor, num_embeddings: int, embedding_dim: int) -> Tensor:
    return packed_weight.new_empty([token_ids.shape[0], embedding_dim])
