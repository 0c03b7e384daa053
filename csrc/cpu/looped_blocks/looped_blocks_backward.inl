// Backward of the two halves of a block application, for some rows of a sequence.
#pragma once

#include "cpu/attention/attend_backward.inl"
#include "cpu/looped_blocks/branch.inl"

struct BlockGradientScratch {
  uint32_t* act;          // [kBlockRows, hidden words]
  uint32_t* grad_mlp_in;  // [kBlockRows, width words]
  uint32_t* dropout;      // [padded D]
  float* sums;            // [kBlockRows, kPanel]
  float* wide;            // a panel of weights
  float* grad_act;        // [kBlockRows, padded D]
  float* heads;           // three arrays [L, head width]
  void* attention;
};

inline HeadShape head_shape(const BlockShape& s) { return {s.length, s.keys, s.head_dim, s.head_width}; }

constexpr int kHeadArrays = 3;  // the gradients of q, k, v

inline int64_t head_array_size(const BlockShape& s) { return s.length * s.head_width + 2 * kLanes; }

// Returns the bytes it takes.
inline int64_t lay_out(const BlockShape& s, void* memory, BlockGradientScratch& t) {
  Layout layout(memory);
  t.act = layout.take<uint32_t>(kBlockRows * s.hidden_words());
  t.grad_mlp_in = layout.take<uint32_t>(kBlockRows * s.width_words());
  t.dropout = layout.take<uint32_t>(s.hidden_padded);
  t.sums = layout.take<float>(kBlockRows * kPanel);
  t.wide = layout.take<float>(wide_panel_size<Bf16>(deepest_panel(s)));
  t.grad_act = layout.take<float>(kBlockRows * s.hidden_padded);
  t.heads = layout.take<float>(kHeadArrays * head_array_size(s));
  t.attention = layout.take<char>(attention_backward_scratch_bytes(head_shape(s)));
  return layout.bytes();
}

int64_t gradient_scratch_bytes(const BlockShape& s) {
  BlockGradientScratch unused;
  return lay_out(s, nullptr, unused);
}

inline BlockGradientScratch gradient_scratch(const BlockShape& s, void* memory) {
  BlockGradientScratch t;
  lay_out(s, memory, t);
  return t;
}

// Two rows (one for Fp32) of kLanes columns into panels.
template <class Operand>
inline void put_rows(const RowPanels& panels, int64_t row, int64_t column, Floats even, Floats odd) {
  const int64_t first = column / kPanel * kPanel;
  const int width = panel_width(panels.columns, first);
  store_words(panels.at + first * panels.words + row / Operand::kPerWord * width + (column - first),
              Operand::zip(even, odd));
}

// Row-major words into panels.
template <class Operand>
void put_words(const RowPanels& panels, int64_t panel_row, const uint32_t* words, int64_t row_words,
               int64_t count) {
  constexpr int kPer = Operand::kPerWord;
  for (int64_t r = 0; r < count; r += kPer)
    for (int64_t j = 0; j < panels.columns; j += 2 * kLanes) {
      Floats even[2], odd[2] = {};
      Operand::load(words + r * row_words + j / kPer, even[0], even[1]);
      if (kPer == 2 && r + 1 < count) Operand::load(words + (r + 1) * row_words + j / kPer, odd[0], odd[1]);
      for (int half = 0; half < 2; ++half)
        put_rows<Operand>(panels, panel_row + r, j + half * kLanes, even[half], odd[half]);
    }
}

// Inputs of a linear layer, normalised rows modulated again, into panels.
template <class Operand>
void put_modulated(const RowPanels& panels, int64_t panel_row, const uint32_t* normed, int64_t row_words,
                   int64_t count, const float* gain, const float* shift) {
  constexpr int kPer = Operand::kPerWord;
  for (int64_t r = 0; r < count; r += kPer)
    for (int64_t j = 0; j < panels.columns; j += 2 * kLanes) {
      Floats even[2], odd[2] = {};
      const bool has_odd = kPer == 2 && r + 1 < count;
      Operand::load(normed + r * row_words + j / kPer, even[0], even[1]);
      if (has_odd) Operand::load(normed + (r + 1) * row_words + j / kPer, odd[0], odd[1]);
      for (int half = 0; half < 2; ++half) {
        const int64_t at = j + half * kLanes;
        even[half] = fused_multiply_add(even[half], load(gain + at), load(shift + at));
        if (has_odd) odd[half] = fused_multiply_add(odd[half], load(gain + at), load(shift + at));
        put_rows<Operand>(panels, panel_row + r, at, even[half], odd[half]);
      }
    }
}

inline void ask_for(const uint32_t* words, int64_t count) {
  for (int64_t i = 0; i < count; i += kLineWords) __builtin_prefetch(words + i, 0, 2);
}

inline void add_to(float* sum, Floats x) { store(sum, load(sum) + x); }

// Gradient of a branch from that of the residual stream: through the gate and dropout. Adds to the sums of
// the gate and, if given, of the branch's bias.
template <class Operand>
void branch_gradient(const BlockShape& s, const float* grad_x, const uint32_t* branch, const float* gate,
                     const Dropout& dropout, uint32_t which, int64_t first_element, int64_t count,
                     uint32_t* words, float* gate_sum, float* bias_sum, uint32_t* mask) {
  constexpr int kPer = Operand::kPerWord;
  for (int64_t r = 0; r < count; ++r) {
    if (dropout.threshold) dropout_words(dropout, which, first_element + r * s.hidden, s.hidden, mask);
    const float* row = grad_x + r * s.hidden_padded;
    for (int64_t j = 0; j < s.hidden_padded; j += 2 * kLanes) {
      Floats value[2], out[2];
      Operand::load(branch + r * s.hidden_words() + j / kPer, value[0], value[1]);
      for (int half = 0; half < 2; ++half) {
        const int64_t at = j + half * kLanes;
        Floats g = load(row + at);
        if (dropout.threshold)
          g = keep_lanes(load_words(mask + at), dropout.threshold, g * dropout.keep_scale);
        add_to(gate_sum + at, g * value[half]);
        out[half] = g * load(gate + at);
        if (bias_sum) add_to(bias_sum + at, out[half]);
      }
      Operand::store(words + r * s.hidden_words() + j / kPer, out[0], out[1]);
    }
  }
}

// grad_x += that of layer_norm(x) * gain + shift, one row. n: normalised row, d: gradient of the result.
// dx = scale * (d gain - mean(d gain) - n mean(d gain n)).
template <class Operand>
inline void norm_gradient_row(const BlockShape& s, const float* d, const uint32_t* normed, const float* gain,
                              float scale, float* shift_sum, float* gain_sum, float* grad_x) {
  constexpr int kPer = Operand::kPerWord;
  Floats sum = {}, product = {};
  for (int64_t j = 0; j < s.hidden_padded; j += 2 * kLanes) {
    Floats n[2];
    Operand::load(normed + j / kPer, n[0], n[1]);
    for (int half = 0; half < 2; ++half) {
      const int64_t at = j + half * kLanes;
      const Floats dd = load(d + at), scaled = dd * load(gain + at);
      add_to(shift_sum + at, dd);
      add_to(gain_sum + at, dd * n[half]);
      sum += scaled;
      product = fused_multiply_add(scaled, n[half], product);
    }
  }
  const float width = static_cast<float>(s.hidden);
  const Floats mean = broadcast(sum_lanes(sum) / width), slope = broadcast(sum_lanes(product) / width);
  for (int64_t j = 0; j < s.hidden_padded; j += 2 * kLanes) {
    Floats n[2];
    Operand::load(normed + j / kPer, n[0], n[1]);
    for (int half = 0; half < 2; ++half) {
      const int64_t at = j + half * kLanes;
      const Floats inner = load(d + at) * load(gain + at) - mean - n[half] * slope;
      store(grad_x + at, fused_multiply_add(inner, broadcast(scale), load(grad_x + at)));
    }
  }
}

// c[count, columns] = a[count, depth] times packed panels.
template <class Operand>
void multiply_panels(const uint32_t* a, int64_t row_words, int64_t count, const uint32_t* packed,
                     int64_t depth, int64_t columns, float* c, float* wide) {
  using Weights = typename Operand::Weights;
  constexpr int64_t kSlice = kSliceDepth / Operand::kPerWord;
  const int64_t words = operand_words<Operand>(depth), column_words = right_words<Weights>(words);
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int width = panel_width(columns, column);
    for (int64_t k = 0; k < words; k += kSlice)
      multiply_packed<Operand>(
          {a + k, row_words, 1}, count, packed + column * column_words + right_words<Weights>(k) * width,
          width, words - k < kSlice ? words - k : kSlice, c + column, columns, k > 0, true, wide);
  }
}

// The gradient of a branch of a span, as rows of t.act and as panels `out`.
template <class Operand>
void branch_span(const BlockShape& s, const GradientSpan& span, int64_t row, const Dropout& dropout,
                 uint32_t which, const RowPanels& out, BlockGradientScratch& t) {
  const int64_t hidden_words = s.hidden_words();
  const uint32_t* branch =
      (which == 0 ? span.record.branch1 : span.record.branch2) + span.first * hidden_words;
  uint32_t* act = t.act + row * hidden_words;
  branch_gradient<Operand>(s, span.grad_x, branch, which == 0 ? span.vectors.gate1 : span.vectors.gate2,
                           dropout, which, span.first_element + span.first * s.hidden, span.count, act,
                           span.sums.modulation + (which == 0 ? 2 : 5) * s.hidden_padded,
                           which == 0 ? nullptr : span.sums.mlp_out_bias, t.dropout);
  put_words<Operand>(out, span.panel_row, act, hidden_words, span.count);
}

// A panel of columns, back through gelu, as rows of t.grad_mlp_in and as panels.
template <class Operand>
void activate_back(const BlockShape& s, const GradientSpan& span, int64_t row, int64_t column, int width,
                   const ApplicationPanels& panels, BlockGradientScratch& t) {
  constexpr int kPer = Operand::kPerWord;
  const int64_t width_words = s.width_words(), panel_words = width / kPer;
  const float* sums = t.sums + row * kPanel;
  const uint32_t* record = span.record.mlp_in + s.panel_record(column) + span.first * panel_words;
  uint32_t* out = t.grad_mlp_in + row * width_words + column / kPer;
  for (int j = 0; j < width; j += 2 * kLanes) {
    float* const bias_sum = span.sums.mlp_in_bias + column + j;
    Floats bias[2] = {load(bias_sum), load(bias_sum + kLanes)};
    for (int64_t r = 0; r < span.count; r += kPer) {
      Floats activated[2][2] = {}, grad[2][2] = {};  // [row][half]
      for (int odd = 0; odd < kPer && r + odd < span.count; ++odd) {
        Floats u[2];
        Operand::load(record + (r + odd) * panel_words + j / kPer, u[0], u[1]);
        for (int half = 0; half < 2; ++half) {
          Floats slope;
          activated[odd][half] = gelu_with_slope(u[half], kPer == 2, slope);
          grad[odd][half] = load(sums + (r + odd) * kPanel + j + half * kLanes) * slope;
          bias[half] += grad[odd][half];
        }
        Operand::store(out + (r + odd) * width_words + j / kPer, grad[odd][0], grad[odd][1]);
      }
      for (int half = 0; half < 2; ++half) {
        const int64_t at = column + j + half * kLanes;
        put_rows<Operand>(panels.activated, span.panel_row + r, at, activated[0][half], activated[1][half]);
        put_rows<Operand>(panels.grad_mlp_in, span.panel_row + r, at, grad[0][half], grad[1][half]);
      }
    }
    store(bias_sum, bias[0]);
    store(bias_sum + kLanes, bias[1]);
  }
}

// Through a norm and its modulation, the attention's or the MLP's: from t.grad_act into the residual stream,
// with the layer's input as panels.
template <class Operand>
void norm_span(const BlockShape& s, const GradientSpan& span, int64_t row, bool mlp, const RowPanels& input,
               const BlockGradientScratch& t) {
  const BlockVectors& v = span.vectors;
  const int64_t hidden_words = s.hidden_words();
  const uint32_t* normed = (mlp ? span.record.normed2 : span.record.normed1) + span.first * hidden_words;
  const float* scale = (mlp ? span.record.scale2 : span.record.scale1) + span.first;
  const float *gain = mlp ? v.gain2 : v.gain1, *shift = mlp ? v.shift2 : v.shift1;
  float* shift_sum = span.sums.modulation + (mlp ? 3 : 0) * s.hidden_padded;
  for (int64_t r = 0; r < span.count; ++r)
    norm_gradient_row<Operand>(s, t.grad_act + (row + r) * s.hidden_padded, normed + r * hidden_words, gain,
                               scale[r], shift_sum, shift_sum + s.hidden_padded,
                               span.grad_x + r * s.hidden_padded);
  put_modulated<Operand>(input, span.panel_row, normed, hidden_words, span.count, gain, shift);
}

template <class Operand>
void finish_gradient_rows(const BlockShape& s, const TransposedPointers& weights, const Dropout& dropout,
                          const GradientSpans& spans, const ApplicationPanels& panels,
                          BlockGradientScratch& t) {
  using Weights = typename Operand::Weights;
  const int64_t hidden_words = s.hidden_words(), width_words = s.width_words();
  for_spans(spans, [&](const GradientSpan& span, int64_t row) {
    branch_span<Operand>(s, span, row, dropout, 1, panels.grad_branch2, t);
  });
  const int64_t depth = operand_words<Operand>(s.hidden), column_depth = right_words<Weights>(depth);
  for (int64_t column = 0; column < s.width_padded; column += kPanel) {
    const int width = panel_width(s.width_padded, column);
    for_spans(spans, [&](const GradientSpan& span, int64_t) {  // from memory, while the product runs
      const int64_t panel_words = width / Operand::kPerWord;
      const uint32_t* record = span.record.mlp_in + s.panel_record(column) + span.first * panel_words;
      ask_for(record, span.count * panel_words);
    });
    multiply_packed<Operand>({t.act, hidden_words, 1}, spans.rows, weights.mlp_out + column * column_depth,
                             width, depth, t.sums, kPanel, false, false, t.wide);
    for_spans(spans, [&](const GradientSpan& span, int64_t row) {
      activate_back<Operand>(s, span, row, column, width, panels, t);
    });
  }
  multiply_panels<Operand>(t.grad_mlp_in, width_words, spans.rows, weights.mlp_in, s.width, s.hidden_padded,
                           t.grad_act, t.wide);
  for_spans(spans, [&](const GradientSpan& span, int64_t row) {
    norm_span<Operand>(s, span, row, true, panels.act2, t);
    branch_span<Operand>(s, span, row, dropout, 0, panels.grad_branch1, t);
    put_words<Operand>(panels.mixed, span.panel_row, span.record.mixed + span.first * hidden_words,
                       hidden_words, span.count);
  });
  multiply_panels<Operand>(t.act, hidden_words, spans.rows, weights.attn_out, s.hidden, s.hidden_padded,
                           spans.at->grad_mixed, t.wide);
}

template <class Operand>
void head_gradient(const BlockShape& s, const BlockRecord& record, const SequenceState& seq, int64_t head,
                   const GradientRows& rows, BlockGradientScratch& t) {
  constexpr int kPer = Operand::kPerWord;
  float* arrays[kHeadArrays];
  for (int i = 0; i < kHeadArrays; ++i) arrays[i] = t.heads + i * head_array_size(s);
  const int64_t row = s.head_width, words = s.head_words(), first = s.head_record(head);
  const HeadGradientInput in = {.q = record.query + first,
                                .k = record.key + first,
                                .v = record.value + first,
                                .out = record.mixed + head * words,
                                .grad_out = rows.grad_mixed + head * s.head_dim,
                                .q_row = words,
                                .k_row = words,
                                .v_row = words,
                                .out_row = s.hidden_words(),
                                .grad_out_row = s.hidden_padded,
                                .log_sum_exp = record.log_sum_exp + head * s.length};
  attend_backward<Operand>(head_shape(s), in, seq.key_bias, t.attention,
                           {arrays[0], arrays[1], arrays[2], row, row, row});
  const int64_t half = s.head_dim / 2, row_words = round_up(3 * s.hidden, 2 * kLanes) / kPer;
  constexpr int64_t kRowsAhead = 16;  // rows are too far apart to be foreseen
  for (int part = 0; part < 3; ++part) {
    uint32_t* out = rows.grad_qkv + (part * s.hidden + head * s.head_dim) / kPer;
    for (int64_t r = 0; r < s.length; ++r, out += row_words) {
      float* source = arrays[part] + r * row;
      for (int64_t i = 0; i < words; i += kLineWords) __builtin_prefetch(out + kRowsAhead * row_words + i, 1);
      if (part < 2 && seq.cos)
        rotate_row(source, seq.cos + r * half, seq.sin + r * half, -1.0f, half, source);
      store_row<Operand>(source, s.head_dim, out);
    }
  }
}

template <class Operand>
void project_gradient_rows(const BlockShape& s, const TransposedPointers& weights, const GradientSpans& spans,
                           const ApplicationPanels& panels, BlockGradientScratch& t) {
  const int64_t row_words = round_up(3 * s.hidden, 2 * kLanes) / Operand::kPerWord;
  multiply_panels<Operand>(spans.at->grad_qkv, row_words, spans.rows, weights.qkv, 3 * s.hidden,
                           s.hidden_padded, t.grad_act, t.wide);
  for_spans(spans, [&](const GradientSpan& span, int64_t row) {
    put_words<Operand>(panels.grad_qkv, span.panel_row, span.grad_qkv, row_words, span.count);
    norm_span<Operand>(s, span, row, false, panels.act1, t);
  });
}

// A slice of the left panels stays in the second-level cache while the slices of the right ones pass by; each
// is asked for one product ahead, since a tile's words of a left panel are too far apart to be foreseen. The
// sums come from afar, and each slice more fetches them once more. Sums of floats are cut shorter: the
// rounding of a running sum grows with its length, and of 256 rows it was about half of the error of the
// worst element.
template <class Operand>
void weight_gradient(const RowPanels& left, int64_t out, const PanelRange& left_range, const RowPanels& right,
                     const PanelRange& right_range, float* gradient, bool add) {
  constexpr int64_t kSlice = Operand::kPerWord == 1 ? 128 : 512;
  for (int64_t k = 0; k < right.words; k += kSlice) {
    const int64_t words = right.words - k < kSlice ? right.words - k : kSlice;
    const auto slice_of = [k](const RowPanels& panels, int64_t panel) -> const uint32_t* {
      const int64_t column = panel * kPanel;
      return panels.at + column * panels.words + k * panel_width(panels.columns, column);
    };
    const auto whole = [](const RowPanels& panels, int64_t panel) {
      return panel_width(panels.columns, panel * kPanel) == kPanel;
    };
    for (int64_t i = right_range.first; i < right_range.last; ++i) {
      const int64_t column = i * kPanel;
      const int width = panel_width(right.columns, column);
      for (int64_t panel = left_range.first; panel < left_range.last; ++panel) {
        const int64_t row = panel * kPanel, rows = out - row < kPanel ? out - row : kPanel;
        const Left a = {slice_of(left, panel), 1, panel_width(left.columns, row)};
        float* const sums = gradient + row * right.columns + column;
        for (int64_t r = 0; r < rows; ++r)
          for (int j = 0; j < width; j += kLineWords) __builtin_prefetch(sums + r * right.columns + j, 1, 2);
        const uint32_t* ahead = nullptr;
        if (panel + 1 < left_range.last) {
          if (i == right_range.first && whole(left, panel + 1)) ahead = slice_of(left, panel + 1);
        } else if (i + 1 < right_range.last && whole(right, i + 1)) {
          ahead = slice_of(right, i + 1);
        }
        const Next next = {ahead, ahead == nullptr ? 0 : words * kPanel};
        const auto product = add || k > 0 ? multiply_width<Operand, true> : multiply_width<Operand, false>;
        product(a, rows, slice_of(right, i), width, words, sums, right.columns, next);
      }
    }
  }
}

void finish_gradient(const BlockShape& s, bool bf16, const TransposedPointers& weights,
                     const Dropout& dropout, const GradientSpans& spans, const ApplicationPanels& panels,
                     void* memory) {
  const TileScope scope;
  BlockGradientScratch t = gradient_scratch(s, memory);
  bf16 ? finish_gradient_rows<Bf16>(s, weights, dropout, spans, panels, t)
       : finish_gradient_rows<Fp32>(s, weights, dropout, spans, panels, t);
}

void head_gradient_of(const BlockShape& s, bool bf16, const BlockRecord& record, const SequenceState& seq,
                      int64_t head, const GradientRows& rows, void* memory) {
  const TileScope scope;
  BlockGradientScratch t = gradient_scratch(s, memory);
  bf16 ? head_gradient<Bf16>(s, record, seq, head, rows, t)
       : head_gradient<Fp32>(s, record, seq, head, rows, t);
}

void project_gradient(const BlockShape& s, bool bf16, const TransposedPointers& weights,
                      const GradientSpans& spans, const ApplicationPanels& panels, void* memory) {
  const TileScope scope;
  BlockGradientScratch t = gradient_scratch(s, memory);
  bf16 ? project_gradient_rows<Bf16>(s, weights, spans, panels, t)
       : project_gradient_rows<Fp32>(s, weights, spans, panels, t);
}

void weight_gradient_of(bool bf16, const RowPanels& left, int64_t out, const PanelRange& left_range,
                        const RowPanels& right, const PanelRange& right_range, float* gradient, bool add) {
  bf16 ? weight_gradient<Bf16>(left, out, left_range, right, right_range, gradient, add)
       : weight_gradient<Fp32>(left, out, left_range, right, right_range, gradient, add);
}

constexpr LoopedBlocksBackwardKernel table = {gradient_scratch_bytes, finish_gradient, head_gradient_of,
                                              project_gradient, weight_gradient_of};
