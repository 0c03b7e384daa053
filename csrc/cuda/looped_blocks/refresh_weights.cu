// Brings packed weights up to date where parameters were written to unnoticed. A block looks at 32 bytes of
// every 256 of its chunk of a parameter; if their fingerprint is not the one of the last time, it converts
// the chunk again. The host learns nothing of it and waits for nothing, and a CUDA graph does it at every
// replay.
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/numbers.cuh"

namespace loopmdm {

constexpr int kRefreshThreads = 256;
constexpr int kSampledWords = 8, kSampleStride = 64;

struct Chunk {
  const void* source;
  void* target;
  int64_t elements;                    // even
  int32_t source_bytes, target_bytes;  // of an element: 2 is bf16, 4 is fp32
};

struct RefreshArguments {
  const Chunk* chunks;
  uint64_t* fingerprints;
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
  const int number = static_cast<int>(chunk.elements * chunk.source_bytes / 4);
  uint64_t sum = 0;
  for (int i = threadIdx.x;; i += kRefreshThreads) {
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
  for (int warp = 0; warp < kRefreshThreads / 32; ++warp) total += sums[warp];
  return total;
}

__device__ inline void convert(const Chunk& chunk) {
  const auto* const floats = static_cast<const float*>(chunk.source);
  const auto* const words = static_cast<const uint32_t*>(chunk.source);
  for (int64_t pair = threadIdx.x; pair < chunk.elements / 2; pair += kRefreshThreads) {
    float2 values;
    if (chunk.source_bytes == 4) {
      values = make_float2(floats[2 * pair], floats[2 * pair + 1]);
    } else {
      values = unpack_bf16(words[pair]);
    }
    if (chunk.target_bytes == 4) {
      store_pair(static_cast<float*>(chunk.target) + 2 * pair, values);
    } else {
      static_cast<uint32_t*>(chunk.target)[pair] = pack_bf16(values.x, values.y);
    }
  }
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::kRefreshThreads)
    refresh_weights(const __grid_constant__ loopmdm::RefreshArguments given) {
  using namespace loopmdm;
  const Chunk chunk = given.chunks[blockIdx.x];
  const uint64_t found = fingerprint_of(chunk);
  if (found == given.fingerprints[blockIdx.x]) return;
  __syncthreads();  // all threads have read the old one
  convert(chunk);
  if (threadIdx.x == 0) given.fingerprints[blockIdx.x] = found;
}
