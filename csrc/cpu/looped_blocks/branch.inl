// Dropout masks and the rows of several sequences, for both directions of a block.
#pragma once

#include "cpu/machine/layout.h"
#include "cpu/vector/philox.inl"

// Of a long summed dimension: a slice of a panel and the rows' slice of what they meet stay in the
// second-level cache together.
constexpr int64_t kSliceDepth = 768;

// The deepest panel of weights that a product takes at once.
inline int64_t deepest_panel(const BlockShape& s) { return s.hidden > kSliceDepth ? s.hidden : kSliceDepth; }

// job(span, first of its rows among all)
template <class Spans, class Job>
inline void for_spans(const Spans& spans, Job&& job) {
  int64_t row = 0;
  for (int64_t i = 0; i < spans.size; row += spans.at[i++].count) job(spans.at[i], row);
}

// 32-bit words of the dropout mask for elements [first, first + count) of a branch.
void dropout_words(const Dropout& d, uint32_t branch, int64_t first, int64_t count, uint32_t* out) {
  const PhiloxKey key = philox_key(d.seed);
  constexpr int kBatch = 2 * kLanes;
  alignas(64) uint32_t words[kBatch];
  for (int64_t at = first / kBatch * kBatch; at < first + count; at += kBatch) {
    philox_groups(key, static_cast<uint32_t>(at / 4),
                  static_cast<uint32_t>(static_cast<uint64_t>(at) / 4 >> 32), kDropoutStream | d.application,
                  branch, words);
    for (int i = 0; i < kBatch; ++i)
      if (at + i >= first && at + i < first + count) out[at + i - first] = words[i];
  }
}
