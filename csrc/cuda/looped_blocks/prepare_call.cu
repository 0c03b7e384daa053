// The one node before the kernel of a call. Its first blocks bring packed weights up to date, one a chunk;
// the others fold norms and modulation into what the kernel multiplies by, and set counters and numbers of
// loops. Norms are read where the weights' owner has them: their packed copies may be written meanwhile.
#include "cuda/looped_blocks/refresh_weights.cuh"

namespace loopmdm {

struct PrepareArguments {
  const Chunk* chunks;  // those of the norms first; null if all weights have just been packed
  uint64_t* fingerprints;
  const float* norms;        // packed, [n, 2, D]: read if there are no chunks
  const void* modulation;    // [n, sequences, 6, D], the last two without gaps
  const int64_t* num_loops;  // of each sequence; null: `loops` for all
  float4* affine;            // [n, sequences, 2, D / 2]: gain, gain, shift, shift of two columns
  float* gate;               // [n, sequences, 2, D]
  int32_t* counters;
  int32_t* stop;  // [B + 1]: loops of each sequence, then the largest of them
  int64_t layer_stride, sequence_stride, loops_stride;  // elements
  int32_t num_chunks, norm_chunks;                      // of all weights, of one norm
  int32_t modulation_kind, layers, sequences, hidden, batch;
  int32_t num_counters;  // of the table; behind them progress of each sequence, and two more
  int32_t progress;      // at the beginning
  int32_t loops;
};

// Columns 2 i and 2 i + 1 of a branch of a layer, for one sequence.
__device__ inline void fold(const PrepareArguments& p, int64_t i) {
  const int pairs = p.hidden / 2;
  const int column = static_cast<int>(i % pairs), branch = static_cast<int>(i / pairs % 2);
  const int64_t row = i / pairs / 2, layer = row / p.sequences, sequence = row % p.sequences;
  if (layer >= p.layers) return;
  const int64_t first = (layer * p.layer_stride + sequence * p.sequence_stride) / 2 + 3 * branch * pairs;
  const auto given = [&](int vector) {
    return pair_of(p.modulation, p.modulation_kind, first + vector * pairs + column);
  };
  const float2 shift = given(0), scale = given(1), gate = given(2);
  const int64_t norm_row = 2 * layer + branch;
  const Chunk* const chunk = p.chunks ? p.chunks + norm_row * p.norm_chunks : nullptr;
  const float2 norm = chunk ? pair_of(chunk->source, chunk->kind, column)
                            : pair_of(p.norms + norm_row * p.hidden, kFloat, column);
  store(p.affine + i,
        make_float4(fmaf(norm.x, scale.x, norm.x), fmaf(norm.y, scale.y, norm.y), shift.x, shift.y));
  store_pair(p.gate + 2 * i, gate);
}

__device__ inline void set_loops(const PrepareArguments& p) {
  int32_t longest = 0;
  for (int i = threadIdx.x; i < p.batch; i += 32) {
    const int32_t loops = p.num_loops ? static_cast<int32_t>(p.num_loops[i * p.loops_stride]) : p.loops;
    store(p.stop + i, loops);
    longest = max(longest, loops);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    longest = max(longest, __shfl_xor_sync(~0u, longest, distance));
  }
  if (threadIdx.x == 0) store(p.stop + p.batch, longest);
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::kPrepareThreads)
    prepare_call(const __grid_constant__ loopmdm::PrepareArguments given) {
  using namespace loopmdm;
  const int block = static_cast<int>(blockIdx.x) - given.num_chunks;
  if (block < 0) return refresh(given.chunks[blockIdx.x], given.fingerprints + blockIdx.x);
  const int64_t i = static_cast<int64_t>(block) * kPrepareThreads + threadIdx.x;
  fold(given, i);
  const int64_t progress = i - given.num_counters;
  if (progress < given.batch + 2) {
    store(given.counters + i, progress >= 0 && progress < given.batch ? given.progress : 0);
  }
  if (block == 0 && threadIdx.x < 32) set_loops(given);
}
