// Each chunk of logits of the masked rows is reduced to its largest and its sum of exponentials, and
// forgotten; the target's logit is kept. masked_cross_entropy_combine_sm90.cu combines the chunks of a row.
#include "cuda/head/vocabulary_sm90.cuh"

namespace loopmdm {

struct MaskedCrossEntropyParameters {
  LogitsProblem problem;
  const int64_t* targets;  // [T]
  const int64_t* rows;     // [R]
  float2* records;         // [chunks, R]: largest logit, sum of exp(logit - it)
  float* target_logit;     // [R]
};

__device__ inline float2 reduce_chunk(const Logits& logits, int half) {
  float largest = kLowestFloat, sum = 0;
#pragma unroll
  for (int group = 0; group < kChunkTokens / 8; ++group) {
    largest = fmaxf(largest, fmaxf(logits[4 * group + 2 * half], logits[4 * group + 2 * half + 1]));
  }
  largest = quad_max(largest);
#pragma unroll
  for (int group = 0; group < kChunkTokens / 8; ++group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) sum += fast_exp2((logits[4 * group + 2 * half + i] - largest) * kLog2E);
  }
  return make_float2(largest, quad_sum(sum));
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::Vocabulary::kThreads, 1)
    masked_cross_entropy_sm90(const __grid_constant__ loopmdm::MaskedCrossEntropyParameters p) {
  using namespace loopmdm;
  for_each_tile(p.problem, [&](const Logits& logits, const VocabularySeat& seat) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 record = reduce_chunk(logits, half);
      const int row = seat.row_of(half);
      if (row >= p.problem.num_rows || seat.first >= p.problem.vocab_size) continue;
      if (seat.thread % 4 == 0) {
        p.records[static_cast<int64_t>(seat.chunk) * p.problem.num_rows + row] = record;
      }
      const int64_t target = __ldg(p.targets + __ldg(p.rows + row)) - seat.first;
      if (target < 0 || target >= kChunkTokens) continue;
#pragma unroll
      for (int group = 0; group < kChunkTokens / 8; ++group) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int index = 4 * group + 2 * half + i;
          if (seat.column(index) == target) p.target_logit[row] = logits[index];
        }
      }
    }
  });
}
