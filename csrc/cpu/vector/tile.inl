// Matrix products on register tiles, in terms of vec.h.
//
// Operands are 32-bit words along the summed dimension: one float (Fp32), or a pair of bf16 (Bf16, where an
// instruction multiplies them). The left operand is read word by word and broadcast; the right one lies in
// panels [words][width], width at most kPanel columns, so that a tile reads it from front to back. Where no
// instruction multiplies bf16, packed weights are pairs all the same (Bf16Pairs), at half the bytes of
// floats. Every sum runs over the words in an order that depends on their number alone, whatever the shape of
// the tile: results do not depend on how rows are grouped.
#pragma once

#include "cpu/vector/vec.h"

#if defined(__AVX512F__)
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 2;
#endif
constexpr int kPanel = kTileVecs * kLanes;
constexpr int64_t kLineWords = 16;  // of a cache line
constexpr int64_t kTilesAhead = 4;  // tiles that together ask for the next panel: at once would be a queue

inline Words load_words(const uint32_t* p) {
  Words v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store_words(uint32_t* p, Words v) { __builtin_memcpy(p, &v, sizeof v); }

struct Fp32 {
  using Weights = Fp32;                   // the operand of products with packed weights
  static constexpr int kPerWord = 1;      // values in a word
  static constexpr int kLeftPerWord = 1;  // the same of the left operand
  static Floats multiply_add(Words a, Words b, Floats sum) {
    return fused_multiply_add(reinterpret_cast<Floats>(a), reinterpret_cast<Floats>(b), sum);
  }
  // 2 * kLanes values to as many words.
  static void store(uint32_t* words, Floats first, Floats second) {
    store_words(words, reinterpret_cast<Words>(first));
    store_words(words + kLanes, reinterpret_cast<Words>(second));
  }
  static void load(const uint32_t* words, Floats& first, Floats& second) {
    first = reinterpret_cast<Floats>(load_words(words));
    second = reinterpret_cast<Floats>(load_words(words + kLanes));
  }
  // One row of words of a matrix whose rows are summed over: the value alone.
  static Words zip(Floats row, Floats) { return reinterpret_cast<Words>(row); }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  using Weights = Bf16;
  static constexpr int kPerWord = 2;
  static constexpr int kLeftPerWord = 2;
  static Floats multiply_add(Words a, Words b, Floats sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static void store(uint32_t* words, Floats first, Floats second) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(second, first);
    __builtin_memcpy(words, &pairs, sizeof pairs);
  }
  static void load(const uint32_t* words, Floats& first, Floats& second) {
    first = widen(words);
    second = widen(words + kLanes / 2);
  }
  // Two rows of a matrix whose rows are summed over, interleaved.
  static Words zip(Floats even, Floats odd) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(odd, even);  // even in the low half
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                           7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return reinterpret_cast<Words>(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(pairs)));
  }
};
#else
// Pairs, the even one in the low half.
struct Bf16InPairs {
  static constexpr int kPerWord = 2;
  static void store(uint32_t* words, Floats first, Floats second) {
    uint16_t values[2 * kLanes];
    store_bf16(values, first);
    store_bf16(values + kLanes, second);
    __builtin_memcpy(words, values, sizeof values);
  }
  static void load(const uint32_t* words, Floats& first, Floats& second) {
    first = widen(words);
    second = widen(words + kLanes / 2);
  }
  static Words zip(Floats even, Floats odd) {
    return reinterpret_cast<Words>(round_to_bf16(even)) >> 16 | reinterpret_cast<Words>(round_to_bf16(odd));
  }
};

#  if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
struct Bf16 : Bf16InPairs {
  using Weights = Bf16;
  static constexpr int kLeftPerWord = 2;
  static Floats multiply_add(Words a, Words b, Floats sum) {
    return reinterpret_cast<Floats>(vbfdotq_f32(reinterpret_cast<float32x4_t>(sum),
                                                reinterpret_cast<bfloat16x8_t>(a),
                                                reinterpret_cast<bfloat16x8_t>(b)));
  }
};
#  else
// Widened in registers and multiplied as floats with a left operand of floats. Each sum has the order and the
// bits that widened weights would give.
struct Bf16Pairs : Bf16InPairs {
  static constexpr int kLeftPerWord = 1;
  template <int Part>
  static Words widened(Words pairs) {
    return Part == 0 ? pairs << 16 : pairs & 0xffff0000u;
  }
  static Floats multiply_add(Words a, Words b, Floats sum) { return Fp32::multiply_add(a, b, sum); }
};

// No such instruction: operands are floats, but for packed weights.
struct Bf16 : Fp32 {
  using Weights = Bf16Pairs;
};
#  endif
#endif

// Four bytes a word: unsigned ones of the left operand, each kOffset more than the value, and signed ones of
// the right one. The sums are int32 in the place of floats, and exact.
struct Bytes {
  using Weights = Bytes;
  static constexpr int kPerWord = 4;
  static constexpr int kLeftPerWord = 4;
#if defined(__AVX512VNNI__) || !defined(__AVX2__)
  static constexpr int kOffset = 128;
#else
  static constexpr int kOffset = 64;  // two products of a byte below 128 fit into 16 bits
#endif
  static constexpr int kLargest = kOffset - 1;  // magnitude of a left value
  static Floats multiply_add(Words a, Words b, Floats sum) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<Floats>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX512F__)
    const __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(sum) +
                                    reinterpret_cast<Ints>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1))));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(sum) +
                                    reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
#else
    Ints total = reinterpret_cast<Ints>(sum);
    for (int i = 0; i < 32; i += 8)
      total += reinterpret_cast<Ints>((a >> i) & 0xffu) * (reinterpret_cast<Ints>(b << (24 - i)) >> 24);
    return reinterpret_cast<Floats>(total);
#endif
  }
};

// Words of a left operand of `depth` values.
template <class Operand>
constexpr int64_t operand_words(int64_t depth) {
  return (depth + Operand::kLeftPerWord - 1) / Operand::kLeftPerWord;
}

// Words of a right operand for `words` of the left one.
template <class Operand>
constexpr int64_t right_words(int64_t words) {
  constexpr int kLeftWords = Operand::kPerWord / Operand::kLeftPerWord;
  return (words + kLeftWords - 1) / kLeftWords;
}

// The left operand: word k of row r is at[r * row + k * step].
struct Left {
  const uint32_t* at;
  int64_t row;
  int64_t step;
};

// Rows of a tile with `Vecs` vectors: as many sums as the registers hold, at least twelve in flight.
template <int Vecs>
constexpr int tile_rows() {
#if defined(__AVX512F__)
  return Vecs == 4 ? 6 : Vecs == 3 ? 8 : 12;
#else
  return Vecs == 2 ? 6 : 12;
#endif
}

// With Ahead, asks for `share` words at `ahead` for each word of the sum. Never inlined: its sums need all
// registers, and beside what a caller holds some of them would lie in memory.
template <class Operand, int Rows, int Vecs, bool Accumulate, bool Ahead = false>
__attribute__((noinline)) void tile(const Left& a, const uint32_t* b, int64_t words, float* c, int64_t c_row,
                                    const uint32_t* ahead = nullptr, int64_t share = 0) {
  // Unrolled by name: left to its own, the compiler keeps some of these sums in memory.
  Floats sum[Rows][Vecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) sum[r][v] = Floats{};
  const uint32_t* left = a.at;
  const int64_t row = a.row, step = a.step;
  const auto add_products = [&](const Words(&right)[Vecs]) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Words value = Words{} + left[r * row];
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) sum[r][v] = Operand::multiply_add(value, right[v], sum[r][v]);
    }
    left += step;
  };
  for (int64_t k = 0; k < right_words<Operand>(words); ++k) {
    if constexpr (Ahead) __builtin_prefetch(ahead + k * share, 0, 2);
    Words right[Vecs];
    if constexpr (Operand::kPerWord == Operand::kLeftPerWord) {
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) right[v] = load_words(b + v * kLanes);
      add_products(right);
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) right[v] = Operand::template widened<0>(load_words(b + v * kLanes));
      add_products(right);
      if (2 * k + 1 == words) break;  // half a pair
      __asm__("" : "+r"(b));          // read the pairs again: there is no register to keep them in
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) right[v] = Operand::template widened<1>(load_words(b + v * kLanes));
      add_products(right);
    }
    b += Vecs * kLanes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) {
      float* at = c + r * c_row + v * kLanes;
      store(at, Accumulate ? load(at) + sum[r][v] : sum[r][v]);
    }
}

// What the next product reads, and no cache holds yet.
struct Next {
  const uint32_t* at;
  int64_t words;
};

template <class Operand, int Vecs, bool Accumulate>
void multiply_panel(Left a, int64_t rows, const uint32_t* b, int64_t words, float* c, int64_t c_row,
                    const Next& ahead) {
  constexpr int kRows = tile_rows<Vecs>();
  const int64_t b_words = right_words<Operand>(words);
  const uint32_t* next = ahead.at;
  const uint32_t* const last = next + ahead.words;
  const int64_t tiles = rows / kRows < kTilesAhead ? rows / kRows : kTilesAhead;
  const int64_t asking = (tiles > 0 ? tiles : 1) * b_words;
  const int64_t part = (ahead.words + asking - 1) / asking;
  const int64_t share = part < kLineWords ? part : kLineWords;
  for (; rows >= kRows; rows -= kRows) {
    if (next < last) {
      tile<Operand, kRows, Vecs, Accumulate, true>(a, b, words, c, c_row, next, share);
      next += b_words * share;
    } else {
      tile<Operand, kRows, Vecs, Accumulate>(a, b, words, c, c_row);
    }
    a.at += kRows * a.row;
    c += kRows * c_row;
  }
  if constexpr (kRows > 6) {
    if (rows >= 6) {
      tile<Operand, 6, Vecs, Accumulate>(a, b, words, c, c_row);
      a.at += 6 * a.row;
      c += 6 * c_row;
      rows -= 6;
    }
  }
  switch (rows) {
    case 1:
      return tile<Operand, 1, Vecs, Accumulate>(a, b, words, c, c_row);
    case 2:
      return tile<Operand, 2, Vecs, Accumulate>(a, b, words, c, c_row);
    case 3:
      return tile<Operand, 3, Vecs, Accumulate>(a, b, words, c, c_row);
    case 4:
      return tile<Operand, 4, Vecs, Accumulate>(a, b, words, c, c_row);
    case 5:
      return tile<Operand, 5, Vecs, Accumulate>(a, b, words, c, c_row);
  }
}

template <class Operand, bool Accumulate>
void multiply_width(const Left& a, int64_t rows, const uint32_t* b, int width, int64_t words, float* c,
                    int64_t c_row, const Next& next) {
  switch (width / kLanes) {
    case 1:
      return multiply_panel<Operand, 1, Accumulate>(a, rows, b, words, c, c_row, next);
    case 2:
      return multiply_panel<Operand, 2, Accumulate>(a, rows, b, words, c, c_row, next);
#if defined(__AVX512F__)
    case 3:
      return multiply_panel<Operand, 3, Accumulate>(a, rows, b, words, c, c_row, next);
    case 4:
      return multiply_panel<Operand, 4, Accumulate>(a, rows, b, words, c, c_row, next);
#endif
  }
}

#if defined(__AMX_BF16__)
#  include "cpu/vector/tile_amx.inl"
constexpr int kRowsAtOnce = kTmmRows;
#else
// What the products of one call of a kernel share; nothing here.
struct TileScope {
  TileScope() {}
};
constexpr int kRowsAtOnce = tile_rows<kTileVecs>();
#endif

// c[rows, width] = or += a[rows, words] b[right_words, width]; width: a multiple of kLanes, at most kPanel.
// Rows are best given kRowsAtOnce or more at a time. `streamed`: the next product reads as much as this one
// right after b, which is not in the cache yet.
template <class Operand>
void multiply(const Left& a, int64_t rows, const uint32_t* b, int width, int64_t words, float* c,
              int64_t c_row, bool accumulate = false, bool streamed = false) {
#if defined(__AMX_BF16__)
  if (Operand::kPerWord == 2 && a.step == 1)
    return multiply_tmm(a, rows, b, width, words, c, c_row, accumulate);
#endif
  // One tile of few words, as in attention: the way to it would take as long as some steps of the sum.
  constexpr int kRows = tile_rows<kTileVecs>();
  if (rows == kRows && width == kPanel && !accumulate && !streamed)
    return tile<Operand, kRows, kTileVecs, false>(a, b, words, c, c_row);
  const int64_t size = right_words<Operand>(words) * width;
  const Next next = {b + size, streamed ? size : 0};
  if (accumulate)
    multiply_width<Operand, true>(a, rows, b, width, words, c, c_row, next);
  else
    multiply_width<Operand, false>(a, rows, b, width, words, c, c_row, next);
}

// Room for a panel of weights as floats, where a product widens it.
template <class Operand>
constexpr int64_t wide_panel_size(int64_t depth) {
  return Operand::Weights::kPerWord == Operand::Weights::kLeftPerWord ? 0 : (depth + 1) * kPanel;
}

// The same with a panel of packed weights. `wide`: wide_panel_size(words) floats. For some tiles of rows
// pairs of bf16 are widened once, for few in registers; the sums are the same.
template <class Operand>
void multiply_packed(const Left& a, int64_t rows, const uint32_t* b, int width, int64_t words, float* c,
                     int64_t c_row, bool accumulate, bool streamed, float* wide) {
  using Weights = typename Operand::Weights;
  if constexpr (Weights::kPerWord > Weights::kLeftPerWord) {
    constexpr int64_t kFewRows = kTileVecs / 2 * tile_rows<kTileVecs>();  // measured
    if (rows > kFewRows) {
      uint32_t* out = reinterpret_cast<uint32_t*>(wide);
      for (int64_t k = 0; k < words; k += 2, out += 2 * width)
        for (int j = 0; j < width; j += kLanes, b += kLanes) {
          const Words pairs = load_words(b);
          store_words(out + j, Weights::template widened<0>(pairs));
          store_words(out + width + j, Weights::template widened<1>(pairs));
        }
      const uint32_t* widened = reinterpret_cast<uint32_t*>(wide);
      const Next next = {b, streamed ? right_words<Weights>(words) * width : 0};
      return accumulate ? multiply_width<Operand, true>(a, rows, widened, width, words, c, c_row, next)
                        : multiply_width<Operand, false>(a, rows, widened, width, words, c, c_row, next);
    }
  }
  multiply<Weights>(a, rows, b, width, words, c, c_row, accumulate, streamed);
}

// Words of the first `count` values of x; may read up to the next whole pair of vectors.
template <class Operand>
inline void store_row(const float* x, int64_t count, uint32_t* out) {
  constexpr int64_t kStep = 2 * kLanes, kWords = kStep / Operand::kPerWord;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep, out += kWords)
    Operand::store(out, load(x + i), load(x + i + kLanes));
  if (i == count) return;
  uint32_t words[kWords];
  Operand::store(words, load(x + i), load(x + i + kLanes));
  const int64_t left = (count - i + Operand::kPerWord - 1) / Operand::kPerWord;
  __builtin_memcpy(out, words, static_cast<size_t>(left) * sizeof *words);
}

// 2 * kLanes values from words of which `left` are there, zero beyond them.
template <class Operand>
inline void load_some_words(const uint32_t* words, int64_t left, Floats& first, Floats& second) {
  constexpr int64_t kWords = 2 * kLanes / Operand::kPerWord;
  if (left >= kWords) return Operand::load(words, first, second);
  uint32_t some[kWords] = {};
  __builtin_memcpy(some, words, static_cast<size_t>(left) * sizeof *some);
  Operand::load(some, first, second);
}

inline int panel_width(int64_t columns, int64_t first) {
  return static_cast<int>(columns - first < kPanel ? columns - first : kPanel);
}

inline float value_of(const float* p) { return *p; }
inline float value_of(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// `count` values from p on, the rest of the vector zero.
template <class Source>
inline Floats load_some(const Source* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = value_of(p + i);
  return load(values);
}

// A row of a left operand: the words of `count` values, with a zero after the last where it is half a word.
template <class Operand, class Source>
void pack_row(const Source* x, int64_t count, uint32_t* out) {
  constexpr int64_t kStep = 2 * kLanes, kPer = Operand::kPerWord;
  for (int64_t i = 0; i < count; i += kStep) {
    if (i + kStep <= count) {
      Operand::store(out + i / kPer, load(x + i), load(x + i + kLanes));
      continue;
    }
    uint32_t words[kStep / kPer];
    const int64_t left = count - i;
    Operand::store(words, load_some(x + i, left), load_some(x + i + kLanes, left - kLanes));
    __builtin_memcpy(out + i / kPer, words, static_cast<size_t>((left + kPer - 1) / kPer) * sizeof *words);
  }
}

// kLanes words, of which `left` are there; the rest is zero.
inline Words load_row_words(const uint32_t* from, int64_t left) {
  if (left >= kLanes) return load_words(from);
  uint32_t some[kLanes] = {};
  __builtin_memcpy(some, from, static_cast<size_t>(left) * sizeof *some);
  return load_words(some);
}

// kLanes columns of a right operand, of which `filled` are there and the rest are zeros. `load(j, k)`: kLanes
// words of column j from word k on. Words [words][stride].
template <class LoadWords>
inline void pack_columns_of(int filled, int64_t words, int64_t stride, uint32_t* out, LoadWords&& load) {
  for (int64_t k = 0; k < words; k += kLanes, out += kLanes * stride) {
    const int64_t count = words - k < kLanes ? words - k : kLanes;
    Words rows[kLanes];
    if (filled == 1) {  // nothing to transpose
      uint32_t column[kLanes];
      store_words(column, load(0, k));
      for (int i = 0; i < kLanes; ++i) rows[i] = Words{column[i]};
    } else if (filled >= kLanes) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) rows[j] = load(j, k);
      transpose(rows);
    } else {
      for (int j = 0; j < kLanes; ++j) rows[j] = j < filled ? load(j, k) : Words{};
      if (filled > 0) transpose(rows);
    }
    for (int64_t i = 0; i < count; ++i) store_words(out + i * stride, rows[i]);
  }
}

// The same of columns of `depth` values each, column j at column(j).
template <class Operand, class ColumnAt>
void pack_columns_at(int filled, int64_t depth, int64_t words, int64_t stride, uint32_t* out,
                     ColumnAt&& column) {
  constexpr int kPer = Operand::kPerWord;
  pack_columns_of(filled, words, stride, out, [&](int j, int64_t k) {
    const int64_t left = depth - k * kPer;
    const auto* from = column(j) + k * kPer;
    const bool both = kPer == 2 && left > kLanes;
    uint32_t to[2 * kLanes / kPer];
    Operand::store(to, load_some(from, left), both ? load_some(from + kLanes, left - kLanes) : Floats{});
    return load_words(to);
  });
}

// The same of columns that are `column` values apart.
template <class Operand, class Source>
void pack_columns(const Source* x, int64_t column, int filled, int64_t depth, int64_t words, int64_t stride,
                  uint32_t* out) {
  pack_columns_at<Operand>(filled, depth, words, stride, out, [&](int j) { return x + j * column; });
}

// A right operand whose summed dimension are the rows of x: [count][columns] with `row` between rows, columns
// padded with zeros to `padded`. Panels [panel_words][width], of which `words` are written from `first_word`
// on; rows beyond `count` are zero.
template <class Operand, class Source>
void pack_row_pairs(const Source* x, int64_t row, int64_t count, int64_t columns, int64_t padded,
                    int64_t panel_words, int64_t first_word, int64_t words, uint32_t* out) {
  for (int64_t column = 0; column < padded; column += kPanel) {
    const int width = panel_width(padded, column);
    uint32_t* at = out + column * panel_words + first_word * width;
    for (int64_t word = 0; word < words; ++word, at += width)
      for (int j = 0; j < width; j += kLanes) {
        const int64_t r = word * Operand::kPerWord, left = columns - column - j;
        const Source* from = x + r * row + column + j;
        const Floats even = r < count ? load_some(from, left) : Floats{};
        const Floats odd = r + 1 < count ? load_some(from + row, left) : Floats{};
        store_words(at + j, Operand::zip(even, odd));
      }
  }
}
