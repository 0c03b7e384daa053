// What follows from the arguments of looped_blocks and is computed once a call.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/row_math.h"
#include "cpu/looped_blocks/looped_blocks.h"
#include "cpu/machine/buffer.h"

namespace loopmdm::cpu {

constexpr int kVectorsPerBlock = 6;  // shift, gain, gate of attention, then of the MLP

// Modulation and biases of every block, padded and folded with the norms.
class FoldedVectors {
 public:
  FoldedVectors(const LoopedBlocksProblem& p, const BlockShape& s)
      : modulation_rows_(p.modulation_rows),
        hidden_(s.hidden_padded),
        width_(s.width_padded),
        modulation_(zeroed<float>(p.stored_blocks() * p.modulation_rows * kVectorsPerBlock * hidden_)),
        biases_(zeroed<float>(p.stored_blocks() * (hidden_ + width_))) {
    for (int64_t block = 0; block < p.stored_blocks(); ++block) {
      const BlockPointers& weights = p.blocks[block];
      float* bias = biases_.get() + block * (hidden_ + width_);
      std::copy_n(weights.mlp_in_bias, p.width, bias);
      std::copy_n(weights.mlp_out_bias, p.hidden, bias + width_);
      for (int64_t row = 0; row < p.modulation_rows; ++row) {
        const int64_t index = block * p.modulation_rows + row;
        const float* from = p.modulation + index * kVectorsPerBlock * p.hidden;
        float* to = modulation_.get() + index * kVectorsPerBlock * hidden_;
        for (int vector = 0; vector < kVectorsPerBlock; ++vector) {
          const float* norm = vector == 1 ? weights.norm1 : vector == 4 ? weights.norm2 : nullptr;
          for (int64_t i = 0; i < p.hidden; ++i) {
            const float value = from[vector * p.hidden + i];
            to[vector * hidden_ + i] = norm ? norm[i] * (1.0f + value) : value;
          }
        }
      }
    }
  }

  BlockVectors of(int64_t block, int64_t sequence) const {
    const int64_t row = modulation_rows_ == 1 ? 0 : sequence;
    const float* m = modulation_.get() + (block * modulation_rows_ + row) * kVectorsPerBlock * hidden_;
    const float* bias = biases_.get() + block * (hidden_ + width_);
    return {m,    m + hidden_,  m + 2 * hidden_, m + 3 * hidden_, m + 4 * hidden_, m + 5 * hidden_,
            bias, bias + width_};
  }

 private:
  int64_t modulation_rows_, hidden_, width_;
  AlignedBuffer<float> modulation_, biases_;
};

inline bool needs_key_bias(const LoopedBlocksProblem& p, const BlockShape& s) {
  return p.key_mask != nullptr || s.keys != p.length;
}

// bias [padded L]: 0 for the keys of a sequence that count, very negative for the others.
inline void fill_key_bias(const LoopedBlocksProblem& p, const BlockShape& s, int64_t sequence, float* bias) {
  for (int64_t key = 0; key < s.keys; ++key) {
    const bool counts = key < p.length && (!p.key_mask || p.key_mask[sequence * p.length + key]);
    bias[key] = counts ? 0.0f : kMaskedScore;
  }
}

inline Dropout dropout_of(const LoopedBlocksProblem& p, int64_t application) {
  const double threshold = std::nearbyint(static_cast<double>(p.dropout) * 4294967296.0);
  return {static_cast<uint32_t>(std::min(threshold, 4294967295.0)), static_cast<float>(1 / (1 - p.dropout)),
          p.dropout_seed, static_cast<uint32_t>(p.first_loop * p.num_blocks + application)};
}

}  // namespace loopmdm::cpu
