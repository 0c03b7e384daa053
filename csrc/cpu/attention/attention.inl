// Attention of one head where it lies in memory: conversion to float, rotary angles, packing.
#pragma once

#include "cpu/attention/attend_backward.inl"

constexpr int kPackedRows = 256;  // keys of a task
constexpr int kAttendRows = 96;   // queries of a task
static_assert(kPackedRows % kPanel == 0 && kAttendRows % kRowsAtOnce == 0);

inline HeadShape head_shape(const AttentionProblem& p) {
  const int64_t unit = kLanes * (p.is_bf16 ? Bf16::kPerWord : Fp32::kPerWord);
  return {p.length, (p.length + unit - 1) / unit * unit, p.head_dim,
          (p.head_dim + kLanes - 1) / kLanes * kLanes};
}

// Sizes for one operand a word, which is the larger case.
struct PackedHead {
  uint32_t *keys, *values;
  float* bias;  // [keys]
  int64_t bytes;
};

inline PackedHead packed_head(const HeadShape& s, void* memory) {
  Layout layout(memory);
  PackedHead t;
  t.keys = layout.take<uint32_t>(s.keys * s.head_dim);
  t.values = layout.take<uint32_t>(s.keys * s.head_width);
  t.bias = layout.take<float>(s.keys);
  t.bytes = layout.bytes();
  return t;
}

int64_t packed_head_bytes(const AttentionProblem& p) { return packed_head(head_shape(p), nullptr).bytes; }

struct HeadScratch {
  AttentionScratch* attention;
  uint32_t* queries;  // [kAttendRows, head words]
  float* rows;        // [kPackedRows, head width]: rotated rows, or results
  uint32_t* columns;  // [2][head words][kLanes] of single tokens: queries and keys, heads across
  int64_t bytes;
};

inline HeadScratch head_scratch(const HeadShape& s, void* memory) {
  const auto rows_of = [&s](int64_t most) { return s.keys < most ? s.keys : most; };
  Layout layout(memory);
  HeadScratch t;
  t.attention = layout.take<AttentionScratch>(1);
  t.queries = layout.take<uint32_t>(rows_of(kAttendRows) * s.head_dim);
  t.rows = layout.take<float>(rows_of(kPackedRows) * s.head_width);
  t.columns = layout.take<uint32_t>(s.length == 1 ? 2 * s.head_dim * kLanes : 0);
  t.bytes = layout.bytes();
  return t;
}

int64_t head_scratch_bytes(const AttentionProblem& p) { return head_scratch(head_shape(p), nullptr).bytes; }

template <class Element>
struct Rows {
  Element* at;
  int64_t stride;
};

template <class Element>
inline Rows<Element> rows_of(const AttentionProblem& p, const HeadsView& view, int64_t head) {
  const int64_t batch = head / p.heads, in_batch = head % p.heads;
  return {static_cast<Element*>(view.data) + batch * view.batch_stride + in_batch * view.head_stride,
          view.row_stride};
}

inline void store_value(float x, float* out) { *out = x; }
inline void store_value(float x, uint16_t* out) {
  uint16_t rounded[kLanes];
  store_bf16(rounded, broadcast(x));
  *out = rounded[0];
}
inline void store_lanes(float* out, Floats x) { store(out, x); }
inline void store_lanes(uint16_t* out, Floats x) { store_bf16(out, x); }

template <class Element>
inline void write_row(const float* x, int64_t count, Element* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_lanes(out + i, load(x + i));
  for (; i < count; ++i) store_value(x[i], out + i);
}

template <class Element>
inline void read_row(const Element* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  for (; i < count; ++i) out[i] = value_of(x + i);
}

// Rows [first, first + count) as floats, rotated where there are angles.
template <class Element>
void read_rows(const AttentionProblem& p, Rows<Element> x, int64_t first, int64_t count, bool rotated,
               float* out, int64_t out_stride) {
  const int64_t half = p.head_dim / 2;
  for (int64_t r = first; r < first + count; ++r, out += out_stride)
    if (rotated && p.cos)
      rotate_row(x.at + r * x.stride, p.cos + r * half, p.sin + r * half, 1.0f, half, out);
    else
      read_row(x.at + r * x.stride, p.head_dim, out);
}

inline bool has_bias(const AttentionProblem& p, const HeadShape& s) {
  return p.key_mask != nullptr || s.keys != s.length;
}

inline void fill_bias(const AttentionProblem& p, int64_t head, int64_t first, int64_t count, float* bias) {
  const bool* mask = p.key_mask ? p.key_mask + head / p.heads * p.length : nullptr;
  int64_t key = first;
  for (; key < p.length && key < first + count; ++key) bias[key] = !mask || mask[key] ? 0.0f : kMaskedScore;
  for (; key < first + count; ++key) bias[key] = kMaskedScore;
}

template <class Operand, class Element>
void pack_head_of(const AttentionProblem& p, int64_t head, int64_t first, void* memory, void* scratch) {
  constexpr int kPer = Operand::kPerWord;
  const HeadShape s = head_shape(p);
  const PackedHead packed = packed_head(s, memory);
  const int64_t count = s.keys - first < kPackedRows ? s.keys - first : kPackedRows;
  const int64_t real = s.length - first < count ? s.length - first : count;
  const Rows<const Element> k = rows_of<const Element>(p, p.k, head),
                            v = rows_of<const Element>(p, p.v, head);
  const int64_t head_words = (s.head_dim + kPer - 1) / kPer;
  if (p.cos) {
    float* const rows = head_scratch(s, scratch).rows;
    read_rows(p, k, first, real, true, rows, s.head_dim);
    // The block is a shape of its own, with panels from its first key on.
    pack_key_panels<Operand>({real, count, s.head_dim, s.head_width}, rows, s.head_dim, 0, count,
                             packed.keys + first * head_words);
  } else {
    pack_key_panels<Operand>(s, k.at, k.stride, first, count, packed.keys);
  }
  pack_row_pairs<Operand>(v.at + first * v.stride, v.stride, real, s.head_dim, s.head_width, s.keys / kPer,
                          first / kPer, (real + kPer - 1) / kPer, packed.values);
  if (has_bias(p, s)) fill_bias(p, head, first, count, packed.bias);
}

template <class Operand, class Element>
void attend_head_of(const AttentionProblem& p, const AttentionOutput& out, int64_t head, int64_t first,
                    const void* memory, void* scratch) {
  constexpr int kPer = Operand::kPerWord;
  const HeadShape s = head_shape(p);
  const PackedHead packed = packed_head(s, const_cast<void*>(memory));
  const HeadScratch t = head_scratch(s, scratch);
  const int64_t head_words = (s.head_dim + kPer - 1) / kPer;
  const int64_t count = s.length - first < kAttendRows ? s.length - first : kAttendRows;
  const Rows<const Element> q = rows_of<const Element>(p, p.q, head);
  const Rows<Element> to = rows_of<Element>(p, out.out, head);
  const uint32_t* queries = t.queries;
  int64_t query_row = head_words, out_row = s.head_width;
  float* sums = t.rows;
  if constexpr (sizeof(Element) ==
                sizeof(float)) {  // an operand as it is, and so are whole vectors of results
    if (p.cos) {
      read_rows(p, q, first, count, true, reinterpret_cast<float*>(t.queries), s.head_dim);
    } else {
      queries = reinterpret_cast<const uint32_t*>(q.at + first * q.stride);
      query_row = q.stride;
    }
    if (s.head_dim == s.head_width) {
      sums = to.at + first * to.stride;
      out_row = to.stride;
    }
  } else {
    if (p.cos) read_rows(p, q, first, count, true, t.rows, s.head_dim);
    for (int64_t r = 0; r < count; ++r)
      if (p.cos)
        pack_row<Operand>(t.rows + r * s.head_dim, s.head_dim, t.queries + r * head_words);
      else
        pack_row<Operand>(q.at + (first + r) * q.stride, s.head_dim, t.queries + r * head_words);
  }
  attend<Operand>(s, queries, query_row, count, packed.keys, packed.values,
                  has_bias(p, s) ? packed.bias : nullptr, *t.attention, sums, out_row,
                  out.log_sum_exp ? out.log_sum_exp + head * p.length + first : nullptr);
  if (sums != t.rows) return;
  for (int64_t r = 0; r < count; ++r)
    write_row(t.rows + r * s.head_width, s.head_dim, to.at + (first + r) * to.stride);
}

// Heads of single tokens, one in each lane: in attend() each would be a chain of K dependent steps. The same
// sums, exponentials and products, but for exponents that attend() restates.
template <class Operand, class Element>
bool attend_single_of(const AttentionProblem& p, const AttentionOutput& out, int64_t first, int64_t count,
                      void* scratch) {
  constexpr int kPer = Operand::kPerWord;
#if defined(__AMX_BF16__)
  if (kPer == 2) return false;  // its products round elsewhere
#endif
  const HeadShape s = head_shape(p);
  const HeadScratch t = head_scratch(s, scratch);
  const int64_t words = (s.head_dim + kPer - 1) / kPer;
  for (int side = 0; side < 2; ++side) {
    const uint32_t* heads[kLanes];
    for (int64_t h = 0; h < count; ++h) {
      const Rows<const Element> x = rows_of<const Element>(p, side == 0 ? p.q : p.k, first + h);
      uint32_t* const own = t.queries + h * words;
      heads[h] = own;
      if constexpr (sizeof(Element) == sizeof(float)) {
        if (p.cos)
          read_rows(p, x, 0, 1, true, reinterpret_cast<float*>(own), s.head_dim);
        else
          heads[h] = reinterpret_cast<const uint32_t*>(x.at);
      } else if (p.cos) {
        read_rows(p, x, 0, 1, true, t.rows, s.head_dim);
        pack_row<Operand>(t.rows, s.head_dim, own);
      } else {
        pack_row<Operand>(x.at, s.head_dim, own);
      }
    }
    pack_columns_of(static_cast<int>(count), words, kLanes, t.columns + side * words * kLanes,
                    [&](int h, int64_t k) { return load_row_words(heads[h] + k, words - k); });
  }
  const uint32_t *queries = t.columns, *keys = t.columns + words * kLanes;
  Floats score = {};
  for (int64_t k = 0; k < words; ++k)
    score = Operand::multiply_add(load_words(queries + k * kLanes), load_words(keys + k * kLanes), score);
  const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(s.head_dim));
  const Floats shift = score * scale;
  if (lanes_not_at_most(shift < 0.0f ? -shift : shift, broadcast(kLargeExponent)) != 0) return false;
  const Floats prob = probability(fused_multiply_add(score, broadcast(scale), -shift), kPer == 2);
  const Words weights = Operand::zip(prob, Floats{});
  const Floats inverse = 1.0f / prob;
  for (int64_t h = 0; h < count; ++h) {
    const Element* const value = rows_of<const Element>(p, p.v, first + h).at;
    for (int64_t i = 0; i < s.head_dim; i += kLanes) {
      const Words here = Operand::zip(load_some(value + i, s.head_dim - i), Floats{});
      store(t.rows + i, Operand::multiply_add(Words{} + weights[h], here, Floats{}) * inverse[h]);
    }
    write_row(t.rows, s.head_dim, rows_of<Element>(p, out.out, first + h).at);
    if (out.log_sum_exp) out.log_sum_exp[first + h] = shift[h] + __builtin_log2f(prob[h]);
  }
  return true;
}

// The head's tensors as operands, and its gradients.
struct BackwardScratch {
  uint32_t *q, *k, *v, *out;  // [L, head words]
  float *rows, *grad_out;     // [L, K]
  float *grad_q, *grad_k, *grad_v;
  float* bias;
  void* attention;
  int64_t bytes;
};

inline BackwardScratch backward_scratch(const HeadShape& s, void* memory) {
  BackwardScratch t;
  Layout layout(memory);
  for (uint32_t** array : {&t.q, &t.k, &t.v, &t.out}) *array = layout.take<uint32_t>(s.length * s.head_dim);
  for (float** array : {&t.rows, &t.grad_out, &t.grad_q, &t.grad_k, &t.grad_v})
    *array = layout.take<float>(s.length * s.head_dim);
  t.bias = layout.take<float>(s.keys);
  t.attention = layout.take<char>(attention_backward_scratch_bytes(s));
  t.bytes = layout.bytes();
  return t;
}

int64_t backward_head_bytes(const AttentionProblem& p) {
  return backward_scratch(head_shape(p), nullptr).bytes;
}

template <class Operand, class Element>
void backward_head_of(const AttentionProblem& p, const AttentionOutput& forward, const AttentionGradients& g,
                      int64_t head, void* scratch) {
  const HeadShape s = head_shape(p);
  const BackwardScratch t = backward_scratch(s, scratch);
  constexpr int kPer = Operand::kPerWord;
  const int64_t head_words = (s.head_dim + kPer - 1) / kPer;
  // Floats that need no rotation are read and written where they are.
  const auto read = [&](const HeadsView& view, bool rotated, uint32_t* to) -> Rows<const uint32_t> {
    const Rows<const Element> from = rows_of<const Element>(p, view, head);
    if constexpr (sizeof(Element) == sizeof(float))
      if (!rotated || !p.cos) return {reinterpret_cast<const uint32_t*>(from.at), from.stride};
    if constexpr (kPer == 1) {
      read_rows(p, from, 0, s.length, rotated, reinterpret_cast<float*>(to), s.head_dim);
    } else {
      const bool turned = rotated && p.cos;
      if (turned) read_rows(p, from, 0, s.length, true, t.rows, s.head_dim);
      for (int64_t r = 0; r < s.length; ++r)
        if (turned)
          pack_row<Operand>(t.rows + r * s.head_dim, s.head_dim, to + r * head_words);
        else
          pack_row<Operand>(from.at + r * from.stride, s.head_dim, to + r * head_words);
    }
    return {to, head_words};
  };
  const auto read_floats = [&](const HeadsView& view, float* to) -> Rows<const float> {
    const Rows<const Element> from = rows_of<const Element>(p, view, head);
    if constexpr (sizeof(Element) == sizeof(float)) return from;
    read_rows(p, from, 0, s.length, false, to, s.head_dim);
    return {to, s.head_dim};
  };
  const auto place = [&](const HeadsView& view, bool rotated, float* own) -> Rows<float> {
    if constexpr (sizeof(Element) == sizeof(float))
      if (!rotated || !p.cos) return rows_of<float>(p, view, head);
    return {own, s.head_dim};
  };
  const auto q = read(p.q, true, t.q), k = read(p.k, true, t.k), v = read(p.v, false, t.v);
  const auto grad_out = read_floats(g.grad_out, t.grad_out);
  const auto out = in_one_block(s) ? Rows<const uint32_t>{} : read(forward.out, false, t.out);
  const auto grad_q = place(g.grad_q, true, t.grad_q), grad_k = place(g.grad_k, true, t.grad_k),
             grad_v = place(g.grad_v, false, t.grad_v);
  if (has_bias(p, s)) fill_bias(p, head, 0, s.keys, t.bias);
  attend_backward<Operand>(s,
                           {q.at, k.at, v.at, out.at, grad_out.at, q.stride, k.stride, v.stride, out.stride,
                            grad_out.stride, forward.log_sum_exp + head * p.length},
                           has_bias(p, s) ? t.bias : nullptr, t.attention,
                           {grad_q.at, grad_k.at, grad_v.at, grad_q.stride, grad_k.stride, grad_v.stride});
  const auto write = [&](const Rows<float>& grad, bool rotated, const HeadsView& view) {
    const Rows<Element> to = rows_of<Element>(p, view, head);
    if (static_cast<const void*>(to.at) == grad.at) return;
    const int64_t half = s.head_dim / 2;
    for (int64_t r = 0; r < s.length; ++r) {
      const float* turned = grad.at + r * grad.stride;
      if (rotated && p.cos) {
        rotate_row(turned, p.cos + r * half, p.sin + r * half, -1.0f, half, t.rows);
        turned = t.rows;
      }
      write_row(turned, s.head_dim, to.at + r * to.stride);
    }
  };
  write(grad_q, true, g.grad_q);
  write(grad_k, true, g.grad_k);
  write(grad_v, false, g.grad_v);
}

void pack_head(const AttentionProblem& p, int64_t head, int64_t first, void* packed, void* scratch) {
  p.is_bf16 ? pack_head_of<Bf16, uint16_t>(p, head, first, packed, scratch)
            : pack_head_of<Fp32, float>(p, head, first, packed, scratch);
}

bool attend_single(const AttentionProblem& p, const AttentionOutput& out, int64_t first, int64_t count,
                   void* scratch) {
  return p.is_bf16 ? attend_single_of<Bf16, uint16_t>(p, out, first, count, scratch)
                   : attend_single_of<Fp32, float>(p, out, first, count, scratch);
}

void attend_head(const AttentionProblem& p, const AttentionOutput& out, int64_t head, int64_t first,
                 const void* packed, void* scratch) {
  const TileScope scope;
  p.is_bf16 ? attend_head_of<Bf16, uint16_t>(p, out, head, first, packed, scratch)
            : attend_head_of<Fp32, float>(p, out, head, first, packed, scratch);
}

void backward_head(const AttentionProblem& p, const AttentionOutput& forward, const AttentionGradients& g,
                   int64_t head, void* scratch) {
  const TileScope scope;
  p.is_bf16 ? backward_head_of<Bf16, uint16_t>(p, forward, g, head, scratch)
            : backward_head_of<Fp32, float>(p, forward, g, head, scratch);
}

constexpr AttentionKernel table = {kPackedRows,        kAttendRows,         kLanes,    packed_head_bytes,
                                   head_scratch_bytes, backward_head_bytes, pack_head, attend_single,
                                   attend_head,        backward_head};
