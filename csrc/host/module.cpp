// The Python module blockdraft._host: what Python asks about the build and the machine, and the index of n-gram drafts
// (three microseconds a token in Python, of a small model's 150). No torch here: torch's include
// folder carries a pybind11 of its own, which would win over ours.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_isa.h"
#include "common/huge_pages.h"
#include "host/ngram_index.h"
#include "host/read_bandwidth.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information, CPU features, the index of n-gram drafts.";
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
  m.def("use_huge_pages", &blockdraft::use_huge_pages, py::arg("address"), py::arg("bytes"),
        "Asks for pages of 2 MB for memory that has not been touched yet; does nothing where there are none.");
  m.def("read_bandwidth", &blockdraft::read_bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("repeats"),
        py::call_guard<py::gil_scoped_release>(),
        "GB/s (1e9 bytes) at which the threads together read a buffer of this size: the best of the repeats.");
  using blockdraft::NgramIndex;
  py::class_<NgramIndex>(m, "NgramIndex", "Where the n-grams of a text occurred last; see blockdraft.ngram.")
      .def(py::init<int, int>(), py::arg("longest"), py::arg("shortest"))
      .def("follow", &NgramIndex::follow, py::arg("token"))
      .def("extend", &NgramIndex::extend, py::arg("tokens"))
      .def("draft", &NgramIndex::draft, py::arg("count"))
      .def_property_readonly("matched", &NgramIndex::matched)
      .def_property_readonly("entries", &NgramIndex::entries)
      .def_property_readonly("bytes", &NgramIndex::bytes);
}
