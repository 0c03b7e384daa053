#include "cpu/head/sample_rows.h"

#include "bindings/head.h"
#include "bindings/ops.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

// What names the random numbers of each row.
struct RowNames {
  RowNames(py::handle sequence_arg, py::handle step_arg, py::handle position_arg, int64_t num_rows)
      : sequence(sequence_arg, "rng.sequence", {DType::int64}, {num_rows}),
        step(step_arg, "rng.step", {DType::int64}, {num_rows}),
        position(position_arg, "rng.position", {DType::int64}, {num_rows}) {
    check_range(sequence, "rng.sequence", int64_t{1} << 32);
    check_range(step, "rng.step", int64_t{1} << 30);
    check_range(position, "rng.position", int64_t{1} << 31);
  }

  const TensorView sequence, step, position;
};

cpu::SampleRowsProblem rows_problem(const cpu::HeadProblem& head, const RowNames& names,
                                    int64_t excluded_token, uint64_t seed, double temperature) {
  const int64_t vocab_size = head.vocab_size;
  if (excluded_token < -1 || excluded_token >= vocab_size || (excluded_token == 0 && vocab_size == 1))
    throw py::value_error(
        "head.excluded_token: expected -1 or a token of the vocabulary that is not its only one, got " +
        std::to_string(excluded_token) + " with " + std::to_string(vocab_size) + " tokens");
  if (!(temperature >= 0) || temperature > 3e38)
    throw py::value_error("temperature: expected a finite number >= 0, got " + std::to_string(temperature));
  return {
      .head = head,
      .sequence = names.sequence.as<const int64_t>(),
      .step = names.step.as<const int64_t>(),
      .position = names.position.as<const int64_t>(),
      .excluded_token = excluded_token,
      .seed = seed,
      .temperature = static_cast<float>(temperature),
  };
}

void sample_rows(py::handle hidden_arg, py::handle rows_arg, py::handle norm_arg, py::handle shift_arg,
                 py::handle gain_arg, py::handle weight_arg, py::handle bias_arg, bool normalized, bool bf16,
                 int64_t excluded_token, uint64_t seed, py::handle sequence_arg, py::handle step_arg,
                 py::handle position_arg, double temperature, int num_threads, py::handle token_arg,
                 py::handle log_prob_arg, py::handle top1_token_arg, py::handle top1_prob_arg,
                 py::handle top2_prob_arg, py::handle entropy_arg) {
  const cpu::Isa isa = cpu::current_isa();
  const cpu::HeadProblem head = head_problem(hidden_arg, rows_arg, norm_arg, shift_arg, gain_arg, weight_arg,
                                             bias_arg, normalized, bf16, isa);
  const int64_t num_rows = head.num_rows;
  const RowNames names(sequence_arg, step_arg, position_arg, num_rows);
  const TensorView token(token_arg, "token", {DType::int64}, {num_rows});
  const TensorView log_prob(log_prob_arg, "log_prob", {DType::float32}, {num_rows});
  const TensorView top1_token(top1_token_arg, "top1_token", {DType::int64}, {num_rows});
  const TensorView top1_prob(top1_prob_arg, "top1_prob", {DType::float32}, {num_rows});
  const TensorView top2_prob(top2_prob_arg, "top2_prob", {DType::float32}, {num_rows});
  const TensorView entropy(entropy_arg, "entropy", {DType::float32}, {num_rows});

  check_num_threads(num_threads);
  const cpu::SampleRowsProblem problem = rows_problem(head, names, excluded_token, seed, temperature);
  const cpu::SampleRowsOutput out = {
      token.as<int64_t>(),   log_prob.as<float>(),  top1_token.as<int64_t>(),
      top1_prob.as<float>(), top2_prob.as<float>(), entropy.as<float>(),
  };
  const py::gil_scoped_release release;
  cpu::sample_rows(problem, out, isa, num_threads);
}

void sample_tokens(py::handle hidden_arg, py::handle rows_arg, py::handle norm_arg, py::handle shift_arg,
                   py::handle gain_arg, py::handle weight_arg, py::handle bias_arg, bool normalized,
                   bool bf16, py::handle quantized_arg, int64_t excluded_token, uint64_t seed,
                   py::handle sequence_arg, py::handle step_arg, py::handle position_arg, double temperature,
                   int num_threads, py::handle token_arg, py::handle finite_arg) {
  const cpu::Isa isa = cpu::current_isa();
  const cpu::HeadProblem head = head_problem(hidden_arg, rows_arg, norm_arg, shift_arg, gain_arg, weight_arg,
                                             bias_arg, normalized, bf16, isa, /*packed=*/false);
  const RowNames names(sequence_arg, step_arg, position_arg, head.num_rows);
  const TensorView token(token_arg, "token", {DType::int64}, {head.num_rows});
  const TensorView finite(finite_arg, "finite", {DType::boolean}, {head.num_rows});
  check_num_threads(num_threads);
  const cpu::SampleRowsProblem rows = rows_problem(head, names, excluded_token, seed, temperature);
  cpu::TokenRaceProblem problem = token_race_problem(head, quantized_arg, weight_arg);
  problem.rows = &rows;
  const py::gil_scoped_release release;
  cpu::sample_tokens(problem, token.as<int64_t>(), finite.as<bool>(), isa, num_threads);
}

// 32-bit words of quantized weights [vocab_size, width].
int64_t quantized_size(int64_t vocab_size, int64_t width) {
  return cpu::QuantizedSize(vocab_size, width).total();
}

void quantize_head(py::handle weight_arg, bool bf16, int num_threads, py::handle quantized_arg, bool fresh) {
  const cpu::Isa isa = cpu::current_isa();
  const TensorView weight(weight_arg, "weight", {DType::float32, DType::bfloat16}, {kAny, kAny});
  const cpu::QuantizedSize size(weight.size(0), weight.size(1));
  const TensorView quantized(quantized_arg, "quantized", {DType::int32}, {size.total()});
  check_num_threads(num_threads);
  const py::gil_scoped_release release;
  cpu::quantize_head(
      {weight.data(), weight.size(0), weight.size(1), weight.dtype() == DType::bfloat16, false}, bf16,
      size.in(quantized.as<uint32_t>()), fresh, isa, num_threads);
}

void draw_restricted(py::handle log_probs_arg, py::handle tempered_arg, py::handle probs_arg, int64_t most,
                     double top_p, uint64_t seed, py::handle sequence_arg, py::handle step_arg,
                     py::handle position_arg, double temperature, int num_threads, py::handle token_arg) {
  const cpu::Isa isa = cpu::current_isa();
  const TensorView log_probs(log_probs_arg, "log_probs", {DType::float32}, {kAny, kAny});
  const int64_t num_rows = log_probs.size(0), vocab_size = log_probs.size(1);
  const TensorView tempered(tempered_arg, "tempered", {DType::float32}, {num_rows, vocab_size});
  const RowNames names(sequence_arg, step_arg, position_arg, num_rows);
  const TensorView token(token_arg, "token", {DType::int64}, {num_rows});
  const float* probs = nullptr;
  if (!probs_arg.is_none())
    probs = TensorView(probs_arg, "probs", {DType::float32}, {num_rows, vocab_size}).as<const float>();
  if (most < 1 || most > vocab_size)
    throw py::value_error("most: expected 1.." + std::to_string(vocab_size) + ", got " +
                          std::to_string(most));
  if (!(temperature > 0))
    throw py::value_error("temperature: expected a number > 0, got " + std::to_string(temperature));
  check_num_threads(num_threads);
  const cpu::RestrictedDrawProblem problem = {
      .log_probs = log_probs.as<const float>(),
      .tempered = tempered.as<const float>(),
      .probs = probs,
      .sequence = names.sequence.as<const int64_t>(),
      .step = names.step.as<const int64_t>(),
      .position = names.position.as<const int64_t>(),
      .num_rows = num_rows,
      .vocab_size = vocab_size,
      .most = most,
      .seed = seed,
      .temperature = temperature,
      .top_p = static_cast<float>(top_p),
  };
  const py::gil_scoped_release release;
  cpu::draw_restricted(problem, token.as<int64_t>(), isa, num_threads);
}

void largest_values(py::handle values_arg, int num_threads, py::handle out_arg) {
  const TensorView values(values_arg, "values", {DType::float32}, {kAny, kAny});
  const TensorView out(out_arg, "out", {DType::float32}, {values.size(0), kAny});
  if (out.size(1) > values.size(1))
    throw py::value_error("out: expected at most " + std::to_string(values.size(1)) + " columns, got " +
                          std::to_string(out.size(1)));
  check_num_threads(num_threads);
  const py::gil_scoped_release release;
  cpu::largest_values(values.as<const float>(), values.size(0), values.size(1), out.size(1), out.as<float>(),
                      num_threads);
}

}  // namespace

void bind_sample_rows(py::module_& m) {
  m.def("draw_restricted", &draw_restricted, py::arg("log_probs"), py::arg("tempered"),
        py::arg("probs").none(true), py::arg("most"), py::arg("top_p"), py::arg("seed"), py::arg("sequence"),
        py::arg("step"), py::arg("position"), py::arg("temperature"), py::arg("num_threads"),
        py::arg("token"));
  m.def("largest_values", &largest_values, py::arg("values"), py::arg("num_threads"), py::arg("out"));
  m.def("sample_rows", &sample_rows, py::arg("hidden"), py::arg("rows"), py::arg("norm"), py::arg("shift"),
        py::arg("gain"), py::arg("weight"), py::arg("bias"), py::arg("normalized"), py::arg("bf16"),
        py::arg("excluded_token"), py::arg("seed"), py::arg("sequence"), py::arg("step"), py::arg("position"),
        py::arg("temperature"), py::arg("num_threads"), py::arg("token"), py::arg("log_prob"),
        py::arg("top1_token"), py::arg("top1_prob"), py::arg("top2_prob"), py::arg("entropy"));
  m.def("quantized_size", &quantized_size, py::arg("vocab_size"), py::arg("width"));
  m.def("quantize_head", &quantize_head, py::arg("weight"), py::arg("bf16"), py::arg("num_threads"),
        py::arg("quantized"), py::arg("fresh"));
  m.attr("MOST_QUANTIZED_WIDTH") = cpu::kMostQuantizedWidth;
  m.def("sample_tokens", &sample_tokens, py::arg("hidden"), py::arg("rows"), py::arg("norm"),
        py::arg("shift"), py::arg("gain"), py::arg("weight"), py::arg("bias"), py::arg("normalized"),
        py::arg("bf16"), py::arg("quantized"), py::arg("excluded_token"), py::arg("seed"),
        py::arg("sequence"), py::arg("step"), py::arg("position"), py::arg("temperature"),
        py::arg("num_threads"), py::arg("token"), py::arg("finite"));
}

}  // namespace loopmdm
