// Flash attention of some queries of one head over all keys of their sequence: scores of a block of keys,
// online softmax, weighted sum of values. Scores never leave the first-level cache.
//
// Keys: panels of kPanel keys, [head words][kPanel]. Values: panels of at most kPanel columns of the head,
// [key words][columns]. Keys beyond the length are zero and `bias` excludes them.

constexpr int kQueryRows = tile_rows<kTileVecs>();
constexpr int kKeyBlock = 512;
constexpr float kMaskedScore =
    -1e30f;  // in units of log2; finite, so that a block of masked keys is harmless
static_assert(kKeyBlock % kPanel == 0 && kPanel % (2 * kLanes) == 0);

struct HeadShape {
  int64_t length;      // L
  int64_t keys;        // L rounded up to whole panels
  int64_t head_dim;    // K
  int64_t head_width;  // K rounded up to whole vectors
};

struct AttentionScratch {
  alignas(64) float scores[kQueryRows * kKeyBlock];
  alignas(64) uint32_t probs[kQueryRows * kKeyBlock];
};

// exp2(scores - top) as operands; returns their sum.
template <class Operand, bool Masked>
inline float soften_row(const float* scores, const float* bias, int64_t count, float scale, float top,
                        uint32_t* probs) {
  constexpr bool kCoarse = Operand::kPerWord == 2;
  const Floats lowest = broadcast(-126.0f), factor = broadcast(scale), shift = broadcast(-top);
  Floats sum[2] = {};
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    Floats p[2];
    for (int half = 0; half < 2; ++half) {
      Floats x = fused_multiply_add(load(scores + i + half * kLanes), factor, shift);
      if (Masked) x += load(bias + i + half * kLanes);
      p[half] = exp2_in_range(larger(x, lowest), kCoarse);
      if (Masked) p[half] = x < lowest ? Floats{} : p[half];
      sum[half] += p[half];
    }
    Operand::store(probs + i / Operand::kPerWord, p[0], p[1]);
  }
  return sum_lanes(sum[0] + sum[1]);
}

template <bool Masked>
inline float largest_score(const float* scores, const float* bias, int64_t count, float scale) {
  Floats top[2] = {broadcast(kMaskedScore), broadcast(kMaskedScore)};
  for (int64_t i = 0; i < count; i += 2 * kLanes)
    for (int half = 0; half < 2; ++half) {
      Floats x = load(scores + i + half * kLanes);
      if (Masked) x = fused_multiply_add(x, broadcast(scale), load(bias + i + half * kLanes));
      top[half] = larger(x, top[half]);
    }
  const float largest = largest_lane(larger(top[0], top[1]));
  return Masked ? largest : largest * scale;
}

// out: [rows][head_width] floats. log_sum_exp: [rows] in base 2, or null.
template <class Operand>
void attend(const HeadShape& shape, const uint32_t* queries, int64_t query_row, int64_t rows,
            const uint32_t* keys, const uint32_t* values, const float* bias, AttentionScratch& scratch,
            float* out, float* log_sum_exp) {
  constexpr int kPer = Operand::kPerWord;
  const int64_t head_words = (shape.head_dim + kPer - 1) / kPer;
  const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(shape.head_dim));
  for (int64_t first = 0; first < rows; first += kQueryRows) {
    const int n = static_cast<int>(rows - first < kQueryRows ? rows - first : kQueryRows);
    const Left q = {queries + first * query_row, query_row, 1};
    float* sums = out + first * shape.head_width;
    float top[kQueryRows], total[kQueryRows];
    for (int64_t begin = 0; begin < shape.keys; begin += kKeyBlock) {
      const int64_t count = shape.keys - begin < kKeyBlock ? shape.keys - begin : kKeyBlock;
      for (int64_t key = 0; key < count; key += kPanel)
        multiply<Operand>(q, n, keys + (begin + key) * head_words, kPanel, head_words, scratch.scores + key,
                          kKeyBlock);
      for (int r = 0; r < n; ++r) {
        const float* scores = scratch.scores + r * kKeyBlock;
        uint32_t* probs = scratch.probs + r * kKeyBlock;
        const float block_top = bias ? largest_score<true>(scores, bias + begin, count, scale)
                                     : largest_score<false>(scores, nullptr, count, scale);
        float before = 0;
        if (begin == 0) {
          top[r] = block_top;
        } else {
          before = total[r];
          if (block_top > top[r]) {
            const float factor =
                exp2_in_range(larger(broadcast(top[r] - block_top), broadcast(-126.0f)), false)[0];
            before *= factor;
            for (int64_t i = 0; i < shape.head_width; i += kLanes)
              store(sums + r * shape.head_width + i, load(sums + r * shape.head_width + i) * factor);
            top[r] = block_top;
          }
        }
        total[r] =
            before + (bias ? soften_row<Operand, true>(scores, bias + begin, count, scale, top[r], probs)
                           : soften_row<Operand, false>(scores, nullptr, count, scale, top[r], probs));
      }
      const Left p = {scratch.probs, kKeyBlock, 1};
      for (int64_t column = 0; column < shape.head_width; column += kPanel) {
        const int width = panel_width(shape.head_width, column);
        multiply<Operand>(p, n, values + column * (shape.keys / kPer) + begin / kPer * width, width,
                          count / kPer, sums + column, shape.head_width, begin > 0);
      }
    }
    for (int r = 0; r < n; ++r) {
      const float factor = 1.0f / total[r];
      for (int64_t i = 0; i < shape.head_width; i += kLanes)
        store(sums + r * shape.head_width + i, load(sums + r * shape.head_width + i) * factor);
      if (log_sum_exp) log_sum_exp[first + r] = top[r] + __builtin_log2f(total[r]);
    }
  }
}
