// What one chunk of the vocabulary leaves of a row, and how records combine.
#pragma once

#include "cuda/tile/math.cuh"

namespace loopmdm {

constexpr float kLn2 = 0.6931471805599453f;

// Of several tokens the best by a score, the lowest of them on ties. -1: none has a score.
struct Best {
  float score, logit;
  int32_t token;

  __device__ void take(const Best& other) {
    if (other.score > score || (other.score == score && other.token < token)) *this = other;
  }

  // Of the lanes that differ in the bits below `lanes`; all of them get it.
  __device__ void across(int lanes) {
    for (int distance = 1; distance < lanes; distance *= 2) {
      take({__shfl_xor_sync(~0u, score, distance), __shfl_xor_sync(~0u, logit, distance),
            __shfl_xor_sync(~0u, token, distance)});
    }
  }
};

// The most probable token and the logit of the second.
struct Top {
  float first = kLowestFloat, second = kLowestFloat;
  int32_t token = -1;

  __device__ void take(const Top& other) {
    second = fmaxf(fminf(first, other.first), fmaxf(second, other.second));
    if (other.first > first || (other.first == first && other.token < token)) {
      first = other.first;
      token = other.token;
    }
  }

  __device__ void across(int lanes) {
    for (int distance = 1; distance < lanes; distance *= 2) {
      Top other;
      other.first = __shfl_xor_sync(~0u, first, distance);
      other.second = __shfl_xor_sync(~0u, second, distance);
      other.token = __shfl_xor_sync(~0u, token, distance);
      take(other);
    }
  }
};

struct alignas(16) SampleRecord {
  float sum, weighted;  // of exp(logit - first) and of that times (logit - first)
  Top top;
  Best drawn;
};
static_assert(sizeof(SampleRecord) == 32, "loopmdm_kernels/cuda/sample_rows.py");

}  // namespace loopmdm
