// Gradients of attend(): all queries of one head, a block of keys at a time. Scores and probabilities are
// computed again from log_sum_exp and stay in the first two cache levels; the gradients of a block's keys and
// values are summed over the queries in order, those of the queries over the blocks.
//
// The gradient of a score is P (dP - delta), a small difference where one key wins. delta is the mean of dP
// under P, and as long as one block holds all keys, it is computed as such, from the very numbers it is
// subtracted from. Longer rows would need the products twice: there delta is grad_out . out, with the
// rounding of out.
#pragma once

#include "cpu/attention/attend.inl"

constexpr int kGradRows = 96;   // queries at a time
constexpr int kGradKeys = 256;  // keys in a block
static_assert(kGradRows % kRowsAtOnce == 0 && kGradRows % 2 == 0 && kGradKeys % kPanel == 0);

// Rows of one head, `*_row` apart: operands as attend() multiplied them, so q and k are already rotated.
struct HeadGradientInput {
  const uint32_t *q, *k, *v, *out;  // [L, head words]; out: only where in_one_block() is false
  const float* grad_out;            // [L, K]
  int64_t q_row, k_row, v_row, out_row, grad_out_row;
  const float* log_sum_exp;  // [L], as attend() writes it
};

// Whether the gradients need no `out`.
inline bool in_one_block(const HeadShape& shape) { return shape.keys <= kGradKeys; }

// Overwritten, columns [0, K) only.
struct HeadGradientOutput {
  float *grad_q, *grad_k, *grad_v;  // [L, K]
  int64_t grad_q_row, grad_k_row, grad_v_row;
};

struct GradientScratch {
  uint32_t* grad_rows;                 // [L, head words]
  uint32_t *query_pairs, *grad_pairs;  // panels over the queries
  uint32_t *keys, *values;             // panels of keys
  uint32_t* key_pairs;                 // panels over the keys
  uint32_t *probs, *grad_scores;       // panels over kGradRows queries, kGradKeys wide
  uint32_t* grad_score_rows;           // [kGradRows, words of kGradKeys]; grad_scores where a word is a float
  float *scores, *grad_probs;          // [kRowsAtOnce, kGradKeys]
  float* offset;                       // [L]: delta, scaled; of longer rows only
  float *grad_q, *grad_k, *grad_v;     // [L or kGradKeys, head width]
  int64_t bytes;
};

inline GradientScratch gradient_scratch(const HeadShape& shape, int64_t per_word, void* memory) {
  GradientScratch t;
  Layout layout(memory);
  const int64_t head_words = (shape.head_dim + per_word - 1) / per_word;
  const int64_t query_words = (shape.length + per_word - 1) / per_word;
  t.grad_rows = layout.take<uint32_t>(shape.length * head_words);
  t.query_pairs = layout.take<uint32_t>(query_words * shape.head_width);
  t.grad_pairs = layout.take<uint32_t>(query_words * shape.head_width);
  t.keys = layout.take<uint32_t>(shape.keys * head_words);
  t.values = layout.take<uint32_t>(shape.keys * head_words);
  t.key_pairs = layout.take<uint32_t>(shape.keys / per_word * shape.head_width);
  t.probs = layout.take<uint32_t>(kGradRows / per_word * kGradKeys);
  t.grad_scores = layout.take<uint32_t>(kGradRows / per_word * kGradKeys);
  t.grad_score_rows = t.grad_scores;
  if (per_word > 1) t.grad_score_rows = layout.take<uint32_t>(kGradRows * (kGradKeys / per_word));
  t.scores = layout.take<float>(kRowsAtOnce * kGradKeys);
  t.grad_probs = layout.take<float>(kRowsAtOnce * kGradKeys);
  t.offset = layout.take<float>(shape.length);
  t.grad_q = layout.take<float>(shape.length * shape.head_width);
  t.grad_k = layout.take<float>(kGradKeys * shape.head_width);
  t.grad_v = layout.take<float>(kGradKeys * shape.head_width);
  t.bytes = layout.bytes();
  return t;
}

// Of a whole number of cache lines; enough for any Operand.
int64_t attention_backward_scratch_bytes(const HeadShape& shape) {
  return gradient_scratch(shape, 1, nullptr).bytes;
}

// Of `count` floats with the values of as many operands.
template <class Operand>
inline float dot_product(const float* a, const uint32_t* b, int64_t count) {
  constexpr int kPer = Operand::kPerWord;
  Floats sum = {};
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    Floats value[2];
    load_some_words<Operand>(b + i / kPer, (count - i + kPer - 1) / kPer, value[0], value[1]);
    for (int half = 0; half < 2 && i + half * kLanes < count; ++half) {
      const int64_t at = i + half * kLanes;
      sum = fused_multiply_add(load_some(a + at, count - at), value[half], sum);
    }
  }
  return sum_lanes(sum);
}

// pack_key_panels() of all keys, from rows of operands.
template <class Operand>
void pack_key_words(const HeadShape& shape, const uint32_t* x, int64_t row, int64_t head_words,
                    uint32_t* out) {
  for (int64_t key = 0; key < shape.length; key += kLanes) {
    const int64_t panel = key / kPanel * kPanel, left = shape.length - key;
    pack_columns_of(
        static_cast<int>(left < kLanes ? left : kLanes), head_words, key_panel_width(shape.length, panel),
        out + panel * head_words + key - panel,
        [&](int j, int64_t k) { return load_row_words(x + (key + j) * row + k, head_words - k); });
  }
}

// pack_row_pairs() of `count` rows of operands into panels of `panel_words`.
template <class Operand>
void pack_word_pairs(const uint32_t* x, int64_t row, int64_t count, int64_t head_words, int64_t padded,
                     int64_t panel_words, uint32_t* out) {
  constexpr int kPer = Operand::kPerWord;
  for (int64_t r = 0; r < count; r += kPer)
    for (int64_t i = 0; i < padded; i += 2 * kLanes) {
      const uint32_t* from = x + r * row + i / kPer;
      const int64_t left = head_words - i / kPer;
      Floats even[2], odd[2] = {};
      load_some_words<Operand>(from, left, even[0], even[1]);
      if (kPer == 2 && r + 1 < count) load_some_words<Operand>(from + row, left, odd[0], odd[1]);
      for (int half = 0; half < 2 && i + half * kLanes < padded; ++half) {
        const int64_t column = i + half * kLanes, panel = column / kPanel * kPanel;
        store_words(out + panel * panel_words + r / kPer * panel_width(padded, panel) + column - panel,
                    Operand::zip(even[half], odd[half]));
      }
    }
}

// Of one query: its probabilities are those of the scores times `weight`.
struct QueryScale {
  float log_sum_exp, weight, offset;
};

template <bool Masked>
inline Floats score_probability(const float* scores, const float* bias, float base2_scale, float log_sum_exp,
                                bool coarse) {
  return probability(exponent<Masked>(scores, bias, broadcast(base2_scale), broadcast(-log_sum_exp)), coarse);
}

// Restates the scores of a query so that their exponents are exact where log_sum_exp is too large to tell
// keys apart, and returns the log_sum_exp to go with them. Of a part of a row, what log_sum_exp was rounded
// by is lost, as it is in plain PyTorch: no exponent is above 0.
inline float bounded_scores(float* scores, const float* bias, int64_t count, float base2_scale,
                            float log_sum_exp, bool whole_row) {
  if (!(__builtin_fabsf(log_sum_exp) > kLargeExponent)) return log_sum_exp;
  if (whole_row) {
    subtract_from(scores, count, largest_attended(scores, bias, count));
    return 0;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = load(scores + i) * base2_scale - log_sum_exp;
    store(scores + i, (x > 0.0f ? Floats{} : x) / base2_scale);
  }
  return 0;
}

// Replaces the scores of a query with all keys by probabilities, up to a common factor.
template <bool Masked>
inline QueryScale soften_whole_row(float* scores, const float* grad_probs, const float* bias, int64_t count,
                                   float base2_scale, float scale, float log_sum_exp, bool coarse) {
  Floats sum[2] = {}, product[2] = {};
  const auto soften = [&](int64_t at, int half) {
    const Floats p = score_probability<Masked>(scores + at, bias + at, base2_scale, log_sum_exp, coarse);
    store(scores + at, p);
    sum[half] += p;
    product[half] = fused_multiply_add(p, load(grad_probs + at), product[half]);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    for (int half = 0; half < 2; ++half) soften(i + half * kLanes, half);
  if (i < count) soften(i, 0);
  const float weight = 1.0f / sum_lanes(sum[0] + sum[1]);
  return {log_sum_exp, weight, scale * weight * sum_lanes(product[0] + product[1])};
}

// Probabilities and the gradients of the scores, for the queries of one word: one or two. `Softened`: the
// scores have been through soften_whole_row().
template <class Operand, bool Masked, bool Softened>
inline void score_gradients(const float* scores, const float* grad_probs, const float* bias, int64_t queries,
                            int64_t count, float base2_scale, float scale, const QueryScale* query,
                            uint32_t* probs, uint32_t* grad_scores, uint32_t* grad_score_rows) {
  constexpr int kPer = Operand::kPerWord;
  constexpr bool kCoarse = kPer == 2;
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    Floats p[2][2] = {}, g[2][2] = {};
    for (int64_t q = 0; q < queries; ++q)
      for (int half = 0; half < 2 && i + half * kLanes < count; ++half) {
        const int64_t at = q * kGradKeys + i + half * kLanes;
        p[q][half] = Softened ? load(scores + at) * query[q].weight
                              : score_probability<Masked>(scores + at, bias + i + half * kLanes, base2_scale,
                                                          query[q].log_sum_exp, kCoarse);
        g[q][half] = p[q][half] *
                     fused_multiply_add(load(grad_probs + at), broadcast(scale), broadcast(-query[q].offset));
      }
    for (int half = 0; half < 2; ++half) {
      store_words(probs + i + half * kLanes, Operand::zip(p[0][half], p[1][half]));
      store_words(grad_scores + i + half * kLanes, Operand::zip(g[0][half], g[1][half]));
    }
    if (kPer > 1)
      for (int64_t q = 0; q < queries; ++q)
        Operand::store(grad_score_rows + (q * kGradKeys + i) / kPer, g[q][0], g[q][1]);
  }
}

inline void copy_rows(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                      int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r)
    __builtin_memcpy(to + r * to_row, from + r * from_row, static_cast<size_t>(columns) * sizeof(float));
}

// bias: [keys] as in attend(), null if every key counts. scratch: 64-byte aligned.
template <class Operand>
void attend_backward(const HeadShape& shape, const HeadGradientInput& in, const float* bias, void* scratch,
                     const HeadGradientOutput& out) {
  constexpr int kPer = Operand::kPerWord;
  const GradientScratch t = gradient_scratch(shape, kPer, scratch);
  const int64_t length = shape.length, head_dim = shape.head_dim, width = shape.head_width;
  const int64_t head_words = (head_dim + kPer - 1) / kPer, query_words = (length + kPer - 1) / kPer;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  const float base2_scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(head_dim));
  const bool whole_rows = in_one_block(shape);
  const auto soften = bias ? soften_whole_row<true> : soften_whole_row<false>;
  const auto gradients = whole_rows ? score_gradients<Operand, false, true>
                         : bias     ? score_gradients<Operand, true, false>
                                    : score_gradients<Operand, false, false>;

  // A float is an operand as it is, and whole vectors of gradients are written where they belong.
  const Left queries = {in.q, in.q_row, 1};
  const Left grads = kPer > 1 ? Left{t.grad_rows, head_words, 1}
                              : Left{reinterpret_cast<const uint32_t*>(in.grad_out), in.grad_out_row, 1};
  const bool direct = head_dim == width;
  float* const grad_q = direct ? out.grad_q : t.grad_q;
  const int64_t grad_q_row = direct ? out.grad_q_row : width, grad_k_row = direct ? out.grad_k_row : width,
                grad_v_row = direct ? out.grad_v_row : width;

  constexpr int64_t kRowsAhead = 16;  // of whole sequences of hidden states: too far apart to be foreseen
  for (int64_t r = 0; r < length; ++r) {
    const float* grad = in.grad_out + r * in.grad_out_row;
    for (int64_t i = 0; i < head_dim; i += kLineWords)
      __builtin_prefetch(grad + kRowsAhead * in.grad_out_row + i);
    for (int64_t i = 0; !whole_rows && i < head_words; i += kLineWords)
      __builtin_prefetch(in.out + (r + kRowsAhead) * in.out_row + i);
    if constexpr (kPer > 1) pack_row<Operand>(grad, head_dim, t.grad_rows + r * head_words);
    if (!whole_rows) t.offset[r] = scale * dot_product<Operand>(grad, in.out + r * in.out_row, head_dim);
  }
  pack_word_pairs<Operand>(in.q, in.q_row, length, head_words, width, query_words, t.query_pairs);
  pack_row_pairs<Operand>(in.grad_out, in.grad_out_row, length, head_dim, width, query_words, 0, query_words,
                          t.grad_pairs);
  pack_key_words<Operand>(shape, in.k, in.k_row, head_words, t.keys);
  pack_key_words<Operand>(shape, in.v, in.v_row, head_words, t.values);
  const int64_t key_words = shape.keys / kPer;
  pack_word_pairs<Operand>(in.k, in.k_row, length, head_words, width, key_words, t.key_pairs);

  for (int64_t begin = 0; begin < length; begin += kGradKeys) {
    const int64_t count = shape.keys - begin < kGradKeys ? shape.keys - begin : kGradKeys;
    const int64_t real = length - begin < count ? length - begin : count;
    float* const grad_k = direct ? out.grad_k + begin * grad_k_row : t.grad_k;
    float* const grad_v = direct ? out.grad_v + begin * grad_v_row : t.grad_v;
    // Of keys in a vector that no panel has: their probability is 0, what it is multiplied with finite.
    for (int64_t key = (real + kLanes - 1) / kLanes * kLanes; key < count; key += kLanes)
      for (int r = 0; r < kRowsAtOnce; ++r) store(t.grad_probs + r * kGradKeys + key, Floats{});
    for (int64_t first = 0; first < length; first += kGradRows) {
      const int64_t rows = length - first < kGradRows ? length - first : kGradRows;
      for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
        const int64_t n = rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce;
        const Left q = {queries.at + (first + row) * queries.row, queries.row, 1};
        const Left grad = {grads.at + (first + row) * grads.row, grads.row, 1};
        for (int64_t key = 0; key < real; key += kPanel) {
          const int panel = key_panel_width(real, key);
          multiply<Operand>(q, n, t.keys + (begin + key) * head_words, panel, head_words, t.scores + key,
                            kGradKeys);
          multiply<Operand>(grad, n, t.values + (begin + key) * head_words, panel, head_words,
                            t.grad_probs + key, kGradKeys);
        }
        for (int64_t r = 0; r < n; r += kPer) {
          const int64_t queries = n - r < kPer ? n - r : kPer, at = (row + r) / kPer * kGradKeys;
          const float* block_bias = bias ? bias + begin : nullptr;
          float *scores = t.scores + r * kGradKeys, *grad_probs = t.grad_probs + r * kGradKeys;
          QueryScale query[2];
          for (int64_t i = 0; i < queries; ++i) {
            const float log_sum_exp = bounded_scores(scores + i * kGradKeys, block_bias, count, base2_scale,
                                                     in.log_sum_exp[first + row + r + i], whole_rows);
            query[i] = whole_rows ? soften(scores + i * kGradKeys, grad_probs + i * kGradKeys, block_bias,
                                           count, base2_scale, scale, log_sum_exp, kPer == 2)
                                  : QueryScale{log_sum_exp, 1.0f, t.offset[first + row + r + i]};
          }
          gradients(scores, grad_probs, block_bias, queries, count, base2_scale, scale, query, t.probs + at,
                    t.grad_scores + at, t.grad_score_rows + (row + r) * (kGradKeys / kPer));
        }
      }
      const int64_t words = (rows + kPer - 1) / kPer;
      for (int64_t column = 0; column < width; column += kPanel) {
        const int panel = panel_width(width, column);
        const int64_t at = column * query_words + first / kPer * panel;
        multiply<Operand>({t.probs, 1, kGradKeys}, real, t.grad_pairs + at, panel, words, grad_v + column,
                          grad_v_row, first > 0);
        multiply<Operand>({t.grad_scores, 1, kGradKeys}, real, t.query_pairs + at, panel, words,
                          grad_k + column, grad_k_row, first > 0);
        multiply<Operand>({t.grad_score_rows, kGradKeys / kPer, 1}, rows,
                          t.key_pairs + column * key_words + begin / kPer * panel, panel,
                          (real + kPer - 1) / kPer, grad_q + first * grad_q_row + column, grad_q_row,
                          begin > 0);
      }
    }
    if (direct) continue;
    copy_rows(t.grad_k, width, real, head_dim, out.grad_k + begin * out.grad_k_row, out.grad_k_row);
    copy_rows(t.grad_v, width, real, head_dim, out.grad_v + begin * out.grad_v_row, out.grad_v_row);
  }
  if (!direct) copy_rows(t.grad_q, width, length, head_dim, out.grad_q, out.grad_q_row);
}
