// One pass over the vocabulary for the rows to be revealed: each chunk of logits is reduced to its sums, its
// two largest logits and the winner of its exponential race, and forgotten. sample_rows_combine_sm90.cu
// combines the chunks of a row.
#include "common/philox.h"
#include "common/race.h"
#include "cuda/head/sample_rows_record_sm90.cuh"
#include "cuda/head/vocabulary_sm90.cuh"

namespace loopmdm {

struct SampleRowsParameters {
  LogitsProblem problem;
  float inverse_temperature;  // 0: no race
  const int64_t* sequence;    // [R], as step and position
  const int64_t* step;
  const int64_t* position;
  SampleRecord* records;  // [chunks, R]
  uint64_t seed;
};

__device__ inline Top top_of(const Logits& logits, const VocabularySeat& seat, int half) {
  Top top;
#pragma unroll
  for (int group = 0; group < kChunkTokens / 8; ++group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = logits[4 * group + 2 * half + i];
      top.second = fmaxf(top.second, fminf(top.first, x));
      if (x > top.first) {
        top.first = x;
        top.token = 8 * group + i;
      }
    }
  }
  if (top.token >= 0) top.token += seat.first + seat.column(0);
  top.across(4);
  return top;
}

// Exponents in base 2; what lies below the range of a float counts as its smallest power, and NaN stays.
__device__ inline void add_exponentials(const Logits& logits, int half, SampleRecord& record) {
  float sum = 0, weighted = 0;
#pragma unroll
  for (int group = 0; group < kChunkTokens / 8; ++group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float rest = (logits[4 * group + 2 * half + i] - record.top.first) * kLog2E;
      const float exponent = larger_or_nan(rest, -126.0f), power = fast_exp2(exponent);
      sum += power;
      weighted = fmaf(power, exponent, weighted);
    }
  }
  record.sum = quad_sum(sum);
  record.weighted = quad_sum(weighted) * kLn2;
}

// Who races: the names of a row's random numbers.
struct Racer {
  uint32_t position, step, sequence;

  __device__ Racer(const SampleRowsParameters& p, int row) {
    const int known = min(row, p.problem.num_rows - 1);
    position = static_cast<uint32_t>(__ldg(p.position + known));
    step = static_cast<uint32_t>(__ldg(p.step + known));
    sequence = static_cast<uint32_t>(__ldg(p.sequence + known));
  }

  __device__ PhiloxWords words(PhiloxKey key, uint32_t counter) const {
    return philox4x32(key, counter, position, step, sequence);
  }
};

__device__ inline float race_score(float logit, float inverse_temperature, float uniform) {
  const float time = uniform < kSmallUniform ? small_race_time(uniform) : -kLn2 * fast_log2(1.0f - uniform);
  return fmaf(logit, inverse_temperature, -kLn2 * fast_log2(time));
}

// High words of a thread's four tokens in a group of eight columns: two of its upper row, two of its lower.
// Four tokens have one counter, and two lanes share them: each draws for one of the rows, and they exchange.
__device__ inline void race_words(uint32_t (&high)[4], const Racer& racer, PhiloxKey key, uint32_t counter) {
  const bool odd = threadIdx.x & 1;
  const PhiloxWords words = racer.words(key, counter);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t kept = odd ? words.word[2 + i] : words.word[i];
    const uint32_t got = __shfl_xor_sync(~0u, odd ? words.word[i] : words.word[2 + i], 1);
    high[i] = odd ? got : kept;
    high[2 + i] = odd ? kept : got;
  }
}

// The tokens whose high word is so small that their time needs 64 random bits: once in 2^24.
__device__ inline void race_of_the_fastest(Best (&best)[2], const Logits& logits,
                                           const SampleRowsParameters& p, const VocabularySeat& seat,
                                           const Racer& racer, PhiloxKey key) {
#pragma unroll 1
  for (int group = 0; group < kChunkTokens / 8; ++group) {
    uint32_t high[4];
    const uint32_t counter = (seat.first + 8 * group) / 4 + seat.thread % 4 / 2;
    race_words(high, racer, key, counter);
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      if (high[element] >= kRefineBelow) continue;
      const int index = 4 * group + element, half = element / 2;
      const PhiloxWords low = Racer(p, seat.row_of(half)).words(key, counter | kRefineBit);
      const int word = 2 * (seat.thread & 1) + element % 2;
      float logit = 0;
#pragma unroll
      for (int i = 0; i < kChunkTokens / 8; ++i) {
        if (i == group) logit = logits[4 * i + element];
      }
      const uint32_t chosen = word < 2 ? low.word[element % 2] : low.word[2 + element % 2];
      const float score = race_score(logit, p.inverse_temperature, uniform_refined(high[element], chosen));
      if (logit == logit) best[half].take({score, logit, seat.first + seat.column(index)});
    }
  }
}

__device__ inline void race(Best (&best)[2], const Logits& logits, const SampleRowsParameters& p,
                            const VocabularySeat& seat) {
  const PhiloxKey key = philox_key(p.seed);
  const Racer racer(p, seat.row_of(seat.thread & 1));
  bool refine = false;
#pragma unroll
  for (int group = 0; group < kChunkTokens / 8; ++group) {
    // True for all threads of a warp. A branch also keeps the compiler from mixing all groups at once, for
    // which registers do not suffice.
    if (group % 4 == 0 && seat.first + 8 * group >= p.problem.vocab_size) break;
    uint32_t high[4];
    race_words(high, racer, key, (seat.first + 8 * group) / 4 + seat.thread % 4 / 2);
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      const float logit = logits[4 * group + element];
      const float score = race_score(logit, p.inverse_temperature, uniform_coarse(high[element]));
      const bool small = high[element] < kRefineBelow;
      refine |= small;
      Best& leader = best[element / 2];
      if (score > leader.score && !small) leader = {score, logit, 8 * group + element % 2};
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (best[half].token >= 0) best[half].token += seat.first + seat.column(0);
  }
  if (__any_sync(~0u, refine)) race_of_the_fastest(best, logits, p, seat, racer, key);
  best[0].across(4);
  best[1].across(4);
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::Vocabulary::kThreads, 1)
    sample_rows_sm90(const __grid_constant__ loopmdm::SampleRowsParameters p) {
  using namespace loopmdm;
  for_each_tile(p.problem, [&](const Logits& logits, const VocabularySeat& seat) {
    Best drawn[2] = {{-LOOPMDM_INFINITY, -LOOPMDM_INFINITY, -1}, {-LOOPMDM_INFINITY, -LOOPMDM_INFINITY, -1}};
    if (p.inverse_temperature > 0) race(drawn, logits, p, seat);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SampleRecord record;
      record.top = top_of(logits, seat, half);
      add_exponentials(logits, half, record);
      record.drawn = drawn[half];
      const int row = seat.row_of(half);
      if (seat.thread % 4 == 0 && row < p.problem.num_rows && seat.first < p.problem.vocab_size) {
        p.records[static_cast<int64_t>(seat.chunk) * p.problem.num_rows + row] = record;
      }
    }
  });
}
