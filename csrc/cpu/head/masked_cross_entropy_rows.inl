// The selected rows: normalised as operands, and the gradients of their layer norm.
#pragma once

#include "cpu/head/masked_cross_entropy_tiles.inl"
#include "cpu/head/modulated_row.inl"

inline int64_t block_rows(const RowGroup& g, int64_t block) {
  const int64_t left = g.count - block * kPanel;
  return left < kPanel ? left : kPanel;
}

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
    const RowMoments m = modulate_row(p, p.rows[g.first + first + r], out);
    g.mean[first + r] = m.mean;
    g.scale[first + r] = m.scale;
  }
  for (int j = 0; j < width; j += kLanes)
    pack_columns<Operand>(h + j * l.padded_width, l.padded_width, kLanes, l.padded_width, l.words, width,
                          g.columns + first * l.words + j);
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

void norm_sums(const MaskedCrossEntropyProblem& p, const RowGroup& g, int64_t block, const float* grad_rows) {
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
          load(grad_rows + r * padded_width + i) * load_some(p.norm + i, left) * load_some(gain + i, left);
      const Floats normalized = (load_some(x + i, left) - g.mean[r]) * g.scale[r];
      sum += slope;
      dot = fused_multiply_add(slope, normalized, dot);
    }
    // Without a norm nothing flows back through its moments.
    g.slope_mean[r] = p.normalized ? sum_lanes(sum) / static_cast<float>(p.width) : 0.0f;
    g.slope_row[r] = p.normalized ? sum_lanes(dot) / static_cast<float>(p.width) : 0.0f;
  }
}

// Rows are added up in blocks first, for accuracy.
void norm_gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, int64_t first, int64_t last,
                    const float* grad_rows, const MaskedCrossEntropyGradients& out) {
  constexpr int64_t kBlock = 32;
  const int64_t padded_width = round_up(p.width, 2 * kLanes);
  for (int64_t i = first; i < last; i += kLanes) {
    const int64_t left = last - i;
    const Floats norm = load_some(p.norm + i, left);
    Floats norm_sum = {}, shift_sum = {}, scale_sum = {};
    for (int64_t r = 0; r < g.count; ++r) {
      const int64_t row = p.rows[g.first + r], at = row / p.rows_per_group * p.width + i;
      const Floats grad = load(grad_rows + r * padded_width + i), gain = load_some(p.gain + at, left);
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
