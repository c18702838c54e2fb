#!/usr/bin/env python3
"""Calls every operator that has a GPU kernel a few times, small, for compute-sanitizer to watch.

Inputs are made on the CPU, so that no kernels but ours run.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from blockdraft import ops
from blockdraft.bench.gpu import DEVICE, has_kernel
from blockdraft.bench.subject import TINY, Setting
from blockdraft.bench.subjects import SUBJECTS

ROWS = (1, 17, 40)


def on_device(arguments: Any) -> Any:
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, arguments)


def call(name: str, setting: Setting) -> None:
    for subject in SUBJECTS[name](setting):
        for rows in ROWS:
            case = subject.case(rows)
            getattr(ops, case.op)(*on_device(case.arguments(0)))


def main() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        setting = Setting(TINY, dtype, cold_bytes=1, most_rows=max(ROWS))
        for name in SUBJECTS:
            if has_kernel(name):
                call(name, setting)
                torch.cuda.synchronize()
            print(name, dtype, "called" if has_kernel(name) else "has no GPU kernel", flush=True)
        if has_kernel("pack_weight"):
            ops.pack_weight(torch.randn(70, 33).to(DEVICE, dtype), halves=2)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
