// Logits of some rows again, and their gradients (p - [target]) g, rounded to bf16 as operands of two
// products.
#include "cuda/head/vocabulary_sm90.cuh"

namespace loopmdm {

struct MaskedCrossEntropyBackwardParameters {
  LogitsProblem problem;
  const int64_t* targets;  // [T]
  const int64_t* rows;     // [R]
  const float* largest;    // [R], as the next two
  const float* log_sum;
  const float* upstream;  // gradient of -log p
  uint16_t* gradients;    // [R, pitch] bf16
  int64_t pitch;          // V, rounded up to whole chunks
};

__device__ inline void store_gradients(const MaskedCrossEntropyBackwardParameters& p, const Logits& logits,
                                       const VocabularySeat& seat, int half) {
  const int row = seat.row_of(half), known = min(row, p.problem.num_rows - 1);
  const float largest = __ldg(p.largest + known), log_sum = __ldg(p.log_sum + known);
  const float upstream = __ldg(p.upstream + known);
  // Counted from the thread's first column, so that each sum's is a constant.
  const int target = static_cast<int>(__ldg(p.targets + __ldg(p.rows + known))) - seat.first - seat.column(0);
  uint16_t* const line = p.gradients + known * p.pitch + seat.first + 8 * (seat.thread % 4);
  const bool store = row < p.problem.num_rows && seat.first < p.pitch;
#pragma unroll
  for (int part = 0; part < kChunkTokens / 32; ++part) {
    uint32_t words[4];
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      float values[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int index = 4 * (4 * part + group) + 2 * half + i;
        const float probability = fast_exp2((logits[index] - largest - log_sum) * kLog2E);
        values[i] = (probability - (target == 8 * (4 * part + group) + i ? 1.0f : 0.0f)) * upstream;
      }
      words[group] = pack_bf16(values[0], values[1]);
    }
    transpose_quad(words);
    if (store) {
      *reinterpret_cast<uint4*>(line + 32 * part) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::Vocabulary::kThreads, 1)
    masked_cross_entropy_backward_sm90(
        const __grid_constant__ loopmdm::MaskedCrossEntropyBackwardParameters p) {
  using namespace loopmdm;
  for_each_tile(p.problem, [&](const Logits& logits, const VocabularySeat& seat) {
    store_gradients(p, logits, seat, 0);
    store_gradients(p, logits, seat, 1);
  });
}
