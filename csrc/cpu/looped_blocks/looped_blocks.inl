// The two halves of a block application, on some rows of one sequence or of several.
#pragma once

#include "cpu/attention/attend.inl"
#include "cpu/looped_blocks/branch.inl"

struct BlockScratch {
  uint32_t* act;        // [kBlockRows, hidden words]: operand of the next product
  uint32_t* activated;  // [kBlockRows, width words]: inside the MLP, after gelu
  float* sums;          // [kBlockRows, sums_row]: a panel or a group of heads
  float* wide;          // a panel of weights
  float* row;           // one head, padded
  uint32_t* words;      // [kLanes, head words]: keys on their way into a panel
  uint32_t* keys;       // one head of a sequence that is kept in rows
  uint32_t* values;
  AttentionScratch* attention;
  int64_t sums_row;
};

inline int64_t sums_columns(const BlockShape& s) {
  const int64_t heads = kPanel / s.head_width;
  const int64_t group = (heads > 1 ? heads : 1) * s.head_width;
  return group > kPanel ? group : kPanel;
}

// Returns the bytes it takes.
inline int64_t lay_out(const BlockShape& s, void* memory, BlockScratch& t) {
  const bool rows = s.sequences_together() > 1;
  Layout layout(memory);
  t.act = layout.take<uint32_t>(kBlockRows * s.hidden_words());
  t.activated = layout.take<uint32_t>(kBlockRows * s.width_words());
  t.sums_row = sums_columns(s);
  t.sums = layout.take<float>(kBlockRows * t.sums_row + 2 * kLanes);
  t.wide = layout.take<float>(wide_panel_size<Bf16>(deepest_panel(s)));
  t.row = layout.take<float>(round_up(s.head_width, 2 * kLanes));
  t.words = layout.take<uint32_t>(kLanes * s.head_words());
  t.keys = layout.take<uint32_t>(rows ? s.keys * s.head_words() : 0);
  t.values = layout.take<uint32_t>(rows ? s.head_width * s.keys / s.per_word : 0);
  t.attention = layout.take<AttentionScratch>(1);
  return layout.bytes();
}

int64_t block_scratch_bytes(const BlockShape& s) {
  BlockScratch unused;
  return lay_out(s, nullptr, unused);
}

void clear_block_scratch(const BlockShape& s, void* memory) {
  __builtin_memset(memory, 0, static_cast<size_t>(block_scratch_bytes(s)));
}

inline BlockScratch block_scratch(const BlockShape& s, void* memory) {
  BlockScratch t;
  lay_out(s, memory, t);
  return t;
}

// layer_norm(x) * gain + shift as operands; records the normalised row if `normed` is not null.
template <class Operand>
inline void norm_modulate_row(const float* x, int64_t width, int64_t padded, const float* gain,
                              const float* shift, uint32_t* out, uint32_t* normed, float* scale) {
  const RowMoments m = row_moments(x, width, padded);
  for (int64_t i = 0; i < padded; i += 2 * kLanes) {
    Floats n[2], h[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + half * kLanes;
      n[half] = (load(x + at) - m.mean) * m.scale;
      h[half] = fused_multiply_add(n[half], load(gain + at), load(shift + at));
    }
    Operand::store(out + i / Operand::kPerWord, h[0], h[1]);
    if (normed) Operand::store(normed + i / Operand::kPerWord, n[0], n[1]);
  }
  if (!normed) return;
  *scale = m.scale;
  for (int64_t k = width / Operand::kPerWord; k < padded / Operand::kPerWord; ++k) normed[k] = 0;
}

// Words [hidden words] of a position's head.
inline uint32_t* head_of(const BlockShape& s, uint32_t* rows, int64_t position, int64_t head) {
  return rows + position * s.hidden_words() + head * s.head_words();
}

// One head's columns of the values of a span.
template <class Operand>
void put_values(const BlockShape& s, const RowSpan& span, int parity, int64_t head, const float* sums,
                int64_t sums_row) {
  constexpr int kPer = Operand::kPerWord;
  const auto store_rows = [&](uint32_t* out, int64_t row_words) {
    for (int64_t r = 0; r < span.count; ++r)
      store_row<Operand>(sums + r * sums_row, s.head_dim, out + r * row_words);
  };
  if (span.record.value)
    store_rows(span.record.value + s.head_record(head) + span.first * s.head_words(), s.head_words());
  if (span.state->value_rows)
    store_rows(head_of(s, span.state->value_rows, span.first, head), s.hidden_words());
  if (span.state->values[parity] == nullptr) return;
  uint32_t* values = span.state->values[parity] + head * s.head_width * (s.keys / kPer);
  for (int64_t column = 0; column < s.head_width; column += kPanel) {
    const int width = panel_width(s.head_width, column);
    uint32_t* panel = values + column * (s.keys / kPer);
    for (int64_t r = 0; r < span.count; r += kPer)
      for (int j = 0; j < width; j += kLanes) {
        const float* even = sums + r * sums_row + column + j;
        const Floats odd = r + 1 < span.count ? load(even + sums_row) : Floats{};
        store_words(panel + (span.first + r) / kPer * width + j, Operand::zip(load(even), odd));
      }
  }
}

// Words of `count` keys into the panels of their head: one, or kLanes of them that fill a vector of a panel.
inline void put_keys(const BlockShape& s, const uint32_t* words, int64_t count, int64_t position,
                     uint32_t* keys) {
  const int64_t head_words = s.head_words(), panel = position / kPanel * kPanel;
  const int width = key_panel_width(s.length, panel);
  uint32_t* key = keys + panel * head_words + position - panel;
  if (count == 1) {
    for (int64_t k = 0; k < head_words; ++k) key[k * width] = words[k];
    return;
  }
  pack_columns_of(kLanes, head_words, width, key, [&](int j, int64_t k) {
    return load_row_words(words + j * head_words + k, head_words - k);
  });
}

// Words of a head, turned by the angles of its position.
template <class Operand>
inline void turn_row(const BlockShape& s, const SequenceState& seq, int64_t position, const float* source,
                     float* row, uint32_t* words) {
  if (seq.cos) {
    const int64_t half = s.head_dim / 2;
    rotate_row(source, seq.cos + position * half, seq.sin + position * half, 1.0f, half, row);
    source = row;
  }
  store_row<Operand>(source, s.head_dim, words);
}

// One head's columns of the queries or keys of a span.
template <class Operand>
void put_turned(const BlockShape& s, const RowSpan& span, int parity, bool keys, int64_t head,
                const float* sums, int64_t sums_row, BlockScratch& t) {
  const SequenceState& seq = *span.state;
  const size_t bytes = static_cast<size_t>(s.head_words()) * sizeof(uint32_t);
  uint32_t* const rows = keys ? seq.key_rows : seq.queries;
  uint32_t* record = keys ? span.record.key : span.record.query;
  if (record) record += s.head_record(head);
  uint32_t* const panels =
      keys && seq.keys[parity] ? seq.keys[parity] + head * s.keys * s.head_words() : nullptr;
  for (int64_t r = 0; r < span.count;) {
    // Other threads write the neighbours of keys that do not fill a vector.
    const bool together = panels && (span.first + r) % kLanes == 0 && span.count - r >= kLanes;
    const int64_t count = together ? kLanes : 1, first = span.first + r;
    for (int64_t i = 0; i < count; ++i, ++r) {
      uint32_t* words = panels ? t.words + i * s.head_words() : head_of(s, rows, first + i, head);
      turn_row<Operand>(s, seq, first + i, sums + r * sums_row, t.row, words);
      if (record) __builtin_memcpy(record + (first + i) * s.head_words(), words, bytes);
    }
    if (panels) put_keys(s, t.words, count, first, panels);
  }
}

// x += gate * dropout(sums + bias), a panel of columns of some rows.
template <class Operand>
inline void add_branch(const BlockShape& s, const float* bias, const float* gate, const Dropout& dropout,
                       uint32_t branch, int64_t first_element, int64_t rows, int64_t column, int width,
                       const float* sums, int64_t sums_row, float* x, uint32_t* record) {
  // Behind the row's last number all is dropped: a NaN there would stay, and spoil the row's next norm.
  alignas(64) uint32_t words[kPanel] = {};
  const int64_t left = s.hidden - column, drawn = left < width ? left : width;
  for (int64_t r = 0; r < rows; ++r) {
    if (dropout.threshold)
      dropout_words(dropout, branch, first_element + r * s.hidden + column, drawn, words);
    for (int j = 0; j < width; j += 2 * kLanes) {
      Floats y[2];
      for (int half = 0; half < 2; ++half) {
        const int at = j + half * kLanes;
        y[half] = load(sums + r * sums_row + at);
        if (bias) y[half] += load(bias + column + at);
      }
      if (record)
        Operand::store(record + r * s.hidden_words() + (column + j) / Operand::kPerWord, y[0], y[1]);
      for (int half = 0; half < 2; ++half) {
        const int at = j + half * kLanes;
        if (dropout.threshold)
          y[half] = keep_lanes(load_words(words + at), dropout.threshold, y[half] * dropout.keep_scale);
        float* target = x + r * s.hidden_padded + column + at;
        store(target, fused_multiply_add(y[half], load(gate + column + at), load(target)));
      }
    }
  }
}

template <class Operand>
void project_rows(const BlockShape& s, const BlockPointers& weights, const RowSpans& spans, int parity,
                  BlockScratch& t) {
  using Weights = typename Operand::Weights;
  for_spans(spans, [&](const RowSpan& span, int64_t row) {
    uint32_t* normed = span.record.normed1;
    for (int64_t r = span.first; r < span.first + span.count; ++r, ++row)
      norm_modulate_row<Operand>(span.state->x + r * s.hidden_padded, s.hidden, s.hidden_padded,
                                 span.vectors.gain1, span.vectors.shift1, t.act + row * s.hidden_words(),
                                 normed ? normed + r * s.hidden_words() : nullptr, span.record.scale1 + r);
  });
  const Left act = {t.act, s.hidden_words(), 1};
  const int64_t words = operand_words<Operand>(s.hidden), column_words = right_words<Weights>(words);
  const int64_t fit = kPanel / s.head_width, group_heads = fit > 1 ? fit : 1;
  const int64_t part_size = s.heads * s.head_width * column_words;
  for (int part = 0; part < 3; ++part) {
    for (int64_t head = 0; head < s.heads; head += group_heads) {
      const int64_t heads = s.heads - head < group_heads ? s.heads - head : group_heads;
      const int64_t columns = heads * s.head_width;
      const uint32_t* packed = weights.qkv + part * part_size + head * s.head_width * column_words;
      for (int64_t column = 0; column < columns; column += kPanel)
        multiply_packed<Operand>(act, spans.rows, packed + column * column_words,
                                 panel_width(columns, column), words, t.sums + column, t.sums_row, false,
                                 true, t.wide);
      for_spans(spans, [&](const RowSpan& span, int64_t row) {
        for (int64_t h = 0; h < heads; ++h) {
          const float* sums = t.sums + row * t.sums_row + h * s.head_width;
          if (part == 2)
            put_values<Operand>(s, span, parity, head + h, sums, t.sums_row);
          else
            put_turned<Operand>(s, span, parity, part == 1, head + h, sums, t.sums_row, t);
        }
      });
    }
  }
}

// Keys and values of one head of a sequence that is kept in rows, into panels.
template <class Operand>
void pack_head_rows(const BlockShape& s, const SequenceState& seq, int64_t head, BlockScratch& t) {
  constexpr int kPer = Operand::kPerWord;
  for (int64_t key = 0; key < s.length; key += kLanes) {
    const int64_t panel = key / kPanel * kPanel, left = s.length - key;
    pack_columns_of(static_cast<int>(left < kLanes ? left : kLanes), s.head_words(),
                    key_panel_width(s.length, panel), t.keys + panel * s.head_words() + key - panel,
                    [&](int j, int64_t k) {
                      return load_row_words(head_of(s, seq.key_rows, key + j, head) + k, s.head_words() - k);
                    });
  }
  for (int64_t r = 0; r < s.length; r += kPer)
    for (int64_t i = 0; i < s.head_dim; i += 2 * kLanes) {
      const int64_t left = s.head_words() - i / kPer;
      Floats even[2], odd[2] = {};
      load_some_words<Operand>(head_of(s, seq.value_rows, r, head) + i / kPer, left, even[0], even[1]);
      if (kPer == 2 && r + 1 < s.length)
        load_some_words<Operand>(head_of(s, seq.value_rows, r + 1, head) + i / kPer, left, odd[0], odd[1]);
      for (int half = 0; half < 2 && i + half * kLanes < s.head_width; ++half) {
        const int64_t column = i + half * kLanes, panel = column / kPanel * kPanel;
        store_words(
            t.values + panel * (s.keys / kPer) + r / kPer * panel_width(s.head_width, panel) + column - panel,
            Operand::zip(even[half], odd[half]));
      }
    }
}

// Attention of the rows of a span: words [count][hidden words].
template <class Operand>
void attend_span(const BlockShape& s, const RowSpan& span, int parity, uint32_t* mixed, BlockScratch& t) {
  const SequenceState& seq = *span.state;
  const int64_t key_size = s.keys * s.head_words(), value_size = s.head_width * (s.keys / Operand::kPerWord);
  const bool in_rows = seq.keys[parity] == nullptr, recorded = span.record.mixed != nullptr;
  const HeadShape shape = {s.length, s.keys, s.head_dim, s.head_width};
  for (int64_t head = 0; head < s.heads; ++head) {
    if (in_rows) pack_head_rows<Operand>(s, seq, head, t);
    attend<Operand>(shape, head_of(s, seq.queries, span.first, head), s.hidden_words(), span.count,
                    in_rows ? t.keys : seq.keys[parity] + head * key_size,
                    in_rows ? t.values : seq.values[parity] + head * value_size, seq.key_bias, *t.attention,
                    t.sums, s.head_width,
                    recorded ? span.record.log_sum_exp + head * s.length + span.first : nullptr);
    for (int64_t r = 0; r < span.count; ++r)
      store_row<Operand>(t.sums + r * s.head_width, s.head_dim, head_of(s, mixed, r, head));
  }
  if (recorded)
    __builtin_memcpy(head_of(s, span.record.mixed, span.first, 0), mixed,
                     static_cast<size_t>(span.count * s.hidden_words()) * sizeof *mixed);
}

// A panel of columns of x += gate * dropout(sums + bias), with the branch recorded.
template <class Operand>
void add_branches(const BlockShape& s, const RowSpans& spans, uint32_t branch, int64_t column, int width,
                  const BlockScratch& t) {
  for_spans(spans, [&](const RowSpan& span, int64_t row) {
    const BlockVectors& v = span.vectors;
    uint32_t* record = branch == 0 ? span.record.branch1 : span.record.branch2;
    add_branch<Operand>(s, branch == 0 ? nullptr : v.mlp_out_bias, branch == 0 ? v.gate1 : v.gate2,
                        span.dropout, branch, span.state->first_element + span.first * s.hidden, span.count,
                        column, width, t.sums + row * t.sums_row, t.sums_row,
                        span.state->x + span.first * s.hidden_padded,
                        record ? record + span.first * s.hidden_words() : nullptr);
  });
}

// A panel of columns of gelu(sums + bias), recorded before gelu.
template <class Operand>
void activate(const BlockShape& s, const RowSpan& span, int64_t row, int64_t column, int width,
              BlockScratch& t) {
  constexpr int kPer = Operand::kPerWord;
  const int64_t width_words = s.width_words();
  uint32_t* record = span.record.mlp_in;
  if (record) record += s.panel_record(column);
  for (int64_t r = 0; r < span.count; ++r)
    for (int j = 0; j < width; j += 2 * kLanes) {
      Floats u[2];
      for (int half = 0; half < 2; ++half) {
        const int at = j + half * kLanes;
        u[half] = load(t.sums + (row + r) * t.sums_row + at) + load(span.vectors.mlp_in_bias + column + at);
      }
      if (record) Operand::store(record + (span.first + r) * (width / kPer) + j / kPer, u[0], u[1]);
      for (int half = 0; half < 2; ++half) u[half] = gelu(u[half], kPer == 2);
      Operand::store(t.activated + (row + r) * width_words + (column + j) / kPer, u[0], u[1]);
    }
}

template <class Operand>
void finish_rows(const BlockShape& s, const BlockPointers& weights, const RowSpans& spans, int parity,
                 BlockScratch& t) {
  using Weights = typename Operand::Weights;
  const int64_t hidden_words = s.hidden_words(), width_words = s.width_words();
  for_spans(spans, [&](const RowSpan& span, int64_t row) {
    attend_span<Operand>(s, span, parity, t.act + row * hidden_words, t);
  });
  const Left act = {t.act, hidden_words, 1};
  const int64_t words = operand_words<Operand>(s.hidden), column_words = right_words<Weights>(words);
  for (int64_t column = 0; column < s.hidden_padded; column += kPanel) {
    const int width = panel_width(s.hidden_padded, column);
    multiply_packed<Operand>(act, spans.rows, weights.attn_out + column * column_words, width, words, t.sums,
                             t.sums_row, false, true, t.wide);
    add_branches<Operand>(s, spans, 0, column, width, t);
  }

  for_spans(spans, [&](const RowSpan& span, int64_t row) {
    uint32_t* normed = span.record.normed2;
    for (int64_t r = span.first; r < span.first + span.count; ++r, ++row)
      norm_modulate_row<Operand>(span.state->x + r * s.hidden_padded, s.hidden, s.hidden_padded,
                                 span.vectors.gain2, span.vectors.shift2, t.act + row * hidden_words,
                                 normed ? normed + r * hidden_words : nullptr, span.record.scale2 + r);
  });
  for (int64_t column = 0; column < s.width_padded; column += kPanel) {
    const int width = panel_width(s.width_padded, column);
    multiply_packed<Operand>(act, spans.rows, weights.mlp_in + column * column_words, width, words, t.sums,
                             t.sums_row, false, true, t.wide);
    for_spans(spans,
              [&](const RowSpan& span, int64_t row) { activate<Operand>(s, span, row, column, width, t); });
  }
  constexpr int64_t kSlice = kSliceDepth / Operand::kPerWord;
  const int64_t depth = operand_words<Operand>(s.width), column_depth = right_words<Weights>(depth);
  for (int64_t column = 0; column < s.hidden_padded; column += kPanel) {
    const int width = panel_width(s.hidden_padded, column);
    const uint32_t* panel = weights.mlp_out + column * column_depth;
    for (int64_t k = 0; k < depth; k += kSlice)
      multiply_packed<Operand>(
          {t.activated + k, width_words, 1}, spans.rows, panel + right_words<Weights>(k) * width, width,
          depth - k < kSlice ? depth - k : kSlice, t.sums, t.sums_row, k > 0, true, t.wide);
    add_branches<Operand>(s, spans, 1, column, width, t);
  }
}

void project(const BlockShape& s, bool bf16, const BlockPointers& weights, const RowSpans& spans, int parity,
             void* memory) {
  const TileScope scope;
  BlockScratch t = block_scratch(s, memory);
  bf16 ? project_rows<Bf16>(s, weights, spans, parity, t) : project_rows<Fp32>(s, weights, spans, parity, t);
}

void finish(const BlockShape& s, bool bf16, const BlockPointers& weights, const RowSpans& spans, int parity,
            void* memory) {
  const TileScope scope;
  BlockScratch t = block_scratch(s, memory);
  bf16 ? finish_rows<Bf16>(s, weights, spans, parity, t) : finish_rows<Fp32>(s, weights, spans, parity, t);
}

void row_change(const float* x, const float* old, int64_t hidden_padded, float* change, float* size) {
  Floats difference = {}, square = {};
  for (int64_t i = 0; i < hidden_padded; i += kLanes) {
    const Floats now = load(x + i), d = now - load(old + i);
    difference = fused_multiply_add(d, d, difference);
    square = fused_multiply_add(now, now, square);
  }
  *change = sum_lanes(difference);
  *size = sum_lanes(square);
}

constexpr LoopedBlocksKernel table = {block_scratch_bytes, clear_block_scratch, project, finish, row_change};
