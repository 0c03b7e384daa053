// The chunks of each row, one warp a row: -log p of its target, and what backward needs to know of its
// softmax.
#include "cuda/tile/math.cuh"

namespace loopmdm {

struct MaskedCrossEntropyCombineParameters {
  const float2* records;      // [chunks, R]
  const float* target_logit;  // [R]
  float* nll;                 // [R]
  float* largest;             // [R] the largest logit
  float* log_sum;             // [R] log of the sum relative to it
  int32_t num_rows, chunks;
};

constexpr int kCrossEntropyCombineThreads = 256;

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::kCrossEntropyCombineThreads)
    masked_cross_entropy_combine_sm90(
        const __grid_constant__ loopmdm::MaskedCrossEntropyCombineParameters p) {
  using namespace loopmdm;
  const int row = blockIdx.x * (kCrossEntropyCombineThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= p.num_rows) return;
  float largest = kLowestFloat, total = 0;
  for (int chunk = lane; chunk < p.chunks; chunk += 32) {
    largest = fmaxf(largest, p.records[static_cast<int64_t>(chunk) * p.num_rows + row].x);
  }
  largest = warp_max(largest);
  for (int chunk = lane; chunk < p.chunks; chunk += 32) {
    const float2 record = p.records[static_cast<int64_t>(chunk) * p.num_rows + row];
    total += record.y * expf(record.x - largest);
  }
  const float log_sum = logf(warp_sum(total));
  if (lane != 0) return;
  p.nll[row] = log_sum + (largest - p.target_logit[row]);
  p.largest[row] = largest;
  p.log_sum[row] = log_sum;
}
