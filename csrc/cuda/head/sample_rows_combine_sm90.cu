// The chunks of each row, one warp a row: its token and the statistics of its distribution.
#include "cuda/head/sample_rows_record_sm90.cuh"

namespace loopmdm {

struct SampleRowsCombineParameters {
  const SampleRecord* records;  // [chunks, R]
  int64_t* token;               // [R], as all that follow
  float* log_prob;
  int64_t* top1_token;
  float* top1_prob;
  float* top2_prob;
  float* entropy;
  int32_t num_rows, chunks;
  int32_t fallback;  // the token where no logit is a number
  int32_t race;      // 0: the most probable token is taken
};

constexpr int kCombineThreads = 256;

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::kCombineThreads)
    sample_rows_combine_sm90(const __grid_constant__ loopmdm::SampleRowsCombineParameters p) {
  using namespace loopmdm;
  const int row = blockIdx.x * (kCombineThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.num_rows) return;
  Top top;
  Best drawn{-LOOPMDM_INFINITY, -LOOPMDM_INFINITY, -1};
  for (int chunk = lane; chunk < p.chunks; chunk += 32) {
    const SampleRecord& record = p.records[static_cast<int64_t>(chunk) * p.num_rows + row];
    top.take(record.top);
    drawn.take(record.drawn);
  }
  top.across(32);
  drawn.across(32);
  float sum = 0, weighted = 0;
  for (int chunk = lane; chunk < p.chunks; chunk += 32) {
    const SampleRecord& record = p.records[static_cast<int64_t>(chunk) * p.num_rows + row];
    const float fall = record.top.first - top.first, decay = expf(fall);
    sum += record.sum * decay;
    if (decay > 0) weighted += (record.weighted + record.sum * fall) * decay;
  }
  sum = warp_sum(sum);
  weighted = warp_sum(weighted);
  if (lane != 0) return;
  const float log_sum = logf(sum);
  const int32_t top1_token = top.token < 0 ? p.fallback : top.token;
  const int32_t drawn_token = drawn.token < 0 ? p.fallback : drawn.token;
  p.token[row] = p.race ? drawn_token : top1_token;
  p.log_prob[row] = (p.race ? drawn.logit : top.first) - top.first - log_sum;
  p.top1_token[row] = top1_token;
  p.top1_prob[row] = 1.0f / sum;
  p.top2_prob[row] = expf(top.second - top.first) / sum;
  p.entropy[row] = log_sum - weighted / sum;
}
