"""What `blockdraft info` reports: versions, operator libraries, CPU and threads."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

import blockdraft
from blockdraft import _host
from blockdraft._libraries import failed_libraries
from blockdraft.model.decoder import chosen_way

# In the order of CPU generations; those that matter to the kernels or to torch's own products.
CPU_FEATURES = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
LIBRARIES = ("_cpu", "_cuda", "_hip")


def versions() -> dict[str, str]:
    build = blockdraft.build_info()
    return {
        "blockdraft": blockdraft.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch at build": build["torch_at_build"],
        "compiler": build["compiler"],
    }


def why_not_loaded(name: str) -> str:
    backend = name.removeprefix("_")
    if not (Path(_host.__file__).parent / f"{name}.so").exists():
        built = blockdraft.build_info()["gpu_backends"] or "none"
        return f"not built (GPU libraries in this build: {built}; see BLOCKDRAFT_GPU in CONTRIBUTING)"
    if name in failed_libraries:
        return failed_libraries[name]
    other = "a ROCm" if backend == "cuda" else "not a ROCm"
    return f"built, but this torch is {other} build"


def libraries() -> dict[str, dict[str, Any]]:
    """Per library, whether it is loaded, and where from or why not."""
    loaded = blockdraft.loaded_libraries
    return {
        name: {"loaded": True, "path": str(loaded[name])}
        if name in loaded
        else {"loaded": False, "reason": why_not_loaded(name)}
        for name in LIBRARIES
    }


def gpu() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    has_support = torch.version.cuda or torch.version.hip
    return "none found" if has_support else "none (this torch is built for the CPU alone)"


def cpu() -> dict[str, Any]:
    capabilities = torch.cpu.get_capabilities()
    return {
        "name": capabilities.get("cpu_name", platform.machine()),
        "features": [name for name in CPU_FEATURES if capabilities.get(name)],
        "kernels": blockdraft.cpu_isa(),
        "kernels lowered by BLOCKDRAFT_CPU_ISA": bool(os.environ.get("BLOCKDRAFT_CPU_ISA")),
    }


def threads() -> dict[str, int | None]:
    return {"in use": torch.get_num_threads(), "logical cores": os.cpu_count()}


def decoder() -> str:
    """How a model that is loaded now runs a forward."""
    return "one operator a forward" if chosen_way() == "fused" else "module by module (BLOCKDRAFT_DECODER)"


def collect() -> dict[str, Any]:
    """JSON-ready; the keys are the text's headings."""
    return {
        "versions": versions(),
        "libraries": libraries(),
        "cpu": cpu(),
        "gpu": gpu(),
        "threads": threads(),
        "decoder": decoder(),
    }


def as_text(info: dict[str, Any]) -> str:
    lines = [f"{name:<15} {version}" for name, version in info["versions"].items()]
    for name, library in info["libraries"].items():
        state = f"loaded from {library['path']}" if library["loaded"] else f"not loaded: {library['reason']}"
        lines.append(f"library {name:<7} {state}")
    cpu = info["cpu"]
    lowered = ", lowered by BLOCKDRAFT_CPU_ISA" if cpu["kernels lowered by BLOCKDRAFT_CPU_ISA"] else ""
    lines.append(f"{'cpu':<15} {cpu['name']}: {' '.join(cpu['features']) or 'no known features'}")
    lines.append(f"{'cpu kernels':<15} {cpu['kernels']}{lowered}")
    lines.append(f"{'gpu':<15} {info['gpu']}")
    lines.append(f"{'threads':<15} {info['threads']['in use']} of {info['threads']['logical cores']} logical cores")
    lines.append(f"{'decoder':<15} {info['decoder']}")
    return "\n".join(lines)
