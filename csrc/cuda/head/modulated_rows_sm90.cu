// The selected rows of the stream after the final norm and its modulation, once: a row of the head meets
// hundreds of tiles of the vocabulary and would be normalised in each.
#include "cuda/head/modulated_row_sm90.cuh"

namespace loopmdm {

struct ModulatedRowsParameters {
  ModulatedRows source;
  uint16_t* out;  // [R, D] bf16
};

__device__ inline float modulated(float normalised, float norm, float scale, float shift) {
  return fmaf(normalised, norm * one_plus(scale), shift);
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::kRowThreads)
    modulated_rows_sm90(const __grid_constant__ loopmdm::ModulatedRowsParameters p) {
  using namespace loopmdm;
  const ModulatedRows& source = p.source;
  const int row = blockIdx.x * (kRowThreads / 32) + threadIdx.x / 32;
  if (row >= source.num_rows) return;
  const int64_t token = __ldg(source.rows + row), size = source.size;
  const float* const x = source.hidden + token * size;
  const uint16_t* const shift = source.shift(token);
  const RowMoments moments(x, source.size);
  for (int column = 4 * (threadIdx.x % 32); column < source.size; column += 128) {
    const float4 values = load_row(x, column), norm = load_row(source.norm, column);
    const float4 a = load_bf16_row(shift, column), b = load_bf16_row(shift + size, column);
    const uint2 out = {pack_bf16(modulated(moments.normalised(values.x), norm.x, b.x, a.x),
                                 modulated(moments.normalised(values.y), norm.y, b.y, a.y)),
                       pack_bf16(modulated(moments.normalised(values.z), norm.z, b.z, a.z),
                                 modulated(moments.normalised(values.w), norm.w, b.w, a.w))};
    *reinterpret_cast<uint2*>(p.out + row * size + column) = out;
  }
}
