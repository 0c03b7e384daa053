#include "cpu/head/masked_cross_entropy.h"

#include <optional>

#include "bindings/ops.h"
#include "bindings/tensor_view.h"
#include "cpu/head/head_logits_backward.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

// The arguments that both directions share.
struct Arguments {
  cpu::MaskedCrossEntropyProblem problem;
  int64_t batch, length;

  Arguments(py::handle hidden_arg, py::handle rows_arg, py::handle targets_arg, py::handle norm_arg,
            py::handle shift_arg, py::handle gain_arg, py::handle weight_arg, py::handle bias_arg,
            bool normalized, int64_t excluded_token, bool bf16, int num_threads) {
    const TensorView hidden(hidden_arg, "hidden", {DType::float32}, {kAny, kAny, kAny});
    batch = hidden.size(0);
    length = hidden.size(1);
    const int64_t width = hidden.size(2);
    const TensorView rows(rows_arg, "rows", {DType::int64}, {kAny});
    std::optional<TensorView> targets;
    if (!targets_arg.is_none())
      targets.emplace(targets_arg, "targets", std::initializer_list<DType>{DType::int64},
                      std::initializer_list<int64_t>{rows.size(0)});
    const TensorView norm(norm_arg, "head.norm", {DType::float32}, {width});
    const TensorView shift(shift_arg, "shift", {DType::float32}, {kAny, width});
    const TensorView gain(gain_arg, "gain", {DType::float32}, {shift.size(0), width});
    const TensorView weight(weight_arg, "head.weight", {DType::float32, DType::bfloat16}, {kAny, width});
    const int64_t vocab_size = weight.size(0);
    const TensorView bias(bias_arg, "head.bias", {DType::float32}, {vocab_size});

    if (width == 0) throw py::value_error("hidden: expected a width of at least 1, got 0");
    if (shift.size(0) != 1 && shift.size(0) != batch)
      throw py::value_error("head.modulation: expected 1 or " + std::to_string(batch) + " sequences, got " +
                            std::to_string(shift.size(0)));
    constexpr int64_t kMaxVocab = (int64_t{1} << 31) - 1 - cpu::kTileTokens;  // token numbers are int32
    if (vocab_size < 1 || vocab_size > kMaxVocab)
      throw py::value_error("head.weight: expected 1.." + std::to_string(kMaxVocab) + " tokens, got " +
                            std::to_string(vocab_size));
    if (excluded_token < -1 || excluded_token >= vocab_size)
      throw py::value_error("head.excluded_token: expected -1 or a token of the vocabulary, got " +
                            std::to_string(excluded_token));
    check_num_threads(num_threads);
    check_range(rows, "rows", batch * length);
    if (targets) check_range(*targets, "targets", vocab_size);
    problem = {
        .hidden = hidden.as<const float>(),
        .rows = rows.as<const int64_t>(),
        .targets = targets ? targets->as<const int64_t>() : nullptr,
        .norm = norm.as<const float>(),
        .shift = shift.as<const float>(),
        .gain = gain.as<const float>(),
        .weight = weight.data(),
        .bias = bias.as<const float>(),
        .num_rows = rows.size(0),
        .rows_per_group = shift.size(0) == 1 ? batch * length : length,
        .num_modulations = shift.size(0),
        .width = width,
        .vocab_size = vocab_size,
        .excluded_token = excluded_token,
        .weight_is_bf16 = weight.dtype() == DType::bfloat16,
        .bf16 = bf16,
        .normalized = normalized,
    };
  }
};

// Memory for what the forward pass keeps of each tile; `largest` may be None, and `exponentials` too.
cpu::KeptTiles kept_tiles(const cpu::MaskedCrossEntropyProblem& p, py::handle largest,
                          py::handle exponentials) {
  cpu::KeptTiles kept = {};
  if (!largest.is_none())
    kept.largest = TensorView(largest, "tile_largest", {DType::float32},
                              {cpu::cross_entropy_tiles(p.vocab_size), p.num_rows})
                       .as<float>();
  if (exponentials.is_none()) return kept;
  if (largest.is_none()) throw py::value_error("exponentials: expected None where tile_largest is None");
  const TensorView memory(exponentials, "exponentials", {DType::float32, DType::bfloat16},
                          {p.vocab_size, p.width});
  kept.exponentials = memory.as<char>();
  kept.token_bytes = p.width * (memory.dtype() == DType::bfloat16 ? 2 : 4);
  return kept;
}

// Where gradients go; a None is not wanted.
cpu::MaskedCrossEntropyGradients wanted_gradients(const Arguments& arguments, const float* nll,
                                                  py::handle hidden, py::handle norm, py::handle shift,
                                                  py::handle scale, py::handle weight_arg, py::handle bias) {
  const cpu::MaskedCrossEntropyProblem& p = arguments.problem;
  const auto wanted = [](py::handle tensor, const char* name, std::initializer_list<int64_t> shape) {
    return tensor.is_none() ? nullptr : TensorView(tensor, name, {DType::float32}, shape).as<float>();
  };
  std::optional<TensorView> weight;
  if (!weight_arg.is_none())
    weight.emplace(weight_arg, "grad_weight", std::initializer_list<DType>{DType::float32, DType::bfloat16},
                   std::initializer_list<int64_t>{p.vocab_size, p.width});
  const bool weight_is_bf16 = weight && weight->dtype() == DType::bfloat16;
  if (weight_is_bf16 && p.num_rows > cpu::kGroupRows)
    throw py::value_error("grad_weight: expected float32 for more than " + std::to_string(cpu::kGroupRows) +
                          " rows");
  if (shift.is_none() != scale.is_none())
    throw py::value_error("grad_shift, grad_scale: expected both or none");
  return {
      .nll = nll,
      .hidden = wanted(hidden, "grad_hidden", {arguments.batch, arguments.length, p.width}),
      .norm = wanted(norm, "grad_norm", {p.width}),
      .shift = wanted(shift, "grad_shift", {p.num_modulations, p.width}),
      .scale = wanted(scale, "grad_scale", {p.num_modulations, p.width}),
      .weight = weight ? weight->as<void>() : nullptr,
      .bias = wanted(bias, "grad_bias", {p.vocab_size}),
      .weight_is_bf16 = weight_is_bf16,
  };
}

void masked_cross_entropy(py::handle hidden, py::handle rows, py::handle targets, py::handle norm,
                          py::handle shift, py::handle gain, py::handle weight, py::handle bias,
                          bool normalized, int64_t excluded_token, bool bf16, int num_threads,
                          py::handle row_weights_arg, py::handle total_arg, py::handle largest_arg,
                          py::handle sum_arg, py::handle nll_arg, py::handle tile_largest,
                          py::handle exponentials) {
  const Arguments arguments(hidden, rows, targets, norm, shift, gain, weight, bias, normalized,
                            excluded_token, bf16, num_threads);
  const int64_t num_rows = arguments.problem.num_rows;
  const TensorView row_weights(row_weights_arg, "row_weights", {DType::float32}, {num_rows});
  const TensorView total(total_arg, "total", {DType::float32}, {});
  const TensorView nll(nll_arg, "nll", {DType::float32}, {num_rows});
  const TensorView largest(largest_arg, "largest", {DType::float32}, {num_rows});
  const TensorView sum(sum_arg, "sum", {DType::float32}, {num_rows});
  const cpu::KeptTiles kept = kept_tiles(arguments.problem, tile_largest, exponentials);
  const cpu::Isa isa = cpu::current_isa();
  const py::gil_scoped_release release;
  cpu::masked_cross_entropy(arguments.problem, row_weights.as<const float>(), total.as<float>(),
                            {largest.as<float>(), sum.as<float>(), nll.as<float>()}, kept, isa, num_threads);
}

void masked_cross_entropy_backward(py::handle hidden, py::handle rows, py::handle targets, py::handle norm,
                                   py::handle shift, py::handle gain, py::handle weight, py::handle bias,
                                   bool normalized, int64_t excluded_token, bool bf16, int num_threads,
                                   py::handle largest_arg, py::handle sum_arg, py::handle nll_arg,
                                   py::handle tile_largest, py::handle exponentials, py::handle grad_nll_arg,
                                   py::handle grad_hidden, py::handle grad_norm, py::handle grad_shift,
                                   py::handle grad_scale, py::handle grad_weight, py::handle grad_bias) {
  const Arguments arguments(hidden, rows, targets, norm, shift, gain, weight, bias, normalized,
                            excluded_token, bf16, num_threads);
  const cpu::MaskedCrossEntropyProblem& p = arguments.problem;
  const TensorView largest(largest_arg, "largest", {DType::float32}, {p.num_rows});
  const TensorView sum(sum_arg, "sum", {DType::float32}, {p.num_rows});
  const TensorView nll(nll_arg, "nll", {DType::float32}, {p.num_rows});
  const TensorView grad_nll(grad_nll_arg, "grad_nll", {DType::float32}, {p.num_rows});
  const cpu::MaskedCrossEntropyGradients gradients =
      wanted_gradients(arguments, grad_nll.as<const float>(), grad_hidden, grad_norm, grad_shift, grad_scale,
                       grad_weight, grad_bias);
  const cpu::KeptTiles kept = kept_tiles(p, tile_largest, exponentials);
  if (tile_largest.is_none()) throw py::value_error("tile_largest: expected a tensor, got None");
  const cpu::Isa isa = cpu::current_isa();
  const py::gil_scoped_release release;
  cpu::masked_cross_entropy_backward(p, {largest.as<float>(), sum.as<float>(), nll.as<float>()}, kept,
                                     gradients, isa, num_threads);
}

void head_logits_backward(py::handle hidden, py::handle rows, py::handle norm, py::handle shift,
                          py::handle gain, py::handle weight, py::handle bias, bool normalized, bool bf16,
                          int num_threads, py::handle grad_logits_arg, py::handle grad_hidden,
                          py::handle grad_norm, py::handle grad_shift, py::handle grad_scale,
                          py::handle grad_weight, py::handle grad_bias) {
  const Arguments arguments(hidden, rows, py::none(), norm, shift, gain, weight, bias, normalized,
                            /*excluded_token=*/-1, bf16, num_threads);
  const cpu::MaskedCrossEntropyProblem& p = arguments.problem;
  const TensorView grad_logits(grad_logits_arg, "grad_logits", {bf16 ? DType::bfloat16 : DType::float32},
                               {arguments.batch * arguments.length, p.vocab_size});
  const cpu::MaskedCrossEntropyGradients gradients = wanted_gradients(
      arguments, nullptr, grad_hidden, grad_norm, grad_shift, grad_scale, grad_weight, grad_bias);
  const cpu::Isa isa = cpu::current_isa();
  const py::gil_scoped_release release;
  cpu::head_logits_backward(p, {grad_logits.data()}, gradients, isa, num_threads);
}

}  // namespace

void bind_masked_cross_entropy(py::module_& m) {
  m.attr("CROSS_ENTROPY_GROUP_ROWS") = cpu::kGroupRows;
  m.def("cross_entropy_tiles", &cpu::cross_entropy_tiles, py::arg("vocab_size"));
  m.def("masked_cross_entropy", &masked_cross_entropy, py::arg("hidden"), py::arg("rows"), py::arg("targets"),
        py::arg("norm"), py::arg("shift"), py::arg("gain"), py::arg("weight"), py::arg("bias"),
        py::arg("normalized"), py::arg("excluded_token"), py::arg("bf16"), py::arg("num_threads"),
        py::arg("row_weights"), py::arg("total"), py::arg("largest"), py::arg("sum"), py::arg("nll"),
        py::arg("tile_largest"), py::arg("exponentials"));
  m.def("masked_cross_entropy_backward", &masked_cross_entropy_backward, py::arg("hidden"), py::arg("rows"),
        py::arg("targets"), py::arg("norm"), py::arg("shift"), py::arg("gain"), py::arg("weight"),
        py::arg("bias"), py::arg("normalized"), py::arg("excluded_token"), py::arg("bf16"),
        py::arg("num_threads"), py::arg("largest"), py::arg("sum"), py::arg("nll"), py::arg("tile_largest"),
        py::arg("exponentials"), py::arg("grad_nll"), py::arg("grad_hidden"), py::arg("grad_norm"),
        py::arg("grad_shift"), py::arg("grad_scale"), py::arg("grad_weight"), py::arg("grad_bias"));
  m.def("head_logits_backward", &head_logits_backward, py::arg("hidden"), py::arg("rows"), py::arg("norm"),
        py::arg("shift"), py::arg("gain"), py::arg("weight"), py::arg("bias"), py::arg("normalized"),
        py::arg("bf16"), py::arg("num_threads"), py::arg("grad_logits"), py::arg("grad_hidden"),
        py::arg("grad_norm"), py::arg("grad_shift"), py::arg("grad_scale"), py::arg("grad_weight"),
        py::arg("grad_bias"));
}

}  // namespace loopmdm
