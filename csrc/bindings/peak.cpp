#include "cpu/vector/peak.h"

#include <cmath>

#include "bindings/ops.h"
#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

double cpu_peak_flops(bool dtype_is_bf16, int num_threads, double milliseconds) {
  check_num_threads(num_threads);
  if (!(milliseconds > 0) || std::isinf(milliseconds))
    throw py::value_error("milliseconds: expected a finite number > 0, got " + std::to_string(milliseconds));
  const cpu::Isa isa = cpu::current_isa();
  const py::gil_scoped_release release;
  return cpu::peak_flops(dtype_is_bf16, isa, num_threads, milliseconds);
}

}  // namespace

void bind_peak(py::module_& m) {
  m.def("cpu_peak_flops", &cpu_peak_flops, py::arg("dtype_is_bf16"), py::arg("num_threads"),
        py::arg("milliseconds"));
}

}  // namespace loopmdm
