// Tiles of logits: how their operands lie in memory, and their products, in terms of vec.h and tile.inl.
#pragma once

#include "cpu/machine/layout.h"
#include "cpu/vector/math.inl"
#include "cpu/vector/tile.inl"

constexpr float kLog2E = 1.44269504f;

// Up to this many rows it is faster to transpose the weights than to multiply lanes that no row fills. None
// where that would be another instruction, which rounds elsewhere, or where a transpose takes as long.
#if defined(__AVX512F__) && !defined(__AMX_BF16__)
constexpr int64_t kFewRows = 8;
#else
constexpr int64_t kFewRows = 0;
#endif

template <class Operand>
struct HeadLayout {
  explicit HeadLayout(const MaskedCrossEntropyProblem& p, int64_t padded_rows)
      : words((p.width + kPer - 1) / kPer),
        padded_width(round_up(p.width, 2 * kLanes)),
        weight_row(padded_width / kPer),
        row_words(padded_rows / kPer),
        // An odd number of cache lines from one word of tokens to the next, or they would share few sets.
        rows_stride(round_up(padded_rows, 32) + 16),
        tokens_row(kPer == 1 ? rows_stride : row_words) {}

  static constexpr int64_t kPer = Operand::kPerWord;
  static constexpr int64_t kTokenWords = kTileTokens / kPer;

  int64_t words;         // of a row of D
  int64_t padded_width;  // D in whole pairs of vectors
  int64_t weight_row;    // words from one token of the tile to the next
  int64_t row_words;     // words of the group's rows, the dimension that dweight sums over
  int64_t rows_stride;   // words from one word of tokens to the next, rows across
  int64_t tokens_row;    // words from one token to the next, words of rows across
};

struct TileScratch {
  uint32_t* weights;       // [tile][weight_row]: left operand of the logits
  float* logits;           // [tile][panel]; later a panel of dweight
  uint32_t* token_panel;   // [words of D][panel], of few rows: weights as the right operand
  float* row_logits;       // [few rows][panel], of few rows
  uint32_t* weight_pairs;  // panels of D, [words of tokens][columns of the panel]: right operand of drows
  uint32_t* row_pairs;     // [words of tokens][rows_stride]: gradients of the logits, left operand of drows
  uint32_t* token_rows;    // [tile][tokens_row]: the same, left operand of dweight
  float* bias_sums;        // [tile][kLanes]
};

// Lays the parts out behind `memory` and returns the bytes they take.
template <class Operand>
int64_t tile_scratch(const HeadLayout<Operand>& l, bool backward, void* memory, TileScratch& out) {
  Layout layout(memory);
  out.weights = layout.take<uint32_t>(kTileTokens * l.weight_row);
  out.logits = layout.take<float>(kTileTokens * kPanel);
  out.token_panel = layout.take<uint32_t>(kFewRows ? l.words * kPanel : 0);
  out.row_logits = layout.take<float>(kFewRows * kPanel);
  if (!backward) return layout.bytes();
  out.weight_pairs = layout.take<uint32_t>(l.kTokenWords * l.padded_width);
  out.row_pairs = layout.take<uint32_t>(l.kTokenWords * l.rows_stride);
  // One float is a word in both directions.
  out.token_rows = l.kPer == 1 ? out.row_pairs : layout.take<uint32_t>(kTileTokens * l.tokens_row);
  out.bias_sums = layout.take<float>(kTileTokens * kLanes);
  return layout.bytes();
}

template <class Operand>
CrossEntropySizes sizes_of(const MaskedCrossEntropyProblem& p, int64_t rows) {
  CrossEntropySizes s;
  s.padded_rows = round_up(rows, 2 * kLanes);
  const HeadLayout<Operand> l(p, s.padded_rows);
  s.padded_width = l.padded_width;
  s.columns = s.padded_rows * l.words;
  s.pairs = l.padded_width * l.row_words;
  TileScratch unused;
  const int64_t prepare_bytes = 4 * kPanel * l.padded_width;
  const int64_t forward = tile_scratch(l, false, nullptr, unused);
  s.forward_scratch = forward > prepare_bytes ? forward : prepare_bytes;
  const int64_t backward = tile_scratch(l, true, nullptr, unused);
  s.backward_scratch = backward > prepare_bytes ? backward : prepare_bytes;
  s.block = kPanel;
  return s;
}

inline void store_some(float* p, Floats v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

inline void add_some(float* p, Floats v, int64_t count) { store_some(p, load_some(p, count) + v, count); }

// Weights of `count` tokens as the left operand; in place where they are operands already.
template <class Operand, class Source>
Left weight_rows(const MaskedCrossEntropyProblem& p, const HeadLayout<Operand>& l, int64_t token,
                 int64_t count, uint32_t* out) {
  const Source* w = static_cast<const Source*>(p.weight) + token * p.width;
  constexpr bool kSameBits = sizeof(Source) * Operand::kPerWord == sizeof(uint32_t);
  if (kSameBits && p.width % l.kPer == 0 && reinterpret_cast<uintptr_t>(w) % sizeof(uint32_t) == 0)
    return {reinterpret_cast<const uint32_t*>(w), l.words, 1};
  for (int64_t t = 0; t < count; ++t, w += p.width)
    for (int64_t i = 0; i < l.padded_width; i += 2 * kLanes)
      Operand::store(out + t * l.weight_row + i / l.kPer, load_some(w + i, p.width - i),
                     load_some(w + i + kLanes, p.width - i - kLanes));
  return {out, l.weight_row, 1};
}

template <class Operand>
Left weight_rows(const MaskedCrossEntropyProblem& p, const HeadLayout<Operand>& l, int64_t token,
                 int64_t count, uint32_t* out) {
  return p.weight_is_bf16 ? weight_rows<Operand, uint16_t>(p, l, token, count, out)
                          : weight_rows<Operand, float>(p, l, token, count, out);
}

// Words of kLanes columns of two rows, or of one where a word is one value.
template <class Operand, class Source>
inline Words zip_weights(const Source* even, const Source* odd) {
  if constexpr (Operand::kPerWord == 2 && sizeof(Source) == sizeof(uint16_t))  // rounded already
    return reinterpret_cast<Words>(load(even)) >> 16 | reinterpret_cast<Words>(load(odd));
  return Operand::zip(load(even), Operand::kPerWord == 2 ? load(odd) : Floats{});
}

// The same weights as the right operand of a sum over tokens; zero for the excluded token.
template <class Operand, class Source>
void pack_weight_pairs(const MaskedCrossEntropyProblem& p, const HeadLayout<Operand>& l, int64_t token,
                       int64_t count, uint32_t* out) {
  const int64_t token_words = (count + l.kPer - 1) / l.kPer;
  const auto is_weight = [&](int64_t t) { return t < count && token + t != p.excluded_token; };
  for (int64_t k = 0; k < token_words; ++k) {
    const int64_t t = k * l.kPer;
    const Source* even = static_cast<const Source*>(p.weight) + (token + t) * p.width;
    const Source* odd = even + p.width;
    const bool has_even = is_weight(t), has_odd = l.kPer == 2 && is_weight(t + 1);
    const bool whole = has_even && (l.kPer == 1 || has_odd);
    for (int64_t column = 0; column < l.padded_width; column += kPanel) {
      const int across = panel_width(l.padded_width, column);
      uint32_t* words = out + column * token_words + k * across;
      if (whole && column + across <= p.width) {
        for (int j = 0; j < across; j += kLanes)
          store_words(words + j, zip_weights<Operand>(even + column + j, odd + column + j));
        continue;
      }
      for (int j = 0; j < across; j += kLanes) {
        const int64_t left = p.width - column - j;
        const Floats first = has_even ? load_some(even + column + j, left) : Floats{};
        const Floats second = has_odd ? load_some(odd + column + j, left) : Floats{};
        store_words(words + j, Operand::zip(first, second));
      }
    }
  }
}

// Products of some tokens with few rows, by way of panels of tokens: the same sums.
template <class Operand>
void few_row_products(const Left& rows, int64_t num_rows, const Left& weights, int64_t count, int64_t words,
                      const TileScratch& scratch, int width) {
  for (int64_t first = 0; first < count; first += kPanel) {
    const int64_t here = count - first < kPanel ? count - first : kPanel;
    const int across = static_cast<int>(round_up(here, kLanes));
    const uint32_t* from = weights.at + first * weights.row;
    for (int64_t j = 0; j < here; j += kLanes, from += kLanes * weights.row)
      pack_columns_of(
          static_cast<int>(here - j < kLanes ? here - j : kLanes), words, across, scratch.token_panel + j,
          [&](int i, int64_t k) { return load_row_words(from + i * weights.row + k, words - k); });
    multiply<Operand>(rows, num_rows, scratch.token_panel, across, words, scratch.row_logits, kPanel);
    float* out = scratch.logits + first * width;
    for (int64_t j = 0; j < here; j += kLanes) {
      Words columns[kLanes] = {};
      for (int64_t r = 0; r < num_rows; ++r)
        columns[r] = reinterpret_cast<Words>(load(scratch.row_logits + r * kPanel + j));
      transpose(columns);
      for (int64_t i = 0; i < kLanes && j + i < here; ++i, out += width)
        for (int v = 0; v < width; v += kLanes)
          store(out + v, v == 0 ? reinterpret_cast<Floats>(columns[i]) : Floats{});
    }
  }
}

// Products of a tile with the rows of one panel: scratch.logits [count][width]. The excluded token's become
// 0.
template <class Operand>
void tile_products(const MaskedCrossEntropyProblem& p, const RowGroup& g, const HeadLayout<Operand>& l,
                   const Left& weights, int64_t token, int64_t count, int64_t row, int width,
                   const TileScratch& scratch) {
  float* const out = scratch.logits;
  const uint32_t* const rows = g.columns + row * l.words;
  if (g.count <= kFewRows)
    few_row_products<Operand>({rows, 1, width}, g.count, weights, count, l.words, scratch, width);
  else
    multiply<Operand>(weights, count, rows, width, l.words, out, width, false, true);
  const int64_t excluded = p.excluded_token - token;
  if (excluded >= 0 && excluded < count)
    __builtin_memset(out + excluded * width, 0, static_cast<size_t>(width) * sizeof *out);
}

inline float bias_of(const MaskedCrossEntropyProblem& p, int64_t token) {
  return token == p.excluded_token ? -__builtin_inff() : p.bias[token];
}
