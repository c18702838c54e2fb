"""Memory that packed weights lie in."""

from torch import Tensor

from blockdraft import _host


def new_stack(like: Tensor, count: int) -> Tensor:
    """Uninitialised ``[count, *like.shape]``, on the CPU in pages of 2 MB, as `ops.pack_weight` has them."""
    stack = like.new_empty(count, *like.shape)
    if stack.device.type == "cpu":
        _host.use_huge_pages(stack.data_ptr(), stack.nbytes)
    return stack
