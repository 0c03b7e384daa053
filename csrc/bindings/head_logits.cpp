#include "cpu/head/head_logits.h"

#include "bindings/head.h"
#include "bindings/ops.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

void head_logits(py::handle hidden, py::handle rows, py::handle norm, py::handle shift, py::handle gain,
                 py::handle weight, py::handle bias, bool normalized, bool bf16, int num_threads,
                 py::handle logits_arg) {
  const cpu::Isa isa = cpu::current_isa();
  const cpu::HeadProblem problem =
      head_problem(hidden, rows, norm, shift, gain, weight, bias, normalized, bf16, isa);
  const TensorView logits(logits_arg, "logits", {DType::bfloat16, DType::float32},
                          {problem.num_rows, problem.vocab_size});
  check_num_threads(num_threads);
  const py::gil_scoped_release release;
  cpu::head_logits(problem, logits.dtype() == DType::bfloat16, logits.as<void>(), isa, num_threads);
}

}  // namespace

void bind_head_logits(py::module_& m) {
  m.def("head_logits", &head_logits, py::arg("hidden"), py::arg("rows"), py::arg("norm"), py::arg("shift"),
        py::arg("gain"), py::arg("weight"), py::arg("bias"), py::arg("normalized"), py::arg("bf16"),
        py::arg("num_threads"), py::arg("logits"));
}

}  // namespace loopmdm
