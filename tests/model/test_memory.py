from pathlib import Path

import pytest
import torch

from blockdraft.model.memory import new_stack

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of(address: int) -> list[str]:
    """The kernel's flags of the mapping that an address lies in; "hg" is the wish for huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_new_stack(dtype):
    like = torch.ones(3, 5, dtype=dtype)
    stack = new_stack(like, 4)
    assert (stack.shape, stack.dtype, stack.is_contiguous()) == ((4, 3, 5), dtype, True)
    assert new_stack(like, 0).shape == (0, 3, 5)


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this kernel has no transparent huge pages")
def test_large_stacks_ask_for_huge_pages():
    like = torch.ones(1 << 20)
    stack, plain = new_stack(like, 8), like.new_empty(8, 1 << 20)
    middle = stack.nbytes // 2
    assert "hg" in flags_of(stack.data_ptr() + middle)
    assert "hg" not in flags_of(plain.data_ptr() + middle)
