#include "bindings/blocks.h"

#include <string>

#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

constexpr size_t kTensorsPerBlock = 8;

}  // namespace

int64_t block_width(const py::sequence& blocks) {
  if (py::len(blocks) == 0 || py::len(blocks) % kTensorsPerBlock != 0)
    throw py::value_error("blocks: expected a multiple of 8 tensors, got " + std::to_string(py::len(blocks)));
  return TensorView(blocks[5], "mlp_in_bias", {DType::float32}, {kAny}).size(0);
}

std::vector<cpu::BlockPointers> block_pointers(const py::sequence& blocks, int64_t hidden, int64_t width,
                                               int64_t heads, bool bf16, cpu::Isa isa) {
  const cpu::LinearKernel& linear = cpu::linear_kernel(isa);
  const auto size = [&](int64_t columns, int64_t depth, int64_t head_dim) {
    return cpu::linear_layout(linear, columns, depth, head_dim, bf16).size();
  };
  std::vector<cpu::BlockPointers> pointers;
  for (size_t at = 0; at < py::len(blocks); at += kTensorsPerBlock) {
    const auto packed = [&](size_t index, const char* name, int64_t words) {
      return TensorView(blocks[at + index], name, {DType::int32}, {words}).as<const uint32_t>();
    };
    const auto vector = [&](size_t index, const char* name, int64_t elements) {
      return TensorView(blocks[at + index], name, {DType::float32}, {elements}).as<const float>();
    };
    pointers.push_back({.qkv = packed(1, "qkv", 3 * size(hidden, hidden, hidden / heads)),
                        .attn_out = packed(2, "attn_out", size(hidden, hidden, 0)),
                        .mlp_in = packed(4, "mlp_in", size(width, hidden, 0)),
                        .mlp_out = packed(6, "mlp_out", size(hidden, width, 0)),
                        .norm1 = vector(0, "norm1", hidden),
                        .norm2 = vector(3, "norm2", hidden),
                        .mlp_in_bias = vector(5, "mlp_in_bias", width),
                        .mlp_out_bias = vector(7, "mlp_out_bias", hidden)});
  }
  return pointers;
}

}  // namespace loopmdm
