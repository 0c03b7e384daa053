// Logits that are kept, in fp32: for draws that need a row's logits together, and for callers who want them.
#include "cuda/head/vocabulary_sm90.cuh"

namespace loopmdm {

struct HeadLogitsParameters {
  LogitsProblem problem;
  float* out;  // [R, V]
};

// A row begins at an even element or not: two columns are stored together only where all rows do.
template <bool kPairs>
__device__ inline void store_logits(const HeadLogitsParameters& p, const Logits& logits,
                                    const VocabularySeat& seat) {
  const int first = seat.first + seat.column(0), left = p.problem.vocab_size - first;  // columns that exist
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = seat.row_of(half);
    if (row >= p.problem.num_rows) continue;
    float* const line = p.out + static_cast<int64_t>(row) * p.problem.vocab_size + first;
#pragma unroll
    for (int group = 0; group < kChunkTokens / 8; ++group) {
      const float a = logits[4 * group + 2 * half], b = logits[4 * group + 2 * half + 1];
      if (kPairs) {
        if (8 * group < left) store_pair(line + 8 * group, make_float2(a, b));
      } else {
        if (8 * group < left) line[8 * group] = a;
        if (8 * group + 1 < left) line[8 * group + 1] = b;
      }
    }
  }
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::Vocabulary::kThreads, 1)
    head_logits_sm90(const __grid_constant__ loopmdm::HeadLogitsParameters p) {
  using namespace loopmdm;
  for_each_tile(p.problem, [&](const Logits& logits, const VocabularySeat& seat) {
    if (p.problem.vocab_size % 2 == 0) {
      store_logits<true>(p, logits, seat);
    } else {
      store_logits<false>(p, logits, seat);
    }
  });
}
