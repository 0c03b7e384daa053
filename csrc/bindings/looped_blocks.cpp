#include "cpu/looped_blocks.h"

#include <optional>
#include <vector>

#include "bindings/ops.h"
#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

constexpr size_t kTensorsPerBlock = 8;

// blocks: for each block the tensors of BlockWeights, linear weights packed by pack_linear.
void looped_blocks(py::handle x_arg, const py::sequence& blocks_arg, py::handle modulation_arg,
                   py::handle num_loops_arg, int64_t heads, py::handle cos_arg, py::handle sin_arg,
                   py::handle key_mask_arg, bool narrow, double dropout, uint64_t dropout_seed,
                   double exit_threshold, int num_threads, py::handle out_arg, py::handle used_arg) {
  const TensorView x(x_arg, "x", {DType::float32}, {kAny, kAny, kAny});
  const int64_t batch = x.size(0), length = x.size(1), hidden = x.size(2);
  if (heads < 1 || hidden % (2 * heads) != 0)
    throw py::value_error("num_heads: got " + std::to_string(heads) + " for " + std::to_string(hidden));
  if (py::len(blocks_arg) == 0 || py::len(blocks_arg) % kTensorsPerBlock != 0)
    throw py::value_error("blocks: expected a multiple of 8 tensors, got " +
                          std::to_string(py::len(blocks_arg)));
  const int64_t num_blocks = static_cast<int64_t>(py::len(blocks_arg) / kTensorsPerBlock);
  const TensorView modulation(modulation_arg, "modulation", {DType::float32}, {num_blocks, kAny, 6, hidden});
  if (modulation.size(1) != 1 && modulation.size(1) != batch)
    throw py::value_error("modulation: expected 1 or " + std::to_string(batch) + " sequences");
  const TensorView num_loops(num_loops_arg, "num_loops", {DType::int64}, {batch});
  const TensorView out(out_arg, "out", {DType::float32}, {batch, length, hidden});
  const TensorView used(used_arg, "used", {DType::int64}, {batch});
  std::optional<TensorView> cos, sin, key_mask;
  if (!cos_arg.is_none()) {
    cos.emplace(cos_arg, "rotary.cos", std::initializer_list<DType>{DType::float32},
                std::initializer_list<int64_t>{length, hidden / heads / 2});
    sin.emplace(sin_arg, "rotary.sin", std::initializer_list<DType>{DType::float32},
                std::initializer_list<int64_t>{length, hidden / heads / 2});
  }
  if (!key_mask_arg.is_none())
    key_mask.emplace(key_mask_arg, "key_mask", std::initializer_list<DType>{DType::boolean},
                     std::initializer_list<int64_t>{batch, length});

  const cpu::Isa isa = cpu::current_isa();
  const cpu::LinearKernel& linear = cpu::linear_kernel(isa);
  const int64_t width = TensorView(blocks_arg[5], "mlp_in_bias", {DType::float32}, {kAny}).size(0);
  const int64_t head_dim = hidden / heads;
  const auto size = [&](int64_t columns, int64_t depth, int64_t unit) {
    return cpu::linear_layout(linear, columns, depth, unit, narrow).size();
  };
  std::vector<cpu::BlockPointers> blocks;
  for (size_t at = 0; at < py::len(blocks_arg); at += kTensorsPerBlock) {
    const auto packed = [&](size_t index, const char* name, int64_t words) {
      return TensorView(blocks_arg[at + index], name, {DType::int32}, {words}).as<const uint32_t>();
    };
    const auto vector = [&](size_t index, const char* name, int64_t elements) {
      return TensorView(blocks_arg[at + index], name, {DType::float32}, {elements}).as<const float>();
    };
    blocks.push_back({.query_key_value = packed(1, "qkv", 3 * size(hidden, hidden, head_dim)),
                      .attn_out = packed(2, "attn_out", size(hidden, hidden, 0)),
                      .mlp_in = packed(4, "mlp_in", size(width, hidden, 0)),
                      .mlp_out = packed(6, "mlp_out", size(hidden, width, 0)),
                      .norm1 = vector(0, "norm1", hidden),
                      .norm2 = vector(3, "norm2", hidden),
                      .mlp_in_bias = vector(5, "mlp_in_bias", width),
                      .mlp_out_bias = vector(7, "mlp_out_bias", hidden)});
  }
  const cpu::LoopedBlocksProblem problem = {
      .x = x.as<const float>(),
      .blocks = blocks.data(),
      .modulation = modulation.as<const float>(),
      .cos = cos ? cos->as<const float>() : nullptr,
      .sin = sin ? sin->as<const float>() : nullptr,
      .key_mask = key_mask ? key_mask->as<const bool>() : nullptr,
      .num_loops = num_loops.as<const int64_t>(),
      .batch = batch,
      .length = length,
      .hidden = hidden,
      .width = width,
      .heads = heads,
      .num_blocks = num_blocks,
      .modulation_rows = modulation.size(1),
      .exit_threshold = exit_threshold,
      .dropout = dropout,
      .dropout_seed = dropout_seed,
      .narrow = narrow,
  };
  const cpu::LoopedBlocksOutput output = {out.as<float>(), used.as<int64_t>()};
  const py::gil_scoped_release release;
  cpu::looped_blocks(problem, output, isa, num_threads);
}

}  // namespace

void bind_looped_blocks(py::module_& m) {
  m.def("looped_blocks", &looped_blocks, py::arg("x"), py::arg("blocks"), py::arg("modulation"),
        py::arg("num_loops"), py::arg("heads"), py::arg("cos"), py::arg("sin"), py::arg("key_mask"),
        py::arg("narrow"), py::arg("dropout"), py::arg("dropout_seed"), py::arg("exit_threshold"),
        py::arg("num_threads"), py::arg("out"), py::arg("used"));
}

}  // namespace loopmdm
