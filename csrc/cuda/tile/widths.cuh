// The widths of the looped blocks, and where their vectors are.
#pragma once

#include "common/row_statistics.h"
#include "common/schedule.h"

namespace loopmdm {

struct Widths {
  static constexpr int kHidden = LOOPMDM_HIDDEN, kHeads = LOOPMDM_HEADS, kMlp = LOOPMDM_MLP;
  static constexpr int kLayers = LOOPMDM_LAYERS, kHeadDim = kHidden / kHeads;
  static constexpr int kMlpOutParts = LOOPMDM_MLP_OUT_PARTS;  // of the inner dimension, added in their order

  // Statistics are of so many columns whatever the tiles, so that a row does not depend on its batch.
  static constexpr int kPart = 32, kParts = kHidden / kPart;
};

// The vectors of attention (0) or MLP (1) of a layer and sequence, of either pass.
template <class Launch>
__device__ int modulation(const Launch& p, int layer, int sequence, int branch) {
  return (layer * p.modulated_sequences + (p.modulated_sequences > 1 ? sequence : 0)) * 2 + branch;
}
template <class Launch>
__device__ const float4* affine_of(const Launch& p, const Instruction& item, int branch) {
  return p.affine + modulation(p, item.layer, item.sequence, branch) * (Widths::kHidden / 2);
}
template <class Launch>
__device__ const float* gate_of(const Launch& p, int layer, int sequence, int branch) {
  return p.gate + modulation(p, layer, sequence, branch) * Widths::kHidden;
}

}  // namespace loopmdm
