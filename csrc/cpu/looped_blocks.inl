// The two halves of a block application, on some rows of a sequence.

struct BlockScratch {
  uint32_t* act;     // [kBlockRows, hidden words]: operand of the next product
  uint32_t* hidden;  // [kBlockRows, width words]: inside the MLP
  float* sums;       // [kBlockRows, sums_row]: a panel or a group of heads
  float* row;        // one head, padded
  AttentionScratch* attention;
  int64_t sums_row;
};

inline int64_t sums_columns(const BlockShape& s) {
  const int64_t heads = kPanel / s.head_width;
  const int64_t group = (heads > 1 ? heads : 1) * s.head_width;
  return group > kPanel ? group : kPanel;
}

struct ScratchPlan {
  int64_t act, hidden, sums, row, attention, total;  // byte offsets
};

inline ScratchPlan scratch_plan(const BlockShape& s) {
  ScratchPlan p;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t start = at;
    at += round_up(bytes, 64);
    return start;
  };
  p.act = take(4 * kBlockRows * s.hidden_words());
  p.hidden = take(4 * kBlockRows * s.width_words());
  p.sums = take(4 * (kBlockRows * sums_columns(s) + 2 * kLanes));
  p.row = take(4 * round_up(s.head_width, 2 * kLanes));
  p.attention = take(sizeof(AttentionScratch));
  p.total = at;
  return p;
}

int64_t block_scratch_bytes(const BlockShape& s) { return scratch_plan(s).total; }

void clear_block_scratch(const BlockShape& s, void* memory) {
  __builtin_memset(memory, 0, static_cast<size_t>(scratch_plan(s).total));
}

inline BlockScratch block_scratch(const BlockShape& s, void* memory) {
  const ScratchPlan p = scratch_plan(s);
  char* base = static_cast<char*>(memory);
  return {reinterpret_cast<uint32_t*>(base + p.act),
          reinterpret_cast<uint32_t*>(base + p.hidden),
          reinterpret_cast<float*>(base + p.sums),
          reinterpret_cast<float*>(base + p.row),
          reinterpret_cast<AttentionScratch*>(base + p.attention),
          sums_columns(s)};
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

template <class Operand>
void project_rows(const BlockShape& s, const BlockPointers& weights, const BlockVectors& v,
                  const SequenceState& seq, const BlockTape& tape, int parity, int64_t first, int64_t count,
                  BlockScratch& t) {
  constexpr int kPer = Operand::kPerWord;
  const bool record = tape.normed1 != nullptr;
  for (int64_t r = 0; r < count; ++r)
    norm_modulate_row<Operand>(seq.x + (first + r) * s.hidden_padded, s.hidden, s.hidden_padded, v.gain1,
                               v.shift1, t.act + r * s.hidden_words(),
                               record ? tape.normed1 + (first + r) * s.hidden_words() : nullptr,
                               tape.scale1 + first + r);
  const Left act = {t.act, s.hidden_words(), 1};
  const int64_t words = (s.hidden + kPer - 1) / kPer, head_words = s.head_words(), half = s.head_dim / 2;
  const int64_t fit = kPanel / s.head_width, group_heads = fit > 1 ? fit : 1;
  const int64_t part_size = s.heads * s.head_width * words;
  for (int part = 0; part < 3; ++part) {
    for (int64_t head = 0; head < s.heads; head += group_heads) {
      const int64_t heads = s.heads - head < group_heads ? s.heads - head : group_heads;
      const int64_t columns = heads * s.head_width;
      const uint32_t* packed = weights.query_key_value + part * part_size + head * s.head_width * words;
      for (int64_t column = 0; column < columns; column += kPanel)
        multiply<Operand>(act, count, packed + column * words, panel_width(columns, column), words,
                          t.sums + column, t.sums_row, false, true);
      for (int64_t h = 0; h < heads; ++h) {
        const float* sums = t.sums + h * s.head_width;
        if (part == 2) {
          for (int64_t r = 0; record && r < count; ++r)
            store_row<Operand>(sums + r * t.sums_row, s.head_dim,
                               tape.value + (first + r) * s.hidden_words() + (head + h) * head_words);
          uint32_t* values = seq.values[parity] + (head + h) * s.head_width * (s.keys / kPer);
          for (int64_t column = 0; column < s.head_width; column += kPanel) {
            const int width = panel_width(s.head_width, column);
            uint32_t* panel = values + column * (s.keys / kPer);
            for (int64_t r = 0; r < count; r += kPer)
              for (int j = 0; j < width; j += kLanes) {
                const float* even = sums + r * t.sums_row + column + j;
                const Floats odd = r + 1 < count ? load(even + t.sums_row) : Floats{};
                store_words(panel + (first + r) / kPer * width + j, Operand::zip(load(even), odd));
              }
          }
          continue;
        }
        for (int64_t r = 0; r < count; ++r) {
          const int64_t position = first + r;
          const float* source = sums + r * t.sums_row;
          if (seq.cos)
            rotate(source, seq.cos + position * half, seq.sin + position * half, half, t.row);
          else
            __builtin_memcpy(t.row, source, static_cast<size_t>(s.head_dim) * sizeof(float));
          uint32_t packed_row[2 * kLanes];
          uint32_t* query = seq.queries + position * s.hidden_words() + (head + h) * head_words;
          uint32_t* key = seq.keys[parity] + ((head + h) * s.keys + position / kPanel * kPanel) * head_words +
                          position % kPanel;
          for (int64_t i = 0; i < s.head_dim; i += 2 * kLanes) {
            Operand::store(packed_row, load(t.row + i), load(t.row + i + kLanes));
            const int64_t at = i / kPer;
            const int64_t filled = head_words - at < 2 * kLanes / kPer ? head_words - at : 2 * kLanes / kPer;
            for (int64_t k = 0; k < filled; ++k)
              if (part == 0)
                query[at + k] = packed_row[k];
              else
                key[(at + k) * kPanel] = packed_row[k];
            if (record)
              __builtin_memcpy((part == 0 ? tape.query : tape.key) + position * s.hidden_words() +
                                   (head + h) * head_words + at,
                               packed_row, static_cast<size_t>(filled) * sizeof *packed_row);
          }
        }
      }
    }
  }
}

// x += gate * dropout(sums + bias), a panel of columns of some rows.
template <class Operand>
inline void add_branch(const BlockShape& s, const float* bias, const float* gate, const Dropout& dropout,
                       uint32_t branch, int64_t first_element, int64_t rows, int64_t column, int width,
                       const float* sums, int64_t sums_row, float* x, uint32_t* record) {
  alignas(64) uint32_t words[kPanel];
  for (int64_t r = 0; r < rows; ++r) {
    if (dropout.threshold)
      dropout_words(dropout, branch, first_element + r * s.hidden + column, width, words);
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
void finish_rows(const BlockShape& s, const BlockPointers& weights, const BlockVectors& v,
                 const SequenceState& seq, const BlockTape& tape, int parity, const Dropout& dropout,
                 int64_t first, int64_t count, BlockScratch& t) {
  constexpr int kPer = Operand::kPerWord;
  constexpr bool kCoarse = kPer == 2;
  const int64_t hidden_words = s.hidden_words(), width_words = s.width_words(), head_words = s.head_words();
  const int64_t first_element = seq.first_element + first * s.hidden;
  float* x = seq.x + first * s.hidden_padded;
  const bool record = tape.normed1 != nullptr;
  const auto recorded = [&](uint32_t* rows, int64_t row_words) {
    return record ? rows + first * row_words : nullptr;
  };

  const HeadShape head_shape = {s.length, s.keys, s.head_dim, s.head_width};
  for (int64_t head = 0; head < s.heads; ++head) {
    attend<Operand>(head_shape, seq.queries + first * hidden_words + head * head_words, hidden_words, count,
                    seq.keys[parity] + head * s.keys * head_words,
                    seq.values[parity] + head * s.head_width * (s.keys / kPer), seq.key_bias, *t.attention,
                    t.sums, record ? tape.log_sum_exp + head * s.length + first : nullptr);
    for (int64_t r = 0; r < count; ++r)
      store_row<Operand>(t.sums + r * s.head_width, s.head_dim, t.act + r * hidden_words + head * head_words);
  }
  if (record)
    __builtin_memcpy(tape.mixed + first * hidden_words, t.act,
                     static_cast<size_t>(count * hidden_words) * sizeof *t.act);
  const Left act = {t.act, hidden_words, 1};
  const int64_t words = (s.hidden + kPer - 1) / kPer;
  for (int64_t column = 0; column < s.hidden_padded; column += kPanel) {
    const int width = panel_width(s.hidden_padded, column);
    multiply<Operand>(act, count, weights.attn_out + column * words, width, words, t.sums, t.sums_row, false,
                      true);
    add_branch<Operand>(s, nullptr, v.gate1, dropout, 0, first_element, count, column, width, t.sums,
                        t.sums_row, x, recorded(tape.branch1, hidden_words));
  }

  for (int64_t r = 0; r < count; ++r)
    norm_modulate_row<Operand>(
        x + r * s.hidden_padded, s.hidden, s.hidden_padded, v.gain2, v.shift2, t.act + r * hidden_words,
        record ? tape.normed2 + (first + r) * hidden_words : nullptr, tape.scale2 + first + r);
  for (int64_t column = 0; column < s.width_padded; column += kPanel) {
    const int width = panel_width(s.width_padded, column);
    multiply<Operand>(act, count, weights.mlp_in + column * words, width, words, t.sums, t.sums_row, false,
                      true);
    for (int64_t r = 0; r < count; ++r)
      for (int j = 0; j < width; j += 2 * kLanes) {
        Floats u[2];
        for (int half = 0; half < 2; ++half) {
          const int at = j + half * kLanes;
          u[half] = load(t.sums + r * t.sums_row + at) + load(v.mlp_in_bias + column + at);
        }
        if (record) Operand::store(tape.inner + (first + r) * width_words + (column + j) / kPer, u[0], u[1]);
        for (int half = 0; half < 2; ++half) u[half] = gelu(u[half], kCoarse);
        Operand::store(t.hidden + r * width_words + (column + j) / kPer, u[0], u[1]);
      }
  }
  // A slice of a panel and the rows' slice of the hidden layer stay in the second-level cache together.
  constexpr int64_t kSlice = 768 / kPer;
  const int64_t depth = (s.width + kPer - 1) / kPer;
  for (int64_t column = 0; column < s.hidden_padded; column += kPanel) {
    const int width = panel_width(s.hidden_padded, column);
    const uint32_t* panel = weights.mlp_out + column * depth;
    for (int64_t k = 0; k < depth; k += kSlice)
      multiply<Operand>({t.hidden + k, width_words, 1}, count, panel + k * width, width,
                        depth - k < kSlice ? depth - k : kSlice, t.sums, t.sums_row, k > 0, true);
    add_branch<Operand>(s, v.mlp_out_bias, v.gate2, dropout, 1, first_element, count, column, width, t.sums,
                        t.sums_row, x, recorded(tape.branch2, hidden_words));
  }
}

void project(const BlockShape& s, bool narrow, const BlockPointers& weights, const BlockVectors& v,
             const SequenceState& seq, const BlockTape& tape, int parity, int64_t first, int64_t count,
             void* memory) {
  const TileScope scope;
  BlockScratch t = block_scratch(s, memory);
  narrow ? project_rows<Narrow>(s, weights, v, seq, tape, parity, first, count, t)
         : project_rows<Wide>(s, weights, v, seq, tape, parity, first, count, t);
}

void finish(const BlockShape& s, bool narrow, const BlockPointers& weights, const BlockVectors& v,
            const SequenceState& seq, const BlockTape& tape, int parity, const Dropout& dropout,
            int64_t first, int64_t count, void* memory) {
  const TileScope scope;
  BlockScratch t = block_scratch(s, memory);
  narrow ? finish_rows<Narrow>(s, weights, v, seq, tape, parity, dropout, first, count, t)
         : finish_rows<Wide>(s, weights, v, seq, tape, parity, dropout, first, count, t);
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
