// sample_rows where the token alone is wanted: it reads the head as bytes, and exactly only those of its
// vectors that may win the race.
//
// A token's weights w are scale * q + e with bytes q, a row of operands h is step * g + d with bytes g. So
//   h.w = step * scale * g.q + d.w + step * g.e,  |d.w| <= |d| |w|,  |step * g.e| <= |step * g| |e|
// (Cauchy, Schwarz), where |w| and |e| are known of each token. Together with what the kernels' fp32 rounds
// away this bounds each logit as `sample_rows` computes it, and a token's score in the race with it. A token
// whose score stays below what another one reaches at least cannot win. The others, a handful of 50 000, are
// computed like all logits of `sample_rows`, and race. Tokens are the same to the bit; values that are not
// finite have no bound, so that they are computed.
#pragma once

#include <cstdint>

#include "cpu/head/head.h"
#include "cpu/linear/linear.h"
#include "cpu/machine/isa.h"

namespace loopmdm::cpu {

struct SampleRowsProblem;

// Of a head [V, D], with tokens up to a whole number of tiles, which are zeros.
struct QuantizedHead {
  uint32_t* bytes;              // q in panels, four bytes a word
  float *scale, *error, *norm;  // |e| and |w| at most
  int32_t* offset;              // sum of q, times the offset of unsigned bytes (Bytes in tile.inl)
};

struct QuantizedSize {
  int64_t tokens, words;  // of each

  QuantizedSize(int64_t vocab_size, int64_t width)
      : tokens(round_up(vocab_size, kTileTokens)), words((width + 3) / 4) {}

  int64_t total() const { return tokens * (words + 4); }  // 32-bit words

  QuantizedHead in(uint32_t* memory) const {
    float* numbers = reinterpret_cast<float*>(memory + tokens * words);
    return {memory, numbers, numbers + tokens, numbers + 2 * tokens,
            reinterpret_cast<int32_t*>(numbers + 3 * tokens)};
  }
};

constexpr int64_t kMostQuantizedWidth = 1 << 15;  // sums of products of two bytes fit into int32

struct TokenRaceProblem {
  const SampleRowsProblem* rows;  // its packed weight is not used
  QuantizedHead quantized;
  const void* weight;  // [V, D] of float or bf16
  bool weight_is_bf16;
};

// Bounds of the error of a row's logits.
struct RowBound {
  float step;
  float quantized;  // |step * g|
  float residue;    // |d|
  float norm16;     // 16 |h|: where it overflows, so may a sum of products
  float least;      // what flushed denormals take away
};

struct Contender {
  int32_t row, token;
  float score;  // at most
};

// The race of one row among tokens in ascending order.
struct RaceState {
  float score, top1_logit;
  int32_t token, top1_token;  // -1: none
  bool finite;                // no logit was NaN or positive infinity
};

// head [V, D], packed for `isa` as products of bf16 or fp32 would read it.
// `fresh`: `out` is new memory, which holds nothing.
void quantize_head(const LinearSource& head, bool bf16, const QuantizedHead& out, bool fresh, Isa isa,
                   int num_threads);

// finite [R]: whether all logits of a row were, so far as they were computed; else its log-probability is
// NaN.
void sample_tokens(const TokenRaceProblem& problem, int64_t* token, bool* finite, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
