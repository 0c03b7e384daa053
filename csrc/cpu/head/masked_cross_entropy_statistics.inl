// Forward: the maximum and the sum of exponentials of each row over a chunk of the vocabulary.
#pragma once

#include "cpu/head/masked_cross_entropy_exponentials.inl"
#include "cpu/head/masked_cross_entropy_rows.inl"

// Adds a tile's logits to the maxima and sums of the rows of a panel, one row in each lane of the first Vecs
// of Width / kLanes vectors. Keeps the exponentials where `kept` is not null.
template <int Vecs, int Width, class Kept>
void add_statistics(const MaskedCrossEntropyProblem& p, float* logits, int64_t token, int64_t count,
                    float* largest_out, float* sum_out, Kept* kept) {
  Floats largest[Vecs], sum[Vecs];
  for (int v = 0; v < Vecs; ++v) largest[v] = load(largest_out + v * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    float* x = logits + t * Width;
    const float bias = bias_of(p, token + t);
    for (int v = 0; v < Vecs; ++v) {
      const Floats value = load(x + v * kLanes) + bias;
      store(x + v * kLanes, value);
      largest[v] = larger(value, largest[v]);  // a NaN does not get in, but will be in the sum
    }
  }
  for (int v = 0; v < Vecs; ++v)
    sum[v] = load(sum_out + v * kLanes) * exp_nonpositive(load(largest_out + v * kLanes) - largest[v]);
  for (int64_t t = 0; t < count; ++t) {
    for (int v = 0; v < Vecs; ++v) {
      const Floats exponential = exp_nonpositive(load(logits + t * Width + v * kLanes) - largest[v]);
      sum[v] += exponential;
      if (kept != nullptr) store_kept(kept + t * Width + v * kLanes, exponential);
    }
    if (kept != nullptr)
      for (int at = Vecs * kLanes; at < Width; at += kLanes) store_kept(kept + t * Width + at, Floats{});
  }
  for (int v = 0; v < Vecs; ++v) {
    store(largest_out + v * kLanes, largest[v]);
    store(sum_out + v * kLanes, sum[v]);
  }
}

template <class Operand, class Kept>
void chunk_statistics(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
                      void* memory, const ChunkStatistics& out, const KeptTiles& kept) {
  const HeadLayout<Operand> l(p, g.padded);
  TileScratch scratch;
  tile_scratch(l, false, memory, scratch);
  for (int64_t r = 0; r < g.padded; ++r) {
    out.largest[r] = kLowestFloat / 2;  // finite, and so is its difference to any other
    out.sum[r] = 0;
  }
  int64_t tile = range.first_tile;
  for (int64_t token = range.first; token < range.last; token += range.tile, ++tile) {
    const int64_t count = range.last - token < range.tile ? range.last - token : range.tile;
    const Left weights = weight_rows<Operand>(p, l, token, count, scratch.weights);
    for (int64_t row = 0; row < g.padded; row += kPanel) {
      const int width = panel_width(g.padded, row);
      tile_products<Operand>(p, g, l, weights, token, count, row, width, scratch);
      Kept* keep = kept_panel<Kept>(kept, token, count, row, width);
      const auto add = block_rows(g, row / kPanel) <= kLanes && width == 2 * kLanes
                           ? add_statistics<1, 2 * kLanes, Kept>
                       : width == kPanel ? add_statistics<kTileVecs, kPanel, Kept>
                                         : add_statistics<2, 2 * kLanes, Kept>;
      add(p, scratch.logits, token, count, out.largest + row, out.sum + row, keep);
      if (kept.largest != nullptr)
        __builtin_memcpy(tile_largest(p, g, kept, tile, row), out.largest + row,
                         static_cast<size_t>(block_rows(g, row / kPanel)) * sizeof(float));
      for (int r = 0; r < width; ++r) {
        const int64_t t = g.targets[row + r] - token;
        if (t >= 0 && t < count) out.target[row + r] = scratch.logits[t * width + r];
      }
    }
  }
}
