#include "cpu/looped_blocks/looped_blocks.h"

#include <algorithm>
#include <vector>

#include "bindings/blocks.h"
#include "bindings/ops.h"
#include "bindings/tensor_view.h"
#include "cpu/looped_blocks/looped_blocks_backward.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

using Dims = std::initializer_list<int64_t>;

template <class T>
T* optional(py::handle tensor, const char* name, DType dtype, Dims shape) {
  return tensor.is_none() ? nullptr : TensorView(tensor, name, {dtype}, shape).as<T>();
}

// The arguments both directions share, checked.
struct Arguments {
  cpu::LoopedBlocksProblem problem;
  std::vector<cpu::BlockPointers> blocks;
  cpu::Isa isa;

  Arguments(py::handle x_arg, const py::sequence& blocks_arg, py::handle modulation_arg,
            py::handle num_loops_arg, int64_t heads, py::handle cos_arg, py::handle sin_arg,
            py::handle key_mask_arg, bool bf16, double dropout, uint64_t dropout_seed, int64_t first_loop)
      : isa(cpu::current_isa()) {
    const TensorView x(x_arg, "x", {DType::float32}, {kAny, kAny, kAny});
    const int64_t batch = x.size(0), length = x.size(1), hidden = x.size(2);
    if (heads < 1 || hidden % (2 * heads) != 0)
      throw py::value_error("num_heads: got " + std::to_string(heads) + " for " + std::to_string(hidden));
    const int64_t width = block_width(blocks_arg);
    blocks = block_pointers(blocks_arg, hidden, width, heads, bf16, isa);
    const int64_t num_blocks = static_cast<int64_t>(blocks.size());
    const TensorView modulation(modulation_arg, "modulation", {DType::float32},
                                {num_blocks, kAny, 6, hidden});
    if (modulation.size(1) != 1 && modulation.size(1) != batch)
      throw py::value_error("modulation: expected 1 or " + std::to_string(batch) + " sequences");
    const int64_t half = hidden / heads / 2;
    problem = {
        .x = x.as<const float>(),
        .blocks = blocks.data(),
        .modulation = modulation.as<const float>(),
        .cos = optional<const float>(cos_arg, "rotary.cos", DType::float32, {length, half}),
        .sin = optional<const float>(sin_arg, "rotary.sin", DType::float32, {length, half}),
        .key_mask = optional<const bool>(key_mask_arg, "key_mask", DType::boolean, {batch, length}),
        .num_loops = TensorView(num_loops_arg, "num_loops", {DType::int64}, {batch}).as<const int64_t>(),
        .batch = batch,
        .length = length,
        .hidden = hidden,
        .width = width,
        .heads = heads,
        .num_blocks = num_blocks,
        .modulation_rows = modulation.size(1),
        .first_loop = first_loop,
        .exit_threshold = -1,
        .dropout = dropout,
        .dropout_seed = dropout_seed,
        .bf16 = bf16,
    };
  }

  int64_t most_loops() const {
    return *std::max_element(problem.num_loops, problem.num_loops + problem.batch);
  }
};

// Bytes that record one application of a block to one sequence.
int64_t record_bytes(int64_t length, int64_t hidden, int64_t width, int64_t heads, bool bf16) {
  cpu::LoopedBlocksProblem problem{};
  problem.length = length;
  problem.hidden = hidden;
  problem.width = width;
  problem.heads = heads;
  problem.bf16 = bf16;
  return cpu::block_shape(problem, cpu::current_isa()).record_bytes();
}

int64_t padded_columns(int64_t columns) {
  return cpu::round_up(columns, 2 * cpu::linear_kernel(cpu::current_isa()).lanes);
}

void looped_blocks(py::handle x, const py::sequence& blocks, py::handle modulation, py::handle num_loops,
                   int64_t heads, py::handle cos, py::handle sin, py::handle key_mask, bool bf16,
                   double dropout, uint64_t dropout_seed, int64_t first_loop, double exit_threshold,
                   int num_threads, py::handle out_arg, py::handle used_arg, py::handle loop_inputs,
                   py::handle records_arg) {
  check_num_threads(num_threads);
  Arguments a(x, blocks, modulation, num_loops, heads, cos, sin, key_mask, bf16, dropout, dropout_seed,
              first_loop);
  cpu::LoopedBlocksProblem& p = a.problem;
  p.exit_threshold = exit_threshold;
  const TensorView out(out_arg, "out", {DType::float32}, {p.batch, p.length, p.hidden});
  const TensorView used(used_arg, "used", {DType::int64}, {p.batch});
  const int64_t most = a.most_loops(), bytes = record_bytes(p.length, p.hidden, p.width, p.heads, bf16);
  const cpu::LoopedBlocksOutput output = {
      .x = out.as<float>(),
      .loops_used = used.as<int64_t>(),
      .loop_inputs =
          optional<float>(loop_inputs, "loop_inputs", DType::float32, {most, p.batch, p.length, p.hidden}),
      .records = optional<char>(records_arg, "records", DType::uint8, {most * p.num_blocks, p.batch, bytes})};
  const py::gil_scoped_release release;
  cpu::looped_blocks(p, output, a.isa, num_threads);
}

// grad_x: of the result, becomes that of x. transposed: four packed weights a block. gradients: seven
// accumulators a block, in the order of BlockGradients; weights [out, padded in], overwritten by the first
// sums unless `add`, which needs a sequence with a loop. nanoseconds: int64 [4],
// those of each phase are added to it; or None.
void looped_blocks_backward(py::handle grad_x, const py::sequence& blocks, const py::sequence& transposed_arg,
                            py::handle modulation, py::handle num_loops, int64_t heads, py::handle cos,
                            py::handle sin, py::handle key_mask, bool bf16, double dropout,
                            uint64_t dropout_seed, int64_t first_loop, int num_threads,
                            py::handle records_arg, const py::sequence& gradients_arg, bool add,
                            py::handle nanoseconds) {
  check_num_threads(num_threads);
  Arguments a(grad_x, blocks, modulation, num_loops, heads, cos, sin, key_mask, bf16, dropout, dropout_seed,
              first_loop);
  const cpu::LoopedBlocksProblem& p = a.problem;
  const cpu::LinearKernel& linear = cpu::linear_kernel(a.isa);
  const int64_t d = p.hidden, f = p.width, bytes = record_bytes(p.length, d, f, p.heads, bf16);
  const auto size = [&](int64_t columns, int64_t depth) {
    return cpu::linear_layout(linear, columns, depth, 0, bf16).size();
  };
  const size_t n = static_cast<size_t>(p.num_blocks);
  if (py::len(transposed_arg) != 4 * n || py::len(gradients_arg) != 7 * n)
    throw py::value_error("transposed, gradients: expected 4 and 7 tensors a block");
  std::vector<cpu::TransposedPointers> transposed;
  std::vector<cpu::BlockGradients> gradients;
  for (size_t i = 0; i < n; ++i) {
    const auto packed = [&](size_t index, const char* name, int64_t words) {
      return TensorView(transposed_arg[4 * i + index], name, {DType::int32}, {words}).as<const uint32_t>();
    };
    transposed.push_back(
        {packed(0, "transposed qkv", size(d, 3 * d)), packed(1, "transposed attn_out", size(d, d)),
         packed(2, "transposed mlp_in", size(d, f)), packed(3, "transposed mlp_out", size(f, d))});
    const auto sum = [&](size_t index, const char* name, Dims shape) {
      return TensorView(gradients_arg[7 * i + index], name, {DType::float32}, shape).as<float>();
    };
    gradients.push_back({sum(0, "gradient of qkv", {3 * d, padded_columns(d)}),
                         sum(1, "gradient of attn_out", {d, padded_columns(d)}),
                         sum(2, "gradient of mlp_in", {f, padded_columns(d)}),
                         sum(3, "gradient of mlp_out", {d, padded_columns(f)}),
                         sum(4, "gradient of mlp_in_bias", {f}), sum(5, "gradient of mlp_out_bias", {d}),
                         sum(6, "gradient of modulation", {p.modulation_rows, 6, d})});
  }
  const TensorView records(records_arg, "records", {DType::uint8},
                           {a.most_loops() * p.num_blocks, p.batch, bytes});
  const cpu::LoopedBlocksBackwardProblem problem = {
      .forward = p,
      .transposed = transposed.data(),
      .records = records.as<char>(),
      .grad_x = const_cast<float*>(p.x),
      .gradients = gradients.data(),
      .add = add,
      .nanoseconds = optional<int64_t>(nanoseconds, "nanoseconds", DType::int64, {cpu::kBackwardPhases}),
  };
  const py::gil_scoped_release release;
  cpu::looped_blocks_backward(problem, a.isa, num_threads);
}

}  // namespace

void bind_looped_blocks(py::module_& m) {
  m.def("record_bytes", &record_bytes, py::arg("length"), py::arg("hidden"), py::arg("width"),
        py::arg("heads"), py::arg("bf16"));
  m.def("padded_columns", &padded_columns, py::arg("columns"));
  m.def("looped_blocks", &looped_blocks, py::arg("x"), py::arg("blocks"), py::arg("modulation"),
        py::arg("num_loops"), py::arg("heads"), py::arg("cos"), py::arg("sin"), py::arg("key_mask"),
        py::arg("bf16"), py::arg("dropout"), py::arg("dropout_seed"), py::arg("first_loop"),
        py::arg("exit_threshold"), py::arg("num_threads"), py::arg("out"), py::arg("used"),
        py::arg("loop_inputs"), py::arg("records"));
  m.def("looped_blocks_backward", &looped_blocks_backward, py::arg("grad_x"), py::arg("blocks"),
        py::arg("transposed"), py::arg("modulation"), py::arg("num_loops"), py::arg("heads"), py::arg("cos"),
        py::arg("sin"), py::arg("key_mask"), py::arg("bf16"), py::arg("dropout"), py::arg("dropout_seed"),
        py::arg("first_loop"), py::arg("num_threads"), py::arg("records"), py::arg("gradients"),
        py::arg("add"), py::arg("nanoseconds") = py::none());
}

}  // namespace loopmdm
