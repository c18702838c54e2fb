// The Python module blockdraft._host: what Python asks about the build and the machine, and what a small model's step
// of some hundred microseconds has no time for in Python: the index of n-gram drafts (3 us a token there) and the rows
// of a step (60 us for eight sequences). No torch here: torch's include folder carries a pybind11 of its own, which
// would win over ours.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_isa.h"
#include "common/huge_pages.h"
#include "host/ngram_index.h"
#include "host/read_bandwidth.h"
#include "host/step_rows.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information, CPU features, the index of n-gram drafts, the rows of a step.";
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
  using blockdraft::StepRows;
  py::class_<StepRows>(m, "StepRows", "Columns of a step in the making; see blockdraft.steps.")
      .def(py::init<int, bool, bool, int>(), py::arg("page_size"), py::arg("chained"), py::arg("detached"),
           py::arg("empty_slot"))
      .def("add", &StepRows::add, py::arg("length"), py::arg("slot"), py::arg("pages"), py::arg("tokens"))
      .def("add_group", &StepRows::add_group, py::arg("after"), py::arg("tokens"), py::arg("skip"))
      .def("packed", [](const StepRows& rows) { return py::bytearray(rows.packed()); })
      .def_property_readonly("rows", &StepRows::rows)
      .def_property_readonly("sequences", &StepRows::sequences)
      .def_property_readonly("width", &StepRows::width);
}
