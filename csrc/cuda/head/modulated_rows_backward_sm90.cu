// From the gradients of the modulated rows to those of the stream, and the sums over rows that the gradients
// of norm and modulation are made of. A block has some rows of the list, of one sequence where each has its
// own modulation: its warps take rows, then its threads columns.
#include "cuda/head/modulated_row_sm90.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/warps.cuh"

namespace loopmdm {

struct ModulatedRowsBackwardParameters {
  ModulatedRows source;
  const float* grad;   // [R, D] of the modulated rows
  float* grad_hidden;  // [T, D], added to
  float* sums;         // [1 or B, parts, 2, D]: of gradient times normalised row, of gradient
  int32_t parts;
};

constexpr int kRowsOfPart = 32;

struct PartRow {
  const float* values;  // of the stream; null: not this block's
  float mean, inverse_deviation;
};

// The gradient of the row goes through modulation and norm. A row may be listed twice: hence the atomics.
__device__ inline void row_backward(const ModulatedRows& source, int64_t token, const float* grad,
                                    const RowMoments& moments, float* grad_hidden) {
  const int lane = threadIdx.x % 32;
  const float* const x = source.hidden + token * source.size;
  const uint16_t* const scale = source.shift(token) + source.size;
  const auto inner = [&](int column) {
    return __ldg(grad + column) * __ldg(source.norm + column) *
           one_plus(unpack_bf16(__ldg(scale + column)).x);
  };
  float total = 0, with_row = 0;
  for (int column = lane; column < source.size; column += 32) {
    const float value = inner(column);
    total += value;
    with_row = fmaf(value, moments.normalised(__ldg(x + column)), with_row);
  }
  const float of_mean = warp_sum(total) / source.size, of_deviation = warp_sum(with_row) / source.size;
  for (int column = lane; column < source.size; column += 32) {
    const float normalised = moments.normalised(__ldg(x + column));
    atomicAdd(grad_hidden + token * source.size + column,
              (inner(column) - of_mean - normalised * of_deviation) * moments.inverse_deviation);
  }
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::kRowThreads)
    modulated_rows_backward_sm90(const __grid_constant__ loopmdm::ModulatedRowsBackwardParameters p) {
  using namespace loopmdm;
  const ModulatedRows& source = p.source;
  const int64_t size = source.size;
  const int sequence = blockIdx.x / p.parts, first = blockIdx.x % p.parts * kRowsOfPart;
  const int rows = min(kRowsOfPart, source.num_rows - first);
  PartRow* const part = reinterpret_cast<PartRow*>(dynamic_shared_memory());
  for (int i = threadIdx.x / 32; i < rows; i += kRowThreads / 32) {
    const int64_t token = __ldg(source.rows + first + i);
    const float* const x = source.hidden + token * size;
    const bool mine = source.modulation_stride == 0 || source.sequence(token) == sequence;
    const RowMoments moments(x, source.size);
    if (mine) row_backward(source, token, p.grad + (first + i) * size, moments, p.grad_hidden);
    if (threadIdx.x % 32 == 0) part[i] = {mine ? x : nullptr, moments.mean, moments.inverse_deviation};
  }
  meet<1>(kRowThreads);
  float* const sums = p.sums + static_cast<int64_t>(blockIdx.x) * 2 * size;
  for (int column = threadIdx.x; column < source.size; column += kRowThreads) {
    float product = 0, total = 0;
    for (int i = 0; i < rows; ++i) {
      const PartRow row = part[i];
      if (!row.values) continue;
      const float grad = __ldg(p.grad + (first + i) * size + column);
      product = fmaf(grad, (__ldg(row.values + column) - row.mean) * row.inverse_deviation, product);
      total += grad;
    }
    sums[column] = product;
    sums[size + column] = total;
  }
}
