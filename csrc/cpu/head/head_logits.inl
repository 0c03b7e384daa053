// Logits of rows written to memory, in terms of head.inl.
#pragma once

#include "cpu/head/head.inl"

inline void write_logits(const float* x, float* out) { store(out, load(x)); }
inline void write_logits(const float* x, uint16_t* out) { store_bf16(out, load(x)); }

template <class Logit>
void project_chunk(const HeadProblem& p, const uint32_t* operands, int64_t num_rows, int64_t chunk,
                   float* sums, Logit* out) {
  const int64_t first = chunk * kChunkTokens;
  const int64_t last = first + kChunkTokens < p.vocab_size ? first + kChunkTokens : p.vocab_size;
  for (int64_t token = first; token < last; token += kTileTokens) {
    const int64_t count = last - token < kTileTokens ? last - token : kTileTokens;
    multiply_tile(p, operands, num_rows, token, count, sums, sums + num_rows * kTileTokens);
    for (int64_t r = 0; r < num_rows; ++r) {
      float* row = sums + r * kTileTokens;
      for (int64_t t = 0; t < count; ++t) row[t] += p.bias[token + t];
      Logit* target = out + r * p.vocab_size + token;
      int64_t t = 0;
      for (; t + kLanes <= count; t += kLanes) write_logits(row + t, target + t);
      if (t < count) {
        Logit some[kLanes];
        write_logits(row + t, some);
        __builtin_memcpy(target + t, some, static_cast<size_t>(count - t) * sizeof *some);
      }
    }
  }
}

void project(const HeadProblem& p, const uint32_t* operands, int64_t num_rows, int64_t chunk, float* sums,
             bool bf16_out, void* out) {
  const TileScope scope;
  bf16_out ? project_chunk(p, operands, num_rows, chunk, sums, static_cast<uint16_t*>(out))
           : project_chunk(p, operands, num_rows, chunk, sums, static_cast<float*>(out));
}

constexpr HeadLogitsKernel table = {logits_scratch, prepare_rows, project};
