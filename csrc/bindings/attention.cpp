#include "cpu/attention/attention.h"

#include <string>

#include "bindings/ops.h"
#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

cpu::HeadsView heads_view(const TensorView& t) {
  return {const_cast<void*>(t.data()), t.stride(0), t.stride(1), t.stride(2)};
}

// The arguments that the op and its gradient share, checked.
struct Arguments {
  Arguments(py::handle q_arg, py::handle k_arg, py::handle v_arg, py::handle key_mask_arg, py::handle cos_arg,
            py::handle sin_arg, py::handle out_arg, py::handle log_sum_exp_arg, int num_threads)
      : q(q_arg, "q", {DType::float32, DType::bfloat16}, {kAny, kAny, kAny, kAny}, Layout::strided) {
    const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), head_dim = q.size(3);
    if (batch * heads * length * head_dim == 0) throw py::value_error("q: expected no dimension of size 0");
    check_num_threads(num_threads);
    problem = {.q = heads_view(q),
               .k = like_q(k_arg, "k"),
               .v = like_q(v_arg, "v"),
               .cos = nullptr,
               .sin = nullptr,
               .key_mask = nullptr,
               .batch = batch,
               .heads = heads,
               .length = length,
               .head_dim = head_dim,
               .is_bf16 = q.dtype() == DType::bfloat16};
    if (!cos_arg.is_none()) {
      if (head_dim % 2 != 0)
        throw py::value_error("rotary: needs an even head size, got " + std::to_string(head_dim));
      problem.cos = TensorView(cos_arg, "rotary.cos", {DType::float32}, {length, head_dim / 2}).as<float>();
      problem.sin = TensorView(sin_arg, "rotary.sin", {DType::float32}, {length, head_dim / 2}).as<float>();
    }
    if (!key_mask_arg.is_none())
      problem.key_mask = TensorView(key_mask_arg, "key_mask", {DType::boolean}, {batch, length}).as<bool>();
    output = {like_q(out_arg, "out"), nullptr};
    if (!log_sum_exp_arg.is_none())
      output.log_sum_exp =
          TensorView(log_sum_exp_arg, "log_sum_exp", {DType::float32}, {batch, heads, length}).as<float>();
  }

  cpu::HeadsView like_q(py::handle object, const char* name) const {
    return heads_view(
        TensorView(object, name, {q.dtype()}, {q.size(0), q.size(1), q.size(2), q.size(3)}, Layout::strided));
  }

  TensorView q;
  cpu::AttentionProblem problem;
  cpu::AttentionOutput output;
};

void attention(py::handle q, py::handle k, py::handle v, py::handle key_mask, py::handle cos, py::handle sin,
               int num_threads, py::handle out, py::handle log_sum_exp) {
  const Arguments a(q, k, v, key_mask, cos, sin, out, log_sum_exp, num_threads);
  const cpu::Isa isa = cpu::current_isa();
  const py::gil_scoped_release release;
  cpu::attention(a.problem, a.output, isa, num_threads);
}

void attention_backward(py::handle q, py::handle k, py::handle v, py::handle key_mask, py::handle cos,
                        py::handle sin, int num_threads, py::handle out, py::handle log_sum_exp,
                        py::handle grad_out, py::handle grad_q, py::handle grad_k, py::handle grad_v) {
  const Arguments a(q, k, v, key_mask, cos, sin, out, log_sum_exp, num_threads);
  if (a.output.log_sum_exp == nullptr) throw py::type_error("log_sum_exp: got None, expected a tensor");
  const cpu::AttentionGradients gradients = {a.like_q(grad_out, "grad_out"), a.like_q(grad_q, "grad_q"),
                                             a.like_q(grad_k, "grad_k"), a.like_q(grad_v, "grad_v")};
  const cpu::Isa isa = cpu::current_isa();
  const py::gil_scoped_release release;
  cpu::attention_backward(a.problem, a.output, gradients, isa, num_threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("key_mask"),
        py::arg("cos"), py::arg("sin"), py::arg("num_threads"), py::arg("out"), py::arg("log_sum_exp"));
  m.def("attention_backward", &attention_backward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("key_mask"), py::arg("cos"), py::arg("sin"), py::arg("num_threads"), py::arg("out"),
        py::arg("log_sum_exp"), py::arg("grad_out"), py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"));
}

}  // namespace loopmdm
