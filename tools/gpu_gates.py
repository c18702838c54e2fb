#!/usr/bin/env python3
"""Compiles the GPU kernels for every chip they are meant for, which needs no GPU, and holds what they use to a table.

usage: gpu_gates.py [--update] [OPERATOR ...]

Builds _cuda.so (machine code for sm_80 and sm_90a) and _hip.so (gfx90a, gfx942, gfx950) in build/gpu_gates and fails if

* a kernel needs more registers, shared memory or stack than tests/gpu_resources.json says, is missing from it, or
  is in it and no longer in the code;
* a kernel spills registers, has scratch memory on AMD, or more static LDS than the chip gives a block;
* a kernel of MATRIX_KERNELS has no matrix instruction or no 16-byte global load on gfx942;
* a library does not load on this torch or does not register its operators (tests/test_libraries.py).

--update writes the table anew; the other rules still hold. With OPERATOR only those, and without the libraries.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_gates"
TABLE = ROOT / "tests" / "gpu_resources.json"
CUDA = ("sm_80", "sm_90a")
LDS = {"gfx90a": 65536, "gfx942": 65536, "gfx950": 163840}  # bytes that a block may have
HIP = tuple(LDS)

# By operator: kernels, by a regular expression on their short name, whose loops multiply matrices.
MATRIX_KERNELS = {
    "packed_linear": r"^packed_linear_kernel<BFloat16",
    "lm_head_choose": r"^lm_head_choose_kernel<BFloat16",
    "moe_experts": r"^moe_experts\w*_kernel<BFloat16",
    "block_attention": r"^block_attention_kernel<BFloat16",
}
MATRIX_INSTRUCTIONS = {
    "matrix instruction (v_mfma)": r"\bv_mfma_",
    "16-byte global load (global_load_dwordx4, buffer_load_dwordx4)": r"\b(global|buffer)_load(_lds)?_dwordx4\b",
}

LLVM = {"clang++-22": "clang-22", "ld.lld-22": "lld-22", "clang-offload-bundler-22": "clang-tools-22"}
LLVM |= dict.fromkeys(("llvm-readelf-22", "llvm-objdump-22", "llvm-cxxfilt-22"), "llvm-22")
HIP_FILES = {
    "/usr/include/hip/hip_runtime.h": "libamdhip64-dev",
    "/usr/lib/x86_64-linux-gnu/amdgcn/bitcode/ocml.bc": "rocm-device-libs",
    "/usr/lib/llvm-22/lib/clang/22/lib/linux/libclang_rt.builtins-x86_64.a": "libclang-rt-22-dev",
}

Figures = dict[str, int]  # what a kernel uses on a chip
Kernels = dict[str, dict[str, Figures]]  # by short name and chip
Operators = dict[str, Kernels]


class GateError(Exception):
    """What is wrong, for the user."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("operators", nargs="*", metavar="OPERATOR")
    args = parser.parse_args()
    try:
        faults = run(args.update, args.operators)
    except GateError as error:
        faults = [str(error)]
    for fault in faults:
        print(f"gpu_gates: {fault}", file=sys.stderr)
    if not faults:
        print("gpu_gates: passed")
    return bool(faults)


def run(update: bool, names: list[str]) -> list[str]:
    """What is wrong, nothing if all is well."""
    nvcc = find_tools()
    there = sorted(path.stem for path in (ROOT / "csrc" / "gpu").glob("*.cu"))
    for name in names:
        if name not in there:
            raise GateError(f"no csrc/gpu/{name}.cu; there are {', '.join(there)}")
    configure(nvcc)
    operators = build(names or there, link=not names)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"made_with": {}, "operators": {}}
    versions = {"nvcc": version_of(nvcc), "clang": version_of("clang++-22")}
    faults = hard_faults(operators)
    if update:
        kept = {name: kernels for name, kernels in table["operators"].items() if names and name in there}
        TABLE.write_text(render({"made_with": versions, "operators": dict(sorted((kept | operators).items()))}))
        print(f"gpu_gates: wrote {TABLE.relative_to(ROOT)}")
    else:
        held = {name: kernels for name, kernels in table["operators"].items() if not names or name in names}
        over = table_faults(operators, held)
        if over:
            over.append("if that is meant: make gpu-gates ARGS=--update")
        if over and versions != table["made_with"]:
            over.append(f"the table was made with {table['made_with']}, this is {versions}")
        faults += over
    return faults + ([] if names or faults else library_faults())


# The tools.


def find_tools() -> str:
    """The nvcc to use: the one that make installs into .venv, else the one on PATH. Says what is missing."""
    lacking = [(tool, f"apt-get install {package}") for tool, package in LLVM.items() if not shutil.which(tool)]
    lacking += [(path, f"apt-get install {package}") for path, package in HIP_FILES.items() if not Path(path).exists()]
    wheel = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    folders = [Path(folder) / "bin" for folder in wheel.submodule_search_locations] if wheel else []
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    if not nvcc:
        lacking.append(("nvcc", "pip install '.[cuda]', or the CUDA toolkit 13.0"))
    if lacking:
        raise GateError("missing tools\n" + "\n".join(f"  {what} -- {remedy}" for what, remedy in lacking))
    return nvcc


def version_of(tool: str) -> str:
    text = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"(?:\bV|clang version )(\d+\.\d+\.\d+)", text)[1]


def configure(nvcc: str) -> None:
    pybind11 = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    # Without "real" for 80: its PTX comes from the same pass and serves the chips that no machine code is made for.
    options = {
        "BLOCKDRAFT_GPU": "cuda;hip",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_FLAGS": f"-L{Path(nvcc).parents[1] / 'lib'}",  # where the wheels have cudart, not in lib64
        "CMAKE_HIP_ARCHITECTURES": ";".join(HIP),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.stdout.strip(),
    }
    cache = BUILD / "CMakeCache.txt"
    fresh = (
        ["--fresh"] if cache.exists() and nvcc not in cache.read_text() else []
    )  # cmake stumbles over another compiler
    command = ["cmake", *fresh, "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD)]
    command += [f"-D{name}={value}" for name, value in options.items()]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise GateError("cmake failed\n" + result.stdout)


# Building and reading.


def build(names: list[str], link: bool) -> Operators:
    """Compiles these operators; with link, everything that the libraries need."""
    objects = {(backend, name): object_of(backend, name) for backend in ("cuda", "hip") for name in names}
    for (backend, _), path in objects.items():
        if backend == "cuda":
            path.unlink(missing_ok=True)  # ptxas tells its figures while it compiles
    targets = ["blockdraft_cuda", "blockdraft_hip"] if link else [p.relative_to(BUILD) for p in objects.values()]
    said = ninja([str(target) for target in targets])
    operators: Operators = {name: {} for name in names}
    for name, text in re.findall(r"CUDA object \S+/(\w+)\.cu\.o\n(.*?)(?=^\[\d+/|\Z)", said, re.DOTALL | re.MULTILINE):
        for symbol, chip, figures in ptxas_figures(text):
            operators[name].setdefault(symbol, {})[chip] = figures
    for name in names:
        for chip in HIP:
            for symbol, figures in amd_figures(code_object(name, chip)):
                operators[name].setdefault(symbol, {})[chip] = figures
    return {name: with_short_names(kernels) for name, kernels in operators.items()}


def object_of(backend: str, name: str) -> Path:
    return BUILD / backend / "CMakeFiles" / f"blockdraft_{backend}.dir" / f"{name}.cu.o"


def ninja(targets: list[str]) -> str:
    """Shows the steps and the errors as they come and returns all that was said."""
    said = []
    command = ["ninja", "-C", str(BUILD), "-k", "0", *targets]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    for line in process.stdout:
        said.append(line)
        if not re.match(r"ptxas info|ninja: Entering| +\d+ bytes stack frame, 0 bytes spill", line):
            print(line.rstrip()[:2000], flush=True)
    if process.wait():
        raise GateError("the build failed, see above; a register spill is an error of ptxas, too")
    return "".join(said)


PTXAS_KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<chip>\w+)'"
    r".*?Function properties for (?P=symbol)\n"
    r" +(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


def ptxas_figures(text: str) -> Iterator[tuple[str, str, Figures]]:
    """(mangled name, chip, figures) of each kernel in what `ptxas -v` said."""
    for match in PTXAS_KERNEL.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["more"])
        yield match["symbol"], match["chip"], {
            "registers": int(match["registers"]),
            "spills": int(match["stores"]) + int(match["loads"]),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(match["stack"]),
        }  # fmt: skip


def code_object(name: str, chip: str) -> Path:
    """The machine code for one chip, taken from the object file that goes into _hip.so."""
    bundle = object_of("hip", name).read_bytes()
    bundle = bundle[bundle.index(b"__CLANG_OFFLOAD_BUNDLE__") :]
    (count,), at = struct.unpack_from("<Q", bundle, 24), 32
    for _ in range(count):
        offset, size, length = struct.unpack_from("<QQQ", bundle, at)
        target, at = bundle[at + 24 : at + 24 + length].decode(), at + 24 + length
        if target.endswith(chip):
            path = BUILD / f"{name}.{chip}.hsaco"
            path.write_bytes(bundle[offset : offset + size])
            return path
    raise GateError(f"{name}: _hip.so has no code for {chip}")


def amd_figures(path: Path) -> Iterator[tuple[str, Figures]]:
    """(mangled name, figures) of each kernel from the notes of a code object."""
    notes = subprocess.run(["llvm-readelf-22", "--notes", path], check=True, capture_output=True, text=True).stdout
    for kernel in notes.split("  - .agpr_count:")[1:]:
        kernel = ".agpr_count:" + kernel

        def field(name: str, text: str = kernel) -> str:
            return re.search(rf"^ *{re.escape(name)}: +(\S+)", text, re.MULTILINE)[1]

        spills = int(field(".vgpr_spill_count")) + int(field(".sgpr_spill_count"))
        figures = {name: int(field(f".{name}_count")) for name in ("vgpr", "agpr", "sgpr")} | {"spills": spills}
        figures |= {
            "lds": int(field(".group_segment_fixed_size")),
            "scratch": int(field(".private_segment_fixed_size")),
        }
        yield field(".symbol").strip("'").removesuffix(".kd"), figures


def with_short_names(kernels: Kernels) -> Kernels:
    """By short name, where nvcc and clang agree; chips and kernels in order."""
    short = dict(zip(kernels, map(short_name, demangled(list(kernels))), strict=True))
    named: Kernels = {}
    for symbol, chips in kernels.items():
        named.setdefault(short[symbol], {}).update(chips)
    return {name: {chip: named[name][chip] for chip in (*CUDA, *HIP) if chip in named[name]} for name in sorted(named)}


def demangled(symbols: list[str]) -> list[str]:
    text = "".join(f"{symbol}\n" for symbol in symbols)
    return subprocess.run(
        ["llvm-cxxfilt-22"], input=text, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def short_name(name: str) -> str:
    """Without result, namespaces of our own and parameters: `residual_norm_kernel<BFloat16>`."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\bblockdraft::(gpu::)?", "", name).removeprefix("void ")
    depth = 0
    for i in reversed(range(len(name))):
        depth += (name[i] == ")") - (name[i] == "(")
        if name[-1] == ")" and depth == 0:
            return name[:i]
    return name


# The rules.


def hard_faults(operators: Operators) -> list[str]:
    """What no table can allow."""
    faults = []
    for operator, kernels in operators.items():
        compiled = {chip for chips in kernels.values() for chip in chips}
        faults += [f"{operator}: no kernel found for {chip}" for chip in (*CUDA, *HIP) if chip not in compiled]
        for kernel, chip, figures in each(kernels):
            limits = {"spills": 0, "scratch": 0, "lds": LDS.get(chip, 0)}
            for name in limits.keys() & figures.keys():
                if figures[name] > limits[name]:
                    faults.append(f"{operator}: {kernel} on {chip}: {name} {figures[name]}, allowed {limits[name]}")
        if operator in MATRIX_KERNELS:
            code = disassembled(BUILD / f"{operator}.gfx942.hsaco")
            faults += matrix_faults(operator, MATRIX_KERNELS[operator], code)
    return faults


def each(kernels: Kernels) -> Iterator[tuple[str, str, Figures]]:
    return ((kernel, chip, figures) for kernel, chips in kernels.items() for chip, figures in chips.items())


def disassembled(path: Path) -> dict[str, str]:
    """The instructions of each kernel by short name."""
    command = ["llvm-objdump-22", "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(\S+)>:$", text, flags=re.MULTILINE)
    names, bodies = parts[1::2], parts[2::2]
    return dict(zip(map(short_name, demangled(names)), bodies, strict=True))


def matrix_faults(operator: str, pattern: str, code: dict[str, str]) -> list[str]:
    kernels = [kernel for kernel in code if re.search(pattern, kernel)]
    if not kernels:
        return [f"{operator}: no kernel matches {pattern}, which must multiply matrices; there are {', '.join(code)}"]
    return [
        f"{operator}: {kernel} has no {what} on gfx942"
        for kernel in kernels
        for what, instruction in MATRIX_INSTRUCTIONS.items()
        if not re.search(instruction, code[kernel])
    ]


def table_faults(operators: Operators, table: Operators) -> list[str]:
    """Where the code and the table differ to the worse, or one has what the other has not."""
    faults = []
    for operator in sorted(operators.keys() | table.keys()):
        used = {(kernel, chip): figures for kernel, chip, figures in each(operators.get(operator, {}))}
        held = {(kernel, chip): figures for kernel, chip, figures in each(table.get(operator, {}))}
        faults += [f"{operator}: {k} on {c}: missing from the table" for k, c in used.keys() - held.keys()]
        faults += [f"{operator}: {k} on {c}: only in the table" for k, c in held.keys() - used.keys()]
        for kernel, chip in used.keys() & held.keys():
            for name, value in used[kernel, chip].items():
                most = held[kernel, chip].get(name, 0)
                if value > most:
                    faults.append(f"{operator}: {kernel} on {chip}: {name} {value}, table {most}")
    return sorted(faults)


def render(table: dict) -> str:
    """JSON with a line for each kernel and chip."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{([^{}]*)\}", lambda match: "{" + " ".join(match[1].split()) + "}", text) + "\n"


def library_faults() -> list[str]:
    """Both libraries on this torch, each in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_libraries.py", "-k", "registers or needs_no_python"]
    failed = subprocess.run(command, cwd=ROOT, env=os.environ | {"BLOCKDRAFT_GPU_LIBRARIES": str(BUILD)}).returncode
    return ["tests/test_libraries.py failed for the libraries in build/gpu_gates"] if failed else []


if __name__ == "__main__":
    sys.exit(main())
