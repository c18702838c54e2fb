"""The gate itself: what it reads out of the compilers, and that it fails where it should. `make gpu-gates` runs it."""

import json
import struct
from pathlib import Path

import pytest

import gpu_gates

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 448 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z7helperv
    64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z1av
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 16 bytes cumulative stack size, 1024 bytes smem
"""

CUDA = {"registers": 40, "spills": 0, "shared": 32, "stack": 0}
AMD = {"vgpr": 24, "agpr": 0, "sgpr": 41, "spills": 0, "lds": 16, "scratch": 0}
KERNEL = {chip: dict(CUDA) for chip in gpu_gates.CUDA} | {chip: dict(AMD) for chip in gpu_gates.HIP}


def test_reads_what_ptxas_says():
    assert list(gpu_gates.ptxas_figures(PTXAS)) == [
        ("_Z1av", "sm_80", {"registers": 40, "spills": 0, "shared": 0, "stack": 0}),
        ("_Z1av", "sm_90a", {"registers": 168, "spills": 12, "shared": 1024, "stack": 16}),
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void blockdraft::gpu::(anonymous namespace)::x_kernel<float, 4>(blockdraft::XParams)", "x_kernel<float, 4>"),
        ("void blockdraft::gpu::_GLOBAL__N__f05e7f61_4_x_cu_644d7df1::x_kernel(int, float*)", "x_kernel"),
        ("void blockdraft::gpu::x_kernel<blockdraft::BFloat16, (blockdraft::Law)1>(int (*)(int))", None),
    ],
)
def test_short_names(name, short):
    assert gpu_gates.short_name(name) == (short or "x_kernel<BFloat16, (Law)1>")


def test_takes_one_chip_out_of_a_bundle(tmp_path, monkeypatch):
    targets, codes = [b"host-x86_64-unknown-linux-gnu-", b"hipv4-amdgcn-amd-amdhsa--gfx942"], [b"", b"code"]
    head = b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", 2)
    at = len(head) + sum(24 + len(target) for target in targets)
    for target, code in zip(targets, codes, strict=True):
        head += struct.pack("<QQQ", at, len(code), len(target)) + target
    monkeypatch.setattr(gpu_gates, "BUILD", tmp_path)
    path = gpu_gates.object_of("hip", "x")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF" + head + b"code")
    assert gpu_gates.code_object("x", "gfx942").read_bytes() == b"code"
    with pytest.raises(gpu_gates.GateError, match="x: _hip.so has no code for gfx950"):
        gpu_gates.code_object("x", "gfx950")


def changed(**changes):
    """The kernel with figures changed on the chips that have them."""
    return {chip: {name: changes.get(name, v) for name, v in figures.items()} for chip, figures in KERNEL.items()}


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, 0),
        ({"spills": 4}, 5),
        ({"scratch": 8}, 3),
        ({"lds": 65537}, 2),  # gfx950 has more
        ({"stack": 8}, 0),  # for the table to allow
    ],
)
def test_hard_rules(changes, faults):
    assert len(gpu_gates.hard_faults({"x": {"x_kernel": changed(**changes)}})) == faults


def test_operator_without_a_kernel_on_a_chip():
    assert gpu_gates.hard_faults({"x": {"x_kernel": {c: f for c, f in KERNEL.items() if c != "gfx950"}}}) == [
        "x: no kernel found for gfx950"
    ]


@pytest.mark.parametrize("name", ["registers", "stack", "vgpr", "sgpr", "lds"])
def test_table_holds_figures(name):
    table = {"x": {"x_kernel": changed(**{name: 50})}}
    assert gpu_gates.table_faults({"x": {"x_kernel": changed(**{name: 50})}}, table) == []
    assert gpu_gates.table_faults({"x": {"x_kernel": changed(**{name: 49})}}, table) == []
    faults = gpu_gates.table_faults({"x": {"x_kernel": changed(**{name: 51})}}, table)
    assert faults
    assert all(f"{name} 51, table 50" in fault for fault in faults)


def test_kernel_in_the_table_or_the_code_alone():
    x, both = {"x": {"x_kernel": KERNEL}}, {"x": {"x_kernel": KERNEL}, "y": {"y_kernel": KERNEL}}
    assert {fault.split(": ")[-1] for fault in gpu_gates.table_faults(both, x)} == {"missing from the table"}
    assert {fault.split(": ")[-1] for fault in gpu_gates.table_faults(x, both)} == {"only in the table"}


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ({"x_kernel<BFloat16>": "v_mfma_f32_16x16x16_bf16 a[0:3]\nglobal_load_dwordx4 v[0:3]"}, 0),
        ({"x_kernel<BFloat16>": "v_mfma_f32_16x16x16_bf16 a[0:3]\nglobal_load_dwordx2 v[0:1]"}, 1),
        ({"x_kernel<BFloat16>": "v_fma_f32 v0\nbuffer_load_dwordx4 v[0:3]"}, 1),
        ({"x_kernel<float>": ""}, 1),  # none matches
    ],
)
def test_matrix_kernels(code, faults):
    assert len(gpu_gates.matrix_faults("x", r"^x_kernel<BFloat16", code)) == faults


def test_missing_tools_are_named_with_their_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_gates, "HIP_FILES", {str(tmp_path / "hip.h"): "libamdhip64-dev"})
    monkeypatch.setattr(gpu_gates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gpu_gates.GateError) as error:
        gpu_gates.find_tools()
    for remedy in ("clang++-22 -- apt-get install clang-22", "libamdhip64-dev", "llvm-22", r"nvcc -- pip install"):
        assert remedy in str(error.value)


def test_table_has_every_kernel_file_and_is_rendered_as_written():
    table = json.loads(gpu_gates.TABLE.read_text())
    files = {path.stem for path in (Path(__file__).parents[1] / "csrc" / "gpu").glob("*.cu")}
    assert table["operators"].keys() == files, "make gpu-gates ARGS=--update"
    assert gpu_gates.render(table) == gpu_gates.TABLE.read_text()
