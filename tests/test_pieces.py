import pytest
import torch

from blockdraft import pieces

DTYPES = (torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.uint8)


@pytest.mark.parametrize("sizes", [(1,), (0, 3), (17, 1, 64, 5), (16, 16, 0)], ids=str)
def test_tensors_come_out_of_a_piece_as_they_went_in(sizes):
    tensors = [torch.randint(99, (n, 3)).to(dtype) for n in sizes for dtype in DTYPES]
    piece = pieces.packed(tensors)
    found = pieces.views(piece, pieces.parts_of(tensors))
    for x, y in zip(tensors, found, strict=True):
        assert y.dtype == x.dtype
        assert torch.equal(x, y)
        assert y.numel() == 0 or (y.data_ptr() - piece.data_ptr()) % pieces.ALIGNMENT == 0
        assert y.is_contiguous()


def test_one_copy_to_a_device():
    tensors = [torch.ones(3), torch.ones(2, 2, dtype=torch.int64)]
    there = pieces.moved(tensors, torch.device("meta"))
    assert len({x.untyped_storage()._cdata for x in there}) == 1
    assert pieces.parts_of(there) == pieces.parts_of(tensors)
    here = pieces.moved(tensors, torch.device("cpu"))
    assert all(x is y for x, y in zip(here, tensors, strict=True))
