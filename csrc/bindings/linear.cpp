#include "cpu/linear/linear.h"

#include "bindings/ops.h"
#include "bindings/tensor_view.h"
#include "cpu/linear/fingerprint.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

int64_t parts_of(int64_t columns, int64_t heads, int64_t parts) {
  if (parts < 1 || columns % parts != 0 || heads < 0 || (heads > 0 && columns / parts % heads != 0))
    throw py::value_error("linear: " + std::to_string(columns) + " columns do not make " +
                          std::to_string(parts) + " parts of " + std::to_string(heads) + " heads");
  return columns / parts;
}

cpu::LinearLayout layout_of(int64_t columns, int64_t depth, int64_t heads, bool bf16, cpu::Isa isa) {
  return cpu::linear_layout(cpu::linear_kernel(isa), columns, depth, heads ? columns / heads : 0, bf16);
}

// 32-bit words of a packed weight.
int64_t packed_size(int64_t columns, int64_t depth, int64_t heads, int64_t parts, bool bf16) {
  const int64_t part = parts_of(columns, heads, parts);
  return parts * layout_of(part, depth, heads, bf16, cpu::current_isa()).size();
}

// Packs weight [N, K], or its transpose, into `packed`; with heads, in `parts` of N / parts columns each.
// `fresh`: `packed` is new memory.
void pack_linear(py::handle weight_arg, int64_t heads, int64_t parts, bool bf16, bool transposed,
                 int num_threads, py::handle packed_arg, bool fresh) {
  check_num_threads(num_threads);
  const TensorView weight(weight_arg, "weight", {DType::float32, DType::bfloat16}, {kAny, kAny});
  const int64_t columns = weight.size(transposed ? 1 : 0), depth = weight.size(transposed ? 0 : 1);
  if (transposed && (heads != 0 || parts != 1)) throw py::value_error("transposed: expected a plain matrix");
  const int64_t part = parts_of(columns, heads, parts);
  const cpu::Isa isa = cpu::current_isa();
  const cpu::LinearLayout layout = layout_of(part, depth, heads, bf16, isa);
  const TensorView packed(packed_arg, "packed", {DType::int32}, {parts * layout.size()});
  const bool is_bf16 = weight.dtype() == DType::bfloat16;
  const py::gil_scoped_release release;
  for (int64_t i = 0; i < parts; ++i) {
    const char* data = weight.as<const char>() + i * part * depth * (is_bf16 ? 2 : 4);
    cpu::pack_linear({data, part, depth, is_bf16, transposed}, layout, bf16,
                     packed.as<uint32_t>() + i * layout.size(), fresh, isa, num_threads);
  }
}

uint64_t fingerprint(py::handle weight_arg, int num_threads) {
  check_num_threads(num_threads);
  const TensorView weight(weight_arg, "weight", {DType::float32, DType::bfloat16}, {kAny, kAny});
  const int64_t item = weight.dtype() == DType::float32 ? 4 : 2;
  const py::gil_scoped_release release;
  return cpu::fingerprint(weight.data(), weight.size(0) * weight.size(1) * item, num_threads);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("fingerprint", &fingerprint, py::arg("weight"), py::arg("num_threads") = 1);
  m.def("packed_size", &packed_size, py::arg("columns"), py::arg("depth"), py::arg("heads"), py::arg("parts"),
        py::arg("bf16"));
  m.def("pack_linear", &pack_linear, py::arg("weight"), py::arg("heads"), py::arg("parts"), py::arg("bf16"),
        py::arg("transposed"), py::arg("num_threads"), py::arg("packed"), py::arg("fresh"));
}

}  // namespace loopmdm
