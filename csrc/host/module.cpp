// The Python module blockdraft._host: what Python asks about the build and the machine. No torch here: torch's include
// folder carries a pybind11 of its own, which would win over ours.
#include <pybind11/pybind11.h>

#include "common/cpu_isa.h"
#include "host/read_bandwidth.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information and CPU features.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["torch_at_build"] = BLOCKDRAFT_TORCH_AT_BUILD;
        info["gpu_backends"] = BLOCKDRAFT_GPU_BACKENDS;
        return info;
      },
      "Compiler, torch version of the headers, and the GPU libraries built (cuda, hip, both or none).");
  m.def(
      "cpu_isa", [] { return blockdraft::kCpuIsaNames[static_cast<int>(blockdraft::cpu_isa())]; },
      "Instruction set the CPU kernels use: base, avx2 or avx512.");
  m.def("read_bandwidth", &blockdraft::read_bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("repeats"),
        py::call_guard<py::gil_scoped_release>(),
        "GB/s (1e9 bytes) at which the threads together read a buffer of this size: the best of the repeats.");
}
