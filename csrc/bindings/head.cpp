#include "bindings/head.h"

#include "cpu/linear/linear.h"

namespace py = pybind11;

namespace loopmdm {

cpu::HeadProblem head_problem(py::handle hidden_arg, py::handle rows_arg, py::handle norm_arg,
                              py::handle shift_arg, py::handle gain_arg, py::handle weight_arg,
                              py::handle bias_arg, bool normalized, bool bf16, cpu::Isa isa, bool packed) {
  const TensorView hidden(hidden_arg, "hidden", {DType::float32}, {kAny, kAny, kAny});
  const int64_t groups = hidden.size(0), length = hidden.size(1), width = hidden.size(2);
  const TensorView bias(bias_arg, "head.bias", {DType::float32}, {kAny});
  const int64_t vocab_size = bias.size(0);
  if (width == 0) throw py::value_error("hidden: expected a width of at least 1, got 0");
  constexpr int64_t kMaxVocab = (int64_t{1} << 31) - 1 - cpu::kChunkTokens;  // token numbers are int32
  if (vocab_size < 1 || vocab_size > kMaxVocab)
    throw py::value_error("head.bias: expected 1.." + std::to_string(kMaxVocab) + " tokens, got " +
                          std::to_string(vocab_size));
  const cpu::LinearLayout layout =
      cpu::linear_layout(cpu::linear_kernel(isa), vocab_size, width, /*head_dim=*/0, bf16);
  const uint32_t* weight = nullptr;
  if (packed)
    weight = TensorView(weight_arg, "packed head.weight", {DType::int32}, {layout.size()}).as<uint32_t>();
  const TensorView norm(norm_arg, "head.norm", {DType::float32}, {width});
  const TensorView shift(shift_arg, "shift", {DType::float32}, {kAny, width});
  const TensorView gain(gain_arg, "gain", {DType::float32}, {shift.size(0), width});
  const TensorView rows(rows_arg, "rows", {DType::int64}, {kAny});
  if (shift.size(0) != 1 && shift.size(0) != groups)
    throw py::value_error("head.modulation: expected 1 or " + std::to_string(groups) + " sequences, got " +
                          std::to_string(shift.size(0)));
  check_range(rows, "rows", groups * length);
  return {
      .hidden = hidden.as<const float>(),
      .rows = rows.as<const int64_t>(),
      .norm = norm.as<const float>(),
      .shift = shift.as<const float>(),
      .gain = gain.as<const float>(),
      .weight = weight,
      .bias = bias.as<const float>(),
      .num_rows = rows.size(0),
      .rows_per_group = shift.size(0) == 1 ? groups * length : length,
      .width = width,
      .vocab_size = vocab_size,
      .bf16 = bf16,
      .normalized = normalized,
  };
}

cpu::TokenRaceProblem token_race_problem(const cpu::HeadProblem& head, py::handle quantized_arg,
                                         py::handle weight_arg) {
  if (head.width > cpu::kMostQuantizedWidth)
    throw py::value_error("hidden: expected a width of at most " + std::to_string(cpu::kMostQuantizedWidth));
  const cpu::QuantizedSize size(head.vocab_size, head.width);
  const TensorView quantized(quantized_arg, "quantized head.weight", {DType::int32}, {size.total()});
  const TensorView weight(weight_arg, "head.weight", {DType::float32, DType::bfloat16},
                          {head.vocab_size, head.width});
  return {
      .rows = nullptr,
      .quantized = size.in(quantized.as<uint32_t>()),
      .weight = weight.data(),
      .weight_is_bf16 = weight.dtype() == DType::bfloat16,
  };
}

}  // namespace loopmdm
