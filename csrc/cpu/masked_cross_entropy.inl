// The kernels of masked_cross_entropy, in terms of vec.h, tile.inl, math.inl and linear.inl.

constexpr float kLog2E = 1.44269504f;

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
  uint32_t* weight_pairs;  // panels of D, [words of tokens][columns of the panel]: right operand of drows
  uint32_t* row_pairs;     // [words of tokens][rows_stride]: gradients of the logits, left operand of drows
  uint32_t* token_rows;    // [tile][tokens_row]: the same, left operand of dweight
  float* bias_sums;        // [tile][kLanes]
};

// Lays the parts out behind `memory` and returns the bytes they take.
template <class Operand>
int64_t tile_scratch(const HeadLayout<Operand>& l, bool backward, void* memory, TileScratch& out) {
  char* base = static_cast<char*>(memory);
  int64_t at = 0;
  const auto take = [&](int64_t count) {
    char* start = base + at;
    at += round_up(4 * count, 64);
    return start;
  };
  out.weights = reinterpret_cast<uint32_t*>(take(kTileTokens * l.weight_row));
  out.logits = reinterpret_cast<float*>(take(kTileTokens * kPanel));
  if (!backward) return at;
  out.weight_pairs = reinterpret_cast<uint32_t*>(take(l.kTokenWords * l.padded_width));
  out.row_pairs = reinterpret_cast<uint32_t*>(take(l.kTokenWords * l.rows_stride));
  // One float is a word in both directions.
  out.token_rows =
      l.kPer == 1 ? out.row_pairs : reinterpret_cast<uint32_t*>(take(kTileTokens * l.tokens_row));
  out.bias_sums = reinterpret_cast<float*>(take(kTileTokens * kLanes));
  return at;
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

inline int64_t block_rows(const RowGroup& g, int64_t block) {
  const int64_t left = g.count - block * kPanel;
  return left < kPanel ? left : kPanel;
}

// ---- rows -----------------------------------------------------------------------------------------------

template <class Operand>
void prepare_block(const MaskedCrossEntropyProblem& p, const RowGroup& g, int64_t block, float* h) {
  const HeadLayout<Operand> l(p, g.padded);
  const int64_t first = block * kPanel, count = block_rows(g, block);
  const int width = panel_width(g.padded, first);
  for (int64_t r = 0; r < width; ++r) {
    float* out = h + r * l.padded_width;
    if (r >= count) {
      __builtin_memset(out, 0, static_cast<size_t>(l.padded_width) * sizeof *out);
      continue;
    }
    const int64_t row = p.rows[g.first + first + r];
    const float* shift = p.shift + row / p.rows_per_group * p.width;
    const float* gain = p.gain + row / p.rows_per_group * p.width;
    for (int64_t i = 0; i < l.padded_width; i += kLanes)
      store(out + i, load_some(p.hidden + row * p.width + i, p.width - i));
    const RowMoments m = row_moments(out, p.width, l.padded_width);
    g.mean[first + r] = m.mean;
    g.scale[first + r] = m.scale;
    for (int64_t i = 0; i < l.padded_width; i += kLanes) {
      const int64_t left = p.width - i;
      const Floats scaled = (load(out + i) - m.mean) * m.scale * load_some(p.norm + i, left);
      store(out + i, fused_multiply_add(scaled, load_some(gain + i, left), load_some(shift + i, left)));
    }
  }
  for (int j = 0; j < width; j += kLanes) {
    const float* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = h + (j + i) * l.padded_width;
    pack_columns<Operand>(rows, l.padded_width, l.words, width, g.columns + first * l.words + j);
  }
  if (g.pairs == nullptr) return;
  for (int64_t column = 0; column < l.padded_width; column += kPanel) {
    const int across = panel_width(l.padded_width, column);
    uint32_t* panel = g.pairs + column * l.row_words;
    for (int64_t r = 0; r < width; r += l.kPer)
      for (int j = 0; j < across; j += kLanes) {
        const float* even = h + r * l.padded_width + column + j;
        const Floats odd = l.kPer == 2 ? load(even + l.padded_width) : Floats{};
        store_words(panel + (first + r) / l.kPer * across + j, Operand::zip(load(even), odd));
      }
  }
}

// ---- tiles of weights -----------------------------------------------------------------------------------

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

// The same weights as the right operand of a sum over tokens; zero for the excluded token.
template <class Operand, class Source>
void pack_weight_pairs(const MaskedCrossEntropyProblem& p, const HeadLayout<Operand>& l, int64_t token,
                       int64_t count, uint32_t* out) {
  const Source* w = static_cast<const Source*>(p.weight) + token * p.width;
  const int64_t token_words = (count + l.kPer - 1) / l.kPer;
  const auto values = [&](int64_t t, int64_t column) {
    if (t >= count || token + t == p.excluded_token) return Floats{};
    return load_some(w + t * p.width + column, p.width - column);
  };
  for (int64_t k = 0; k < token_words; ++k) {
    const int64_t t = k * l.kPer;
    for (int64_t column = 0; column < l.padded_width; column += kPanel) {
      const int across = panel_width(l.padded_width, column);
      uint32_t* words = out + column * token_words + k * across;
      for (int j = 0; j < across; j += kLanes)
        store_words(words + j,
                    Operand::zip(values(t, column + j), l.kPer == 2 ? values(t + 1, column + j) : Floats{}));
    }
  }
}

// ---- logits ---------------------------------------------------------------------------------------------

// exp(d) for d <= 0; 0 where the result would be denormal; NaN stays NaN.
inline Floats exp_nonpositive(Floats d, bool coarse) {
  const Floats x = d * kLog2E, lowest = broadcast(-126.0f);
  const Floats y = exp2_in_range(x < lowest ? lowest : x, coarse);
  return x < lowest ? Floats{} : (x == x ? y : x);
}

// Products of a tile with the rows of one panel: [count][width]. The excluded token's become 0.
template <class Operand>
void tile_products(const MaskedCrossEntropyProblem& p, const RowGroup& g, const HeadLayout<Operand>& l,
                   const Left& weights, int64_t token, int64_t count, int64_t row, int width, float* out) {
  multiply<Operand>(weights, count, g.columns + row * l.words, width, l.words, out, width);
  const int64_t excluded = p.excluded_token - token;
  if (excluded >= 0 && excluded < count)
    __builtin_memset(out + excluded * width, 0, static_cast<size_t>(width) * sizeof *out);
}

inline float bias_of(const MaskedCrossEntropyProblem& p, int64_t token) {
  return token == p.excluded_token ? -__builtin_inff() : p.bias[token];
}

// Adds a tile's logits to the maxima and sums of the rows of a panel, one row in each lane.
template <int Vecs>
void add_statistics(const MaskedCrossEntropyProblem& p, float* logits, int64_t token, int64_t count,
                    float* top_out, float* sum_out) {
  constexpr int kWidth = Vecs * kLanes;
  Floats top[Vecs], sum[Vecs];
  for (int v = 0; v < Vecs; ++v) top[v] = load(top_out + v * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    float* x = logits + t * kWidth;
    const float bias = bias_of(p, token + t);
    for (int v = 0; v < Vecs; ++v) {
      const Floats value = load(x + v * kLanes) + bias;
      store(x + v * kLanes, value);
      top[v] = larger(value, top[v]);  // a NaN does not get in, but will be in the sum
    }
  }
  for (int v = 0; v < Vecs; ++v)
    sum[v] = load(sum_out + v * kLanes) * exp_nonpositive(load(top_out + v * kLanes) - top[v], false);
  for (int64_t t = 0; t < count; ++t)
    for (int v = 0; v < Vecs; ++v)
      sum[v] += exp_nonpositive(load(logits + t * kWidth + v * kLanes) - top[v], false);
  for (int v = 0; v < Vecs; ++v) {
    store(top_out + v * kLanes, top[v]);
    store(sum_out + v * kLanes, sum[v]);
  }
}

template <class Operand>
void chunk_statistics(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
                      void* memory, const ChunkStatistics& out) {
  const HeadLayout<Operand> l(p, g.padded);
  TileScratch scratch;
  tile_scratch(l, false, memory, scratch);
  for (int64_t r = 0; r < g.padded; ++r) {
    out.top[r] = kLowestFloat / 2;  // finite, and so is its difference to any other
    out.sum[r] = 0;
  }
  for (int64_t token = range.first; token < range.last; token += range.tile) {
    const int64_t count = range.last - token < range.tile ? range.last - token : range.tile;
    const Left weights = weight_rows<Operand>(p, l, token, count, scratch.weights);
    for (int64_t row = 0; row < g.padded; row += kPanel) {
      const int width = panel_width(g.padded, row);
      tile_products<Operand>(p, g, l, weights, token, count, row, width, scratch.logits);
      if (width == kPanel)
        add_statistics<kTileVecs>(p, scratch.logits, token, count, out.top + row, out.sum + row);
      else
        add_statistics<2>(p, scratch.logits, token, count, out.top + row, out.sum + row);
      for (int r = 0; r < width; ++r) {
        const int64_t t = g.targets[row + r] - token;
        if (t >= 0 && t < count) out.target[row + r] = scratch.logits[t * width + r];
      }
    }
  }
}

// ---- gradients ------------------------------------------------------------------------------------------

// Turns the products of a tile with the rows of a panel into gradients of the logits, as operands.
template <class Operand, int Vecs>
void logit_gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, const HeadLayout<Operand>& l,
                     const TileScratch& scratch, int64_t token, int64_t count, int64_t row) {
  constexpr int kWidth = Vecs * kLanes, kPer = Operand::kPerWord;
  Floats top[Vecs], factor[Vecs], target_slope[Vecs];
  Ints target[Vecs];
  for (int v = 0; v < Vecs; ++v) {
    const int64_t at = row + v * kLanes;
    top[v] = load(g.top + at);
    factor[v] = load(g.factor + at);
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
      const float bias = bias_of(p, token + t + i);
      const Ints here = Ints{} + static_cast<int32_t>(token + t + i);
      Floats total = {};
      for (int v = 0; v < Vecs; ++v) {
        const Floats logit = load(scratch.logits + (t + i) * kWidth + v * kLanes) + bias;
        const Floats grown = exp_nonpositive(logit - top[v], kPer == 2) * factor[v];
        slope[i][v] = target[v] == here ? target_slope[v] : grown;
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
      uint16_t rounded[kLanes];
      store_bf16(rounded, value);
      uint16_t* to = static_cast<uint16_t*>(out.weight) + at;
      if (left >= kLanes)
        __builtin_memcpy(to, rounded, sizeof rounded);
      else
        for (int64_t i = 0; i < left; ++i) to[i] = rounded[i];
    }
}

template <class Operand>
void chunk_gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
                     void* memory, const MaskedCrossEntropyGradients& out, float* rows_grad) {
  const HeadLayout<Operand> l(p, g.padded);
  TileScratch scratch;
  tile_scratch(l, true, memory, scratch);
  const bool add = g.first > 0;  // to what earlier groups left
  for (int64_t token = range.first; token < range.last; token += range.tile) {
    const int64_t count = range.last - token < range.tile ? range.last - token : range.tile;
    const Left weights = weight_rows<Operand>(p, l, token, count, scratch.weights);
    for (int64_t row = 0; row < g.padded; row += kPanel) {
      const int width = panel_width(g.padded, row);
      tile_products<Operand>(p, g, l, weights, token, count, row, width, scratch.logits);
      if (width == kPanel)
        logit_gradients<Operand, kTileVecs>(p, g, l, scratch, token, count, row);
      else
        logit_gradients<Operand, 2>(p, g, l, scratch, token, count, row);
    }
    if (out.bias != nullptr)
      for (int64_t t = 0; t < count; ++t) {
        const float total = sum_lanes(load(scratch.bias_sums + t * kLanes));
        out.bias[token + t] = add ? out.bias[token + t] + total : total;
      }
    if (rows_grad != nullptr) {
      if (p.weight_is_bf16)
        pack_weight_pairs<Operand, uint16_t>(p, l, token, count, scratch.weight_pairs);
      else
        pack_weight_pairs<Operand, float>(p, l, token, count, scratch.weight_pairs);
      const int64_t token_words = (count + l.kPer - 1) / l.kPer;
      for (int64_t column = 0; column < l.padded_width; column += kPanel)
        multiply<Operand>({scratch.row_pairs, 1, l.rows_stride}, g.count,
                          scratch.weight_pairs + column * token_words, panel_width(l.padded_width, column),
                          token_words, rows_grad + column, l.padded_width, token > range.first);
    }
    if (out.weight != nullptr) {
      const Left slopes = {scratch.token_rows, l.tokens_row, 1};
      for (int64_t column = 0; column < l.padded_width; column += kPanel) {
        const int width = panel_width(l.padded_width, column);
        const uint32_t* panel = g.pairs + column * l.row_words;
        if (!out.weight_is_bf16 && column + width <= p.width) {
          multiply<Operand>(slopes, count, panel, width, l.row_words,
                            static_cast<float*>(out.weight) + token * p.width + column, p.width, add);
        } else {
          multiply<Operand>(slopes, count, panel, width, l.row_words, scratch.logits, width);
          put_weight_gradient(p, out, scratch.logits, token, count, column, width, add);
        }
      }
    }
  }
}

// ---- layer norm -----------------------------------------------------------------------------------------

void norm_sums(const MaskedCrossEntropyProblem& p, const RowGroup& g, int64_t block, const float* rows_grad) {
  const int64_t padded_width = round_up(p.width, 2 * kLanes);
  const int64_t first = block * kPanel, count = block_rows(g, block);
  for (int64_t r = first; r < first + count; ++r) {
    const int64_t row = p.rows[g.first + r];
    const float* x = p.hidden + row * p.width;
    const float* gain = p.gain + row / p.rows_per_group * p.width;
    Floats sum = {}, dot = {};
    for (int64_t i = 0; i < p.width; i += kLanes) {
      const int64_t left = p.width - i;
      const Floats slope =
          load(rows_grad + r * padded_width + i) * load_some(p.norm + i, left) * load_some(gain + i, left);
      const Floats normalized = (load_some(x + i, left) - g.mean[r]) * g.scale[r];
      sum += slope;
      dot = fused_multiply_add(slope, normalized, dot);
    }
    g.slope_mean[r] = sum_lanes(sum) / static_cast<float>(p.width);
    g.slope_row[r] = sum_lanes(dot) / static_cast<float>(p.width);
  }
}

// Rows are added up in blocks first, for accuracy.
void norm_gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, int64_t first, int64_t last,
                    const float* rows_grad, const MaskedCrossEntropyGradients& out) {
  constexpr int64_t kBlock = 32;
  const int64_t padded_width = round_up(p.width, 2 * kLanes);
  for (int64_t i = first; i < last; i += kLanes) {
    const int64_t left = last - i;
    const Floats norm = load_some(p.norm + i, left);
    Floats norm_sum = {}, shift_sum = {}, scale_sum = {};
    for (int64_t r = 0; r < g.count; ++r) {
      const int64_t row = p.rows[g.first + r], at = row / p.rows_per_group * p.width + i;
      const Floats grad = load(rows_grad + r * padded_width + i), gain = load_some(p.gain + at, left);
      const Floats normalized = (load_some(p.hidden + row * p.width + i, left) - g.mean[r]) * g.scale[r];
      const Floats product = grad * normalized;
      norm_sum = fused_multiply_add(product, gain, norm_sum);
      scale_sum = fused_multiply_add(product, norm, scale_sum);
      shift_sum += grad;
      if (out.hidden != nullptr)
        add_some(out.hidden + row * p.width + i,
                 (grad * norm * gain - g.slope_mean[r] - normalized * g.slope_row[r]) * g.scale[r], left);
      const bool last_of_block = (r + 1) % kBlock == 0 || r + 1 == g.count;
      if (last_of_block && out.norm != nullptr) {
        add_some(out.norm + i, norm_sum, left);
        norm_sum = Floats{};
      }
      const bool last_of_modulation =
          last_of_block || p.rows[g.first + r + 1] / p.rows_per_group != row / p.rows_per_group;
      if (last_of_modulation && out.shift != nullptr) {
        add_some(out.shift + at, shift_sum, left);
        add_some(out.scale + at, scale_sum, left);
        shift_sum = scale_sum = Floats{};
      }
    }
  }
}

// ---- entries of the table -------------------------------------------------------------------------------

CrossEntropySizes sizes(const MaskedCrossEntropyProblem& p, int64_t rows) {
  return p.narrow ? sizes_of<Narrow>(p, rows) : sizes_of<Wide>(p, rows);
}

void prepare(const MaskedCrossEntropyProblem& p, const RowGroup& g, int64_t block, void* scratch) {
  float* rows = static_cast<float*>(scratch);
  p.narrow ? prepare_block<Narrow>(p, g, block, rows) : prepare_block<Wide>(p, g, block, rows);
}

void statistics(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range, void* scratch,
                const ChunkStatistics& out) {
  const TileScope scope;
  p.narrow ? chunk_statistics<Narrow>(p, g, range, scratch, out)
           : chunk_statistics<Wide>(p, g, range, scratch, out);
}

void gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range, void* scratch,
               const MaskedCrossEntropyGradients& out, float* rows_grad) {
  const TileScope scope;
  p.narrow ? chunk_gradients<Narrow>(p, g, range, scratch, out, rows_grad)
           : chunk_gradients<Wide>(p, g, range, scratch, out, rows_grad);
}
