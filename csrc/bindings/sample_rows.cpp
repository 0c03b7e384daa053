#include "cpu/sample_rows.h"

#include "bindings/ops.h"
#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

void check_range(const TensorView& values, const char* name, int64_t limit) {
  for (int64_t i = 0; i < values.size(0); ++i) {
    const int64_t value = values.as<const int64_t>()[i];
    if (value < 0 || value >= limit)
      throw py::value_error(std::string(name) + ": expected values in 0.." + std::to_string(limit - 1) +
                            ", got " + std::to_string(value) + " at index " + std::to_string(i));
  }
}

void sample_rows(py::handle hidden_arg, py::handle rows_arg, py::handle norm_arg, py::handle shift_arg,
                 py::handle gain_arg, py::handle weight_arg, py::handle bias_arg, int64_t excluded_token,
                 uint64_t seed, py::handle sequence_arg, py::handle step_arg, py::handle position_arg,
                 double temperature, bool compute_in_bf16, int num_threads, py::handle token_arg,
                 py::handle log_prob_arg, py::handle top1_token_arg, py::handle top1_prob_arg,
                 py::handle top2_prob_arg, py::handle entropy_arg) {
  const TensorView hidden(hidden_arg, "hidden", {DType::float32}, {kAny, kAny, kAny});
  const int64_t groups = hidden.size(0), length = hidden.size(1), width = hidden.size(2);
  const TensorView weight(weight_arg, "head.weight", {DType::float32, DType::bfloat16}, {kAny, width});
  const int64_t vocab_size = weight.size(0);
  const TensorView norm(norm_arg, "head.norm", {DType::float32}, {width});
  const TensorView shift(shift_arg, "shift", {DType::float32}, {kAny, width});
  const TensorView gain(gain_arg, "gain", {DType::float32}, {shift.size(0), width});
  const TensorView bias(bias_arg, "head.bias", {DType::float32}, {vocab_size});
  const TensorView rows(rows_arg, "rows", {DType::int64}, {kAny});
  const int64_t num_rows = rows.size(0);
  const TensorView sequence(sequence_arg, "rng.sequence", {DType::int64}, {num_rows});
  const TensorView step(step_arg, "rng.step", {DType::int64}, {num_rows});
  const TensorView position(position_arg, "rng.position", {DType::int64}, {num_rows});
  const TensorView token(token_arg, "token", {DType::int64}, {num_rows});
  const TensorView log_prob(log_prob_arg, "log_prob", {DType::float32}, {num_rows});
  const TensorView top1_token(top1_token_arg, "top1_token", {DType::int64}, {num_rows});
  const TensorView top1_prob(top1_prob_arg, "top1_prob", {DType::float32}, {num_rows});
  const TensorView top2_prob(top2_prob_arg, "top2_prob", {DType::float32}, {num_rows});
  const TensorView entropy(entropy_arg, "entropy", {DType::float32}, {num_rows});

  if (width == 0) throw py::value_error("hidden: expected a width of at least 1, got 0");
  if (shift.size(0) != 1 && shift.size(0) != groups)
    throw py::value_error("head.modulation: expected 1 or " + std::to_string(groups) + " sequences, got " +
                          std::to_string(shift.size(0)));
  constexpr int64_t kMaxVocab = (int64_t{1} << 31) - 1 - cpu::kChunkTokens;  // token numbers are int32
  if (vocab_size < 1 || vocab_size > kMaxVocab)
    throw py::value_error("head.weight: expected 1.." + std::to_string(kMaxVocab) + " tokens, got " +
                          std::to_string(vocab_size));
  if (excluded_token < -1 || excluded_token >= vocab_size || (excluded_token == 0 && vocab_size == 1))
    throw py::value_error(
        "head.excluded_token: expected -1 or a token of the vocabulary that is not its only one, got " +
        std::to_string(excluded_token) + " with " + std::to_string(vocab_size) + " tokens");
  if (!(temperature >= 0) || temperature > 3e38)
    throw py::value_error("temperature: expected a finite number >= 0, got " + std::to_string(temperature));
  if (num_threads < 1)
    throw py::value_error("num_threads: expected at least 1, got " + std::to_string(num_threads));
  check_range(rows, "rows", groups * length);
  check_range(sequence, "rng.sequence", int64_t{1} << 32);
  check_range(step, "rng.step", int64_t{1} << 30);
  check_range(position, "rng.position", int64_t{1} << 31);

  const cpu::SampleRowsProblem problem = {
      .hidden = hidden.as<const float>(),
      .rows = rows.as<const int64_t>(),
      .norm = norm.as<const float>(),
      .shift = shift.as<const float>(),
      .gain = gain.as<const float>(),
      .weight = weight.data(),
      .bias = bias.as<const float>(),
      .sequence = sequence.as<const int64_t>(),
      .step = step.as<const int64_t>(),
      .position = position.as<const int64_t>(),
      .num_rows = num_rows,
      .rows_per_group = shift.size(0) == 1 ? groups * length : length,
      .width = width,
      .vocab_size = vocab_size,
      .excluded_token = excluded_token,
      .seed = seed,
      .temperature = static_cast<float>(temperature),
      .weight_is_bf16 = weight.dtype() == DType::bfloat16,
      .compute_in_bf16 = compute_in_bf16,
  };
  const cpu::SampleRowsOutput out = {
      token.as<int64_t>(),   log_prob.as<float>(),  top1_token.as<int64_t>(),
      top1_prob.as<float>(), top2_prob.as<float>(), entropy.as<float>(),
  };
  const cpu::Isa isa = cpu::current_isa();
  const py::gil_scoped_release release;
  cpu::sample_rows(problem, out, isa, num_threads);
}

}  // namespace

void bind_sample_rows(py::module_& m) {
  m.def("sample_rows", &sample_rows, py::arg("hidden"), py::arg("rows"), py::arg("norm"), py::arg("shift"),
        py::arg("gain"), py::arg("weight"), py::arg("bias"), py::arg("excluded_token"), py::arg("seed"),
        py::arg("sequence"), py::arg("step"), py::arg("position"), py::arg("temperature"),
        py::arg("compute_in_bf16"), py::arg("num_threads"), py::arg("token"), py::arg("log_prob"),
        py::arg("top1_token"), py::arg("top1_prob"), py::arg("top2_prob"), py::arg("entropy"));
}

}  // namespace loopmdm
