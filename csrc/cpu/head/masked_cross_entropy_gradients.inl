// Backward: the gradients of the logits of a chunk, and their products with rows and weights.
#pragma once

#include "cpu/head/masked_cross_entropy_exponentials.inl"
#include "cpu/head/masked_cross_entropy_rows.inl"

// The exponentials of a panel's products from the forward pass, computed again: the products are overwritten.
template <class Kept>
const Kept* again_exponentials(const MaskedCrossEntropyProblem& p, float* products, int64_t token,
                               int64_t count, int width, const float* largest) {
  Kept* out = reinterpret_cast<Kept*>(products);
  for (int64_t t = 0; t < count; ++t) {
    const float bias = bias_of(p, token + t);
    for (int j = 0; j < width; j += kLanes) {
      const Floats logit = load(products + t * width + j) + bias;
      store_kept(out + t * width + j, exp_nonpositive(logit - load(largest + j)));
    }
  }
  return out;
}

// Turns the exponentials of a tile and a panel of rows, relative to `largest`, into gradients of the logits,
// as operands.
template <class Operand, int Vecs, class Kept>
void logit_gradients(const RowGroup& g, const HeadLayout<Operand>& l, const TileScratch& scratch,
                     const Kept* exponentials, const float* largest, int64_t token, int64_t count,
                     int64_t row) {
  constexpr int kWidth = Vecs * kLanes, kPer = Operand::kPerWord;
  Floats factor[Vecs], target_slope[Vecs];
  Ints target[Vecs];
  for (int v = 0; v < Vecs; ++v) {
    const int64_t at = row + v * kLanes;
    factor[v] = exp_nonpositive(load(largest + v * kLanes) - load(g.largest + at)) * load(g.factor + at);
    target_slope[v] = load(g.target_slope + at);
    __builtin_memcpy(&target[v], g.targets + at, sizeof target[v]);
  }
  for (int64_t t = 0; t < count; t += kPer) {
    Floats slope[kPer][Vecs];
    for (int i = 0; i < kPer; ++i) {
      if (t + i >= count) {
        for (int v = 0; v < Vecs; ++v) slope[i][v] = Floats{};
        continue;
      }
      const Ints here = Ints{} + static_cast<int32_t>(token + t + i);
      Floats total = {};
      for (int v = 0; v < Vecs; ++v) {
        const Floats other = load(exponentials + (t + i) * kWidth + v * kLanes) * factor[v];
        slope[i][v] = target[v] == here ? target_slope[v] : other;
        total += slope[i][v];
      }
      float* sums = scratch.bias_sums + (t + i) * kLanes;
      store(sums, row == 0 ? total : load(sums) + total);
      if constexpr (kPer == 2)
        for (int v = 0; v < Vecs; v += 2)
          Operand::store(scratch.token_rows + (t + i) * l.tokens_row + (row + v * kLanes) / kPer, slope[i][v],
                         slope[i][v + 1]);
    }
    for (int v = 0; v < Vecs; ++v)
      store_words(scratch.row_pairs + t / kPer * l.rows_stride + row + v * kLanes,
                  Operand::zip(slope[0][v], slope[kPer - 1][v]));
  }
}

// Moves a panel of dweight from `tile` to its place.
void put_weight_gradient(const MaskedCrossEntropyProblem& p, const MaskedCrossEntropyGradients& out,
                         const float* tile, int64_t token, int64_t count, int64_t column, int width,
                         bool add) {
  for (int64_t t = 0; t < count; ++t)
    for (int j = 0; j < width; j += kLanes) {
      const int64_t at = (token + t) * p.width + column + j, left = p.width - column - j;
      const Floats value = load(tile + t * width + j);
      if (!out.weight_is_bf16) {
        float* to = static_cast<float*>(out.weight) + at;
        add ? add_some(to, value, left) : store_some(to, value, left);
        continue;
      }
      uint16_t* to = static_cast<uint16_t*>(out.weight) + at;
      if (left >= kLanes) {
        store_bf16(to, value);
        continue;
      }
      uint16_t rounded[kLanes];
      store_bf16(rounded, value);
      for (int64_t i = 0; i < left; ++i) to[i] = rounded[i];
    }
}

// Gradients of the logits of a tile and all rows of the group.
template <class Operand, class Kept>
void tile_gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, const HeadLayout<Operand>& l,
                    const TileScratch& scratch, const KeptTiles& kept, int64_t tile, int64_t token,
                    int64_t count) {
  Left weights = {};
  for (int64_t row = 0; row < g.padded; row += kPanel) {
    const int width = panel_width(g.padded, row);
    float largest[kPanel];
    __builtin_memcpy(largest, g.largest + row,
                     static_cast<size_t>(width) * sizeof *largest);  // of rows that pad
    __builtin_memcpy(largest, tile_largest(p, g, kept, tile, row),
                     static_cast<size_t>(block_rows(g, row / kPanel)) * sizeof *largest);
    const Kept* exponentials = kept_panel<Kept>(kept, token, count, row, width);
    if (exponentials == nullptr) {
      if (weights.at == nullptr) weights = weight_rows<Operand>(p, l, token, count, scratch.weights);
      tile_products<Operand>(p, g, l, weights, token, count, row, width, scratch);
      exponentials = again_exponentials<Kept>(p, scratch.logits, token, count, width, largest);
    }
    if (width == kPanel)
      logit_gradients<Operand, kTileVecs>(g, l, scratch, exponentials, largest, token, count, row);
    else
      logit_gradients<Operand, 2>(g, l, scratch, exponentials, largest, token, count, row);
  }
}

// Multiplies the gradients of the logits of a chunk, which `fill(layout, scratch, tile, token, count)` makes
// tile by tile.
template <class Operand, class Fill>
void chunk_products(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
                    void* memory, const MaskedCrossEntropyGradients& out, float* grad_rows, Fill&& fill) {
  const HeadLayout<Operand> l(p, g.padded);
  TileScratch scratch;
  tile_scratch(l, true, memory, scratch);
  const bool add = g.first > 0;  // to what earlier groups left
  int64_t tile = range.first_tile;
  for (int64_t token = range.first; token < range.last; token += range.tile, ++tile) {
    const int64_t count = range.last - token < range.tile ? range.last - token : range.tile;
    fill(l, scratch, tile, token, count);
    if (out.bias != nullptr)
      for (int64_t t = 0; t < count; ++t) {
        const float total = sum_lanes(load(scratch.bias_sums + t * kLanes));
        out.bias[token + t] = add ? out.bias[token + t] + total : total;
      }
    if (grad_rows != nullptr) {
      if (p.weight_is_bf16)
        pack_weight_pairs<Operand, uint16_t>(p, l, token, count, scratch.weight_pairs);
      else
        pack_weight_pairs<Operand, float>(p, l, token, count, scratch.weight_pairs);
      const int64_t token_words = (count + l.kPer - 1) / l.kPer;
      for (int64_t column = 0; column < l.padded_width; column += kPanel)
        multiply<Operand>({scratch.row_pairs, 1, l.rows_stride}, g.count,
                          scratch.weight_pairs + column * token_words, panel_width(l.padded_width, column),
                          token_words, grad_rows + column, l.padded_width, token > range.first);
    }
    if (out.weight != nullptr) {
      const Left slopes = {scratch.token_rows, l.tokens_row, 1};
      const int64_t row_words = (g.count + l.kPer - 1) / l.kPer;  // beyond, slopes are zero
      for (int64_t column = 0; column < l.padded_width; column += kPanel) {
        const int width = panel_width(l.padded_width, column);
        const uint32_t* panel = g.pairs + column * l.row_words;
        if (!out.weight_is_bf16 && column + width <= p.width) {
          multiply<Operand>(slopes, count, panel, width, row_words,
                            static_cast<float*>(out.weight) + token * p.width + column, p.width, add, true);
        } else {
          multiply<Operand>(slopes, count, panel, width, row_words, scratch.logits, width, false, true);
          put_weight_gradient(p, out, scratch.logits, token, count, column, width, add);
        }
      }
    }
  }
}

template <class Operand, class Kept>
void chunk_gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
                     const KeptTiles& kept, void* memory, const MaskedCrossEntropyGradients& out,
                     float* grad_rows) {
  chunk_products<Operand>(
      p, g, range, memory, out, grad_rows,
      [&](const HeadLayout<Operand>& l, const TileScratch& scratch, int64_t tile, int64_t token,
          int64_t count) { tile_gradients<Operand, Kept>(p, g, l, scratch, kept, tile, token, count); });
}

// The `index`-th of the values that a word holds, of each word.
template <int Per>
Floats value_in_word(Words words, int index) {
  if (Per == 1) return reinterpret_cast<Floats>(words);
  return reinterpret_cast<Floats>(index == 0 ? words << 16 : words & 0xffff0000u);
}

// The given gradients of the logits of a tile and all rows of the group, as operands.
template <class Operand, class Source>
void given_gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, const HeadLayout<Operand>& l,
                     const TileScratch& scratch, const Source* given, int64_t token, int64_t count) {
  constexpr int kPer = Operand::kPerWord;
  const int64_t token_words = (count + kPer - 1) / kPer;
  const int64_t* rows = p.rows + g.first;
  for (int64_t row = 0; row < g.padded; row += kLanes) {
    const int filled = static_cast<int>(g.count - row < kLanes ? g.count - row : kLanes);
    pack_columns_of(filled, token_words, l.rows_stride, scratch.row_pairs + row, [&](int j, int64_t k) {
      const int64_t left = count - k * kPer;
      const Source* from = given + rows[row + j] * p.vocab_size + token + k * kPer;
      const bool both = kPer == 2 && left > kLanes;
      uint32_t to[2 * kLanes / kPer];
      Operand::store(to, load_some(from, left), both ? load_some(from + kLanes, left - kLanes) : Floats{});
      return load_words(to);
    });
  }
  for (int64_t k = 0; k < token_words; ++k) {
    Floats total[kPer] = {};
    for (int64_t row = 0; row < g.padded; row += 2 * kLanes) {
      const uint32_t* words = scratch.row_pairs + k * l.rows_stride + row;
      const Words first = load_words(words), second = load_words(words + kLanes);
      for (int i = 0; i < kPer; ++i) {
        const Floats a = value_in_word<kPer>(first, i), b = value_in_word<kPer>(second, i);
        total[i] += a + b;
        if (kPer == 2 && k * kPer + i < count)
          Operand::store(scratch.token_rows + (k * kPer + i) * l.tokens_row + row / kPer, a, b);
      }
    }
    for (int i = 0; i < kPer; ++i)
      if (k * kPer + i < count) store(scratch.bias_sums + (k * kPer + i) * kLanes, total[i]);
  }
}

template <class Operand, class Source>
void chunk_of_given(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
                    const LogitGradients& given, void* memory, const MaskedCrossEntropyGradients& out,
                    float* grad_rows) {
  chunk_products<Operand>(
      p, g, range, memory, out, grad_rows,
      [&](const HeadLayout<Operand>& l, const TileScratch& scratch, int64_t, int64_t token, int64_t count) {
        given_gradients<Operand>(p, g, l, scratch, static_cast<const Source*>(given.values), token, count);
      });
}
