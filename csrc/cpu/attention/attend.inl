// Flash attention of some queries of one head over all keys of their sequence: scores of a block of keys,
// online softmax, weighted sum of values. Scores never leave the first-level cache.
//
// Keys: panels of at most kPanel keys, [head words][keys]. Values: panels of at most kPanel columns of the
// head, [key words][columns]. Keys beyond the length are zero and `bias` excludes them.
#pragma once

#include "cpu/machine/layout.h"
#include "cpu/vector/math.inl"
#include "cpu/vector/tile.inl"

constexpr int kKeyBlock = 512;
constexpr int kGroupRows = 16 * kRowsAtOnce;
// Exponents of a row beyond this are taken as differences of scores: the product of its largest score with
// the scale is then rounded by more than an exponential forgives.
constexpr float kLargeExponent = 1048576.0f;
static_assert(kKeyBlock % kPanel == 0 && kPanel % (2 * kLanes) == 0);

// Pairs (i, i + K/2) turned by the angles of a position; `turn` -1 turns them back. `out` may be x.
template <class Element>
inline void rotate_row(const Element* x, const float* cos, const float* sin, float turn, int64_t half,
                       float* out) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Floats a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i) * turn;
    store(out + i, a * c - b * s);
    store(out + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = value_of(x + i), b = value_of(x + half + i), s = sin[i] * turn;
    out[i] = a * cos[i] - b * s;
    out[half + i] = b * cos[i] + a * s;
  }
}

struct HeadShape {
  int64_t length;      // L
  int64_t keys;        // L rounded up to whole vectors, pairs of them for pairs of bf16
  int64_t head_dim;    // K
  int64_t head_width;  // K rounded up to whole vectors
};

// Keys of the panel that begins at key `first`: whole vectors.
inline int key_panel_width(int64_t length, int64_t first) {
  const int64_t width = (length - first + kLanes - 1) / kLanes * kLanes;
  return static_cast<int>(width < kPanel ? width : kPanel);
}

// Scores of keys in vectors that no panel has are as they were: `bias` excludes them, whatever they are.
struct AttentionScratch {
  alignas(64) float scores[kRowsAtOnce * kKeyBlock];
  alignas(64) uint32_t probs[kRowsAtOnce * kKeyBlock];
};

// 2^x, exactly 0 for masked scores, NaN for NaN. The largest x is 0, but for rounding.
inline Floats probability(Floats x, bool coarse) {
#if defined(__AVX512F__)
  if (coarse) return exp2_scaled(x);
#endif
  const Floats lowest = broadcast(-126.0f);
  const Floats p = exp2_in_range(larger(lowest, x), coarse);
  return x < lowest ? Floats{} : p;
}

// score * factor + shift, whatever a masked key's score is.
template <bool Masked>
inline Floats exponent(const float* score, const float* bias, Floats factor, Floats shift) {
  const Floats x = fused_multiply_add(load(score), factor, shift);
  return Masked ? (load(bias) < Floats{} ? broadcast(kMaskedScore) : x) : x;
}

// exp2(scores * scale - largest) as operands; returns their sum.
template <class Operand, bool Masked>
inline float soften_row(const float* scores, const float* bias, int64_t count, float scale, float largest,
                        uint32_t* probs) {
  constexpr bool kCoarse = Operand::kPerWord == 2;
  const Floats factor = broadcast(scale), shift = broadcast(-largest);
  Floats sum[2] = {};
  const auto softened = [&](int64_t at) {
    return probability(exponent<Masked>(scores + at, bias + at, factor, shift), kCoarse);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    Floats p[2];
    for (int half = 0; half < 2; ++half) {
      p[half] = softened(i + half * kLanes);
      sum[half] += p[half];
    }
    Operand::store(probs + i / Operand::kPerWord, p[0], p[1]);
  }
  if (i < count) {
    const Floats p = softened(i);
    sum[0] += p;
    Operand::store(probs + i / Operand::kPerWord, p, Floats{});
  }
  return sum_lanes(sum[0] + sum[1]);
}

// The largest score of the keys that are attended; minus infinity: none.
template <bool Masked>
inline float largest_score(const float* scores, const float* bias, int64_t count) {
  const Floats lowest = broadcast(-LOOPMDM_INFINITY);
  Floats largest[2] = {lowest, lowest};
  const auto take = [&](int64_t at, Floats& so_far) {
    Floats x = load(scores + at);
    if (Masked) x = load(bias + at) < Floats{} ? lowest : x;
    so_far = larger(x, so_far);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    for (int half = 0; half < 2; ++half) take(i + half * kLanes, largest[half]);
  if (i < count) take(i, largest[0]);
  return largest_lane(larger(largest[0], largest[1]));
}

inline float largest_attended(const float* scores, const float* bias, int64_t count) {
  return bias ? largest_score<true>(scores, bias, count) : largest_score<false>(scores, nullptr, count);
}

inline void subtract_from(float* scores, int64_t count, float offset) {
  for (int64_t i = 0; i < count; i += kLanes) store(scores + i, load(scores + i) - offset);
}

// Keys [first, first + count) of x into their panels, zero beyond the length.
template <class Operand, class Source>
void pack_key_panels(const HeadShape& shape, const Source* x, int64_t row, int64_t first, int64_t count,
                     uint32_t* out) {
  const int64_t head_words = (shape.head_dim + Operand::kPerWord - 1) / Operand::kPerWord;
  const int64_t last = shape.length < first + count ? shape.length : first + count;
  for (int64_t key = first; key < last; key += kLanes) {
    const int64_t panel = key / kPanel * kPanel, left = last - key;
    pack_columns<Operand>(x + key * row, row, static_cast<int>(left < kLanes ? left : kLanes), shape.head_dim,
                          head_words, key_panel_width(shape.length, panel),
                          out + panel * head_words + key - panel);
  }
}

// out: [rows] of head_width floats, out_row apart. log_sum_exp: [rows] in base 2, or null.
template <class Operand>
void attend(const HeadShape& shape, const uint32_t* queries, int64_t query_row, int64_t rows,
            const uint32_t* keys, const uint32_t* values, const float* bias, AttentionScratch& scratch,
            float* out, int64_t out_row, float* log_sum_exp) {
  constexpr int kPer = Operand::kPerWord;
  const int64_t head_words = (shape.head_dim + kPer - 1) / kPer, width = shape.head_width;
  const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(shape.head_dim));
  const auto multiply_row = [width](float* row, float factor) {
    for (int64_t i = 0; i < width; i += kLanes) store(row + i, load(row + i) * factor);
  };
  // All rows meet a block of keys before the next one: long sequences are read from the cache.
  for (int64_t group = 0; group < rows; group += kGroupRows) {
    const int64_t last = rows - group < kGroupRows ? rows : group + kGroupRows;
    float largest[kGroupRows], total[kGroupRows];  // largest: of the scores as they are
    for (int64_t begin = 0; begin < shape.keys; begin += kKeyBlock) {
      const int64_t count = shape.keys - begin < kKeyBlock ? shape.keys - begin : kKeyBlock;
      const int64_t real = shape.length - begin < count ? shape.length - begin : count;
      for (int64_t first = group; first < last; first += kRowsAtOnce) {
        const int n = static_cast<int>(last - first < kRowsAtOnce ? last - first : kRowsAtOnce);
        const Left q = {queries + first * query_row, query_row, 1};
        float* sums = out + first * out_row;
        for (int64_t key = 0; key < real; key += kPanel)
          multiply<Operand>(q, n, keys + (begin + key) * head_words, key_panel_width(real, key), head_words,
                            scratch.scores + key, kKeyBlock);
        // All rows' largest scores before the first exponential: each ends in a chain of dependent steps.
        const float* block_bias = bias ? bias + begin : nullptr;
        float shifts[kRowsAtOnce];
        for (int r = 0; r < n; ++r) {
          float* scores = scratch.scores + r * kKeyBlock;
          float& row_largest = largest[first - group + r];
          float& row_total = total[first - group + r];
          const float block_largest = largest_attended(scores, block_bias, count);
          if (begin == 0) {
            row_largest = block_largest;
            row_total = 0;
          } else if (block_largest > row_largest) {
            const float factor =
                probability(broadcast(row_largest * scale - block_largest * scale), false)[0];
            row_total *= factor;
            multiply_row(sums + r * out_row, factor);
            row_largest = block_largest;
          }
          // Of a row without keys so far, all differences would be infinity minus infinity.
          shifts[r] = row_largest == -LOOPMDM_INFINITY ? 0.0f : row_largest * scale;
          if (__builtin_fabsf(shifts[r]) > kLargeExponent) {
            subtract_from(scores, count, row_largest);
            shifts[r] = 0;
          }
        }
        for (int r = 0; r < n; ++r) {
          const float* scores = scratch.scores + r * kKeyBlock;
          uint32_t* probs = scratch.probs + r * kKeyBlock;
          total[first - group + r] +=
              bias ? soften_row<Operand, true>(scores, block_bias, count, scale, shifts[r], probs)
                   : soften_row<Operand, false>(scores, nullptr, count, scale, shifts[r], probs);
        }
        const Left p = {scratch.probs, kKeyBlock, 1};
        for (int64_t column = 0; column < width; column += kPanel) {
          const int panel = panel_width(width, column);
          multiply<Operand>(p, n, values + column * (shape.keys / kPer) + begin / kPer * panel, panel,
                            (real + kPer - 1) / kPer, sums + column, out_row, begin > 0);
        }
      }
    }
    for (int64_t r = group; r < last; ++r) {
      multiply_row(out + r * out_row, 1.0f / total[r - group]);
      if (log_sum_exp) log_sum_exp[r] = largest[r - group] * scale + __builtin_log2f(total[r - group]);
    }
  }
}
