// Brings packed weights up to date where parameters were written to unnoticed. A block looks at 32 bytes of
// every 256 of its chunk of a parameter; if their fingerprint is not the one of the last time, it converts
// the chunk again. The host learns nothing of it and waits for nothing, and a CUDA graph does it at every
// replay.
#pragma once

#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/numbers.cuh"

namespace loopmdm {

constexpr int kPrepareThreads = 256;
constexpr int kSampledWords = 8, kSampleStride = 64;

// Of numbers that somebody else has made; refresh.py counts them the same way.
constexpr int32_t kFloat = 0, kBfloat = 1, kHalf = 2;

// Two of them that lie side by side, from where four bytes are aligned.
__device__ inline float2 pair_of(const void* values, int32_t kind, int64_t pair) {
  if (kind == kFloat) {
    const auto* const floats = static_cast<const float*>(values) + 2 * pair;
    return make_float2(floats[0], floats[1]);
  }
  const uint32_t word = static_cast<const uint32_t*>(values)[pair];
  return kind == kBfloat ? unpack_bf16(word) : unpack_half(word);
}

struct Chunk {
  const void* source;
  void* target;
  int64_t elements;  // even
  int32_t kind;      // of the source
  int32_t floats;    // whether the target is fp32; else it is bf16

  __device__ int words() const { return static_cast<int>(kind == kFloat ? elements : elements / 2); }
};

// The finaliser of SplitMix64 (Steele, Lea, Flood, 2014), of a word and its place.
__device__ inline uint64_t mixed_bits(uint32_t word, uint32_t place) {
  uint64_t x = (static_cast<uint64_t>(place + 1) << 32 | word) * 0x9E3779B97F4A7C15ull;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return x ^ x >> 31;
}

__device__ inline uint64_t fingerprint_of(const Chunk& chunk) {
  const auto* const words = static_cast<const uint32_t*>(chunk.source);
  const int number = chunk.words();
  uint64_t sum = 0;
  for (int i = threadIdx.x;; i += kPrepareThreads) {
    const int place = i / kSampledWords * kSampleStride + i % kSampledWords;
    if (i / kSampledWords * kSampleStride >= number) break;
    if (place < number) sum += mixed_bits(words[place], place);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  auto* const sums = reinterpret_cast<uint64_t*>(dynamic_shared_memory());
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  uint64_t total = 0;
  for (int warp = 0; warp < kPrepareThreads / 32; ++warp) total += sums[warp];
  return total;
}

__device__ inline void convert(const Chunk& chunk) {
  for (int64_t pair = threadIdx.x; pair < chunk.elements / 2; pair += kPrepareThreads) {
    const float2 values = pair_of(chunk.source, chunk.kind, pair);
    if (chunk.floats) {
      store_pair(static_cast<float*>(chunk.target) + 2 * pair, values);
    } else {
      static_cast<uint32_t*>(chunk.target)[pair] = pack_bf16(values.x, values.y);
    }
  }
}

__device__ inline void refresh(const Chunk& chunk, uint64_t* fingerprint) {
  const uint64_t found = fingerprint_of(chunk);
  if (found == *fingerprint) return;
  __syncthreads();  // all threads have read the old one
  convert(chunk);
  if (threadIdx.x == 0) *fingerprint = found;
}

}  // namespace loopmdm
