#include "cpu/sample_rows.h"

#include "bindings/head.h"
#include "bindings/ops.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

void sample_rows(py::handle hidden_arg, py::handle rows_arg, py::handle norm_arg, py::handle shift_arg,
                 py::handle gain_arg, py::handle weight_arg, py::handle bias_arg, bool normalized,
                 bool narrow, int64_t excluded_token, uint64_t seed, py::handle sequence_arg,
                 py::handle step_arg, py::handle position_arg, double temperature, int num_threads,
                 py::handle token_arg, py::handle log_prob_arg, py::handle top1_token_arg,
                 py::handle top1_prob_arg, py::handle top2_prob_arg, py::handle entropy_arg) {
  const cpu::Isa isa = cpu::current_isa();
  const cpu::HeadProblem head = head_problem(hidden_arg, rows_arg, norm_arg, shift_arg, gain_arg, weight_arg,
                                             bias_arg, normalized, narrow, isa);
  const int64_t num_rows = head.num_rows, vocab_size = head.vocab_size;
  const TensorView sequence(sequence_arg, "rng.sequence", {DType::int64}, {num_rows});
  const TensorView step(step_arg, "rng.step", {DType::int64}, {num_rows});
  const TensorView position(position_arg, "rng.position", {DType::int64}, {num_rows});
  const TensorView token(token_arg, "token", {DType::int64}, {num_rows});
  const TensorView log_prob(log_prob_arg, "log_prob", {DType::float32}, {num_rows});
  const TensorView top1_token(top1_token_arg, "top1_token", {DType::int64}, {num_rows});
  const TensorView top1_prob(top1_prob_arg, "top1_prob", {DType::float32}, {num_rows});
  const TensorView top2_prob(top2_prob_arg, "top2_prob", {DType::float32}, {num_rows});
  const TensorView entropy(entropy_arg, "entropy", {DType::float32}, {num_rows});

  if (excluded_token < -1 || excluded_token >= vocab_size || (excluded_token == 0 && vocab_size == 1))
    throw py::value_error(
        "head.excluded_token: expected -1 or a token of the vocabulary that is not its only one, got " +
        std::to_string(excluded_token) + " with " + std::to_string(vocab_size) + " tokens");
  if (!(temperature >= 0) || temperature > 3e38)
    throw py::value_error("temperature: expected a finite number >= 0, got " + std::to_string(temperature));
  check_num_threads(num_threads);
  check_range(sequence, "rng.sequence", int64_t{1} << 32);
  check_range(step, "rng.step", int64_t{1} << 30);
  check_range(position, "rng.position", int64_t{1} << 31);

  const cpu::SampleRowsProblem problem = {
      .head = head,
      .sequence = sequence.as<const int64_t>(),
      .step = step.as<const int64_t>(),
      .position = position.as<const int64_t>(),
      .excluded_token = excluded_token,
      .seed = seed,
      .temperature = static_cast<float>(temperature),
  };
  const cpu::SampleRowsOutput out = {
      token.as<int64_t>(),   log_prob.as<float>(),  top1_token.as<int64_t>(),
      top1_prob.as<float>(), top2_prob.as<float>(), entropy.as<float>(),
  };
  const py::gil_scoped_release release;
  cpu::sample_rows(problem, out, isa, num_threads);
}

}  // namespace

void bind_sample_rows(py::module_& m) {
  m.def("sample_rows", &sample_rows, py::arg("hidden"), py::arg("rows"), py::arg("norm"), py::arg("shift"),
        py::arg("gain"), py::arg("weight"), py::arg("bias"), py::arg("normalized"), py::arg("narrow"),
        py::arg("excluded_token"), py::arg("seed"), py::arg("sequence"), py::arg("step"), py::arg("position"),
        py::arg("temperature"), py::arg("num_threads"), py::arg("token"), py::arg("log_prob"),
        py::arg("top1_token"), py::arg("top1_prob"), py::arg("top2_prob"), py::arg("entropy"));
}

}  // namespace loopmdm
