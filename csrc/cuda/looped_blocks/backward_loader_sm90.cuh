// The warp that loads for the backward pass; see loader_sm90.cuh. Every load is a box of 64 by 64 bf16. What
// is the inner dimension of a product lies along rows in one and along columns in another: the box is the
// same, only its coordinates are exchanged, and WGMMA is told.
#pragma once

#include "cuda/looped_blocks/kept_sm90.cuh"

namespace loopmdm {

namespace backward {

class Loader {
 public:
  __device__ Loader(const Parameters& parameters, const Ring& ring, const Kept& kept)
      : p_(parameters), ring_(ring), kept_(kept), keep_(keep_policy()) {}

  __device__ __forceinline__ void run() {
    const int32_t loops = *p_.max_loops;
    const TableSize size{0, p_.instructions, 0};
    const int32_t workers = static_cast<int32_t>(gridDim.x) / Config::kBlocks;
    for (int64_t position = blockIdx.x / Config::kBlocks;; position += workers) {
      const Place place = place_of(position, size, loops);
      if (place.index < 0) break;
      Instruction item = p_.table[place.index];
      const int32_t loop = loops - 1 - place.loop;
      if (item.phase < kWeightMlpOut && loop >= p_.stop[item.sequence]) item.phase = kNothing;
      load(item, place.loop, loop);
    }
    Instruction end{};
    end.phase = kEnd;
    ring_.issue(issue_, end, 0);
  }

 private:
  // The operands of a product. Of a weight's gradient the inner dimension are the tokens.
  struct Operands {
    int left, right;  // maps, by their bytes in the parameters: addresses would all be kept in registers
    int inner;
    bool transposed;  // rows of the weight are the inner dimension
  };

  __device__ int offset_of(const TensorMap& map) const {
    return static_cast<int>(reinterpret_cast<const uint8_t*>(&map) - reinterpret_cast<const uint8_t*>(&p_));
  }
  __device__ const TensorMap& map_at(int offset) const {
    return *reinterpret_cast<const TensorMap*>(reinterpret_cast<const uint8_t*>(&p_) + offset);
  }

  __device__ Operands operands_of(int32_t phase) const {
    constexpr int kHidden = Config::kHidden, kMlp = Config::kMlp;
    switch (phase) {
      case kQkv:
        return {offset_of(p_.rows1), offset_of(p_.qkv_weight), kHidden, false};
      case kAttnOut:
        return {offset_of(p_.mixed), offset_of(p_.attn_out_weight), kHidden, false};
      case kMlpIn:
        return {offset_of(p_.rows2), offset_of(p_.mlp_in_weight), kHidden, false};
      case kMlpOut:
        return {offset_of(p_.gelu), offset_of(p_.mlp_out_weight), kMlp, false};
      case kGradMlpIn:
        return {offset_of(p_.grad_branch2), offset_of(p_.mlp_out_weight), kHidden, true};
      case kGradNorm2:
        return {offset_of(p_.grad_mlp_in), offset_of(p_.mlp_in_weight), kMlp, true};
      case kGradMixed:
        return {offset_of(p_.grad_branch1), offset_of(p_.attn_out_weight), kHidden, true};
      case kGradNorm1:
        return {offset_of(p_.grad_qkv), offset_of(p_.qkv_weight), 3 * kHidden, true};
      case kWeightMlpOut:
        return {offset_of(p_.grad_branch2), offset_of(p_.gelu), 0, false};
      case kWeightMlpIn:
        return {offset_of(p_.grad_mlp_in), offset_of(p_.rows2), 0, false};
      case kWeightAttnOut:
        return {offset_of(p_.grad_branch1), offset_of(p_.mixed), 0, false};
      case kWeightQkv:
        return {offset_of(p_.grad_qkv), offset_of(p_.rows1), 0, false};
      default:
        return {-1, -1, 0, false};
    }
  }

  // One function for all products, its loops not unrolled: code that is read once a layer is larger than an
  // instruction cache anyway.
  __device__ void load(const Instruction& item, int32_t step, int32_t loop) {
    const Operands operands = operands_of(item.phase);
    if (operands.inner > 0) return product(item, step, loop, operands);
    if (operands.left >= 0) return weight_gradient(item, step, loop, operands);
    if (item.phase == kAttention) return attention(item, step, loop);
    if (item.phase == kGradQueries || item.phase == kGradKeys) return attention_gradient(item, step, loop);
    wait_and_issue(item, step, loop);
  }

  __device__ void wait_and_issue(const Instruction& item, int32_t step, int32_t loop) {
    const int32_t target = generation(Config::kBlocks * item.wait_count, step);
    for (int i = threadIdx.x % 32; i < item.wait_number; i += 32)
      wait_for(p_.counters + item.wait + i, target);
    __syncwarp();
    proxy_fence();
    ring_.issue(issue_, item, loop);
  }

  // Makes the stage at `place` ready for this many boxes; true for the lane that is to load them.
  __device__ bool open(RingPlace place, int boxes) const {
    ring_.wait_empty(place);
    if (!elected()) return false;
    barrier_arrive_expect(ring_.full(place), boxes * kPanelBytes);
    return true;
  }

  // To a place in a stage, in panels.
  __device__ void box(RingPlace place, int panel, const TensorMap& map, int column, int row,
                      int matrix) const {
    load_box(ring_.stage(place) + panel * kPanelBytes, &map, ring_.full(place), column, row, matrix);
  }

  // For both blocks of a pair: each loads every second one.
  template <class... Policy>
  __device__ void box_for_both(RingPlace place, int panel, const TensorMap& map, int column, int row,
                               int matrix, Policy... policy) const {
    const uint32_t target = ring_.stage(place) + panel * kPanelBytes;
    if constexpr (Config::kBlocks > 1) {
      if (panel % 2 != rank_in_tile()) return;
      load_box_for_all(target, &map, ring_.full(place), column, row, matrix, 0b11, policy...);
    } else {
      load_box(target, &map, ring_.full(place), column, row, matrix, policy...);
    }
  }

  // Rows times a weight, or its transpose. The weights of the first stages do not wait for the counters.
  __device__ void product(const Instruction& item, int32_t step, int32_t loop, const Operands& operands) {
    const int steps = operands.inner / Config::kStep,
              first_steps = steps < Config::kStages ? steps : Config::kStages;
    RingPlace ahead = place_;
#pragma unroll 1
    for (int i = 0; i < first_steps; ++i, Ring::next(ahead)) weights(ahead, operands, item, i);
    wait_and_issue(item, step, loop);
    const int matrix = p_.place(item.layer, item.sequence);
#pragma unroll 1
    for (int i = 0; i < steps; ++i, Ring::next(place_)) {
      if (i >= first_steps) weights(place_, operands, item, i);
      if (!elected()) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        box(place_, half, map_at(operands.left), 64 * i, first_row(item) + 64 * half, matrix);
      }
    }
  }

  __device__ void weights(RingPlace place, const Operands& operands, const Instruction& item,
                          int step) const {
    if (!open(place, 2 + kColumns / 64)) return;
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; ++panel) {
      const int outer = item.column * kColumns + 64 * panel, inner = 64 * step;
      box_for_both(place, 2 + panel, map_at(operands.right), operands.transposed ? outer : inner,
                   operands.transposed ? inner : outer, item.layer, keep_);
    }
  }

  // Both operands lie with the tokens, which are the inner dimension, in rows.
  __device__ void weight_gradient(const Instruction& item, int32_t step, int32_t loop,
                                  const Operands& operands) {
    wait_and_issue(item, step, loop);
#pragma unroll 1
    for (int sequence = 0; sequence < p_.batch; ++sequence) {
      if (p_.stop[sequence] <= loop) continue;
      const int matrix = p_.place(item.layer, sequence);
#pragma unroll 1
      for (int row = 0; row < p_.length; row += 64, Ring::next(place_)) {
        if (!open(place_, 2 + kColumns / 64)) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          box(place_, half, map_at(operands.left), first_row(item) + 64 * half, row, matrix);
        }
#pragma unroll
        for (int panel = 0; panel < kColumns / 64; ++panel) {
          box_for_both(place_, 2 + panel, map_at(operands.right), item.column * kColumns + 64 * panel, row,
                       matrix);
        }
      }
    }
  }

  // As in the forward kernel: the queries, then keys and values of one block after another. Panel by panel,
  // each of two boxes.
  __device__ void attention(const Instruction& item, int32_t step, int32_t loop) {
    constexpr int kBoxes = 2 * kHeadPanels;
    wait_and_issue(item, step, loop);
    const int matrix = p_.place(item.layer, item.sequence);
    if (open(place_, kBoxes)) {
#pragma unroll
      for (int i = 0; i < kBoxes; ++i) {
        box(place_, i, p_.qkv, head_column(item, 0) + i / 2 * 64, first_row(item) + i % 2 * 64, matrix);
      }
    }
    Ring::next(place_);
#pragma unroll 1
    for (int key = 0; key < p_.length; key += Config::kKeyBlock) {
#pragma unroll 1
      for (int part = 1; part <= 2; ++part, Ring::next(place_)) {
        if (!open(place_, kBoxes)) continue;
#pragma unroll
        for (int i = 0; i < kBoxes; ++i) {
          box_for_both(place_, i, p_.qkv, head_column(item, part) + i / 2 * 64, key + i % 2 * 64, matrix);
        }
      }
    }
  }

  __device__ static int head_column(const Instruction& item, int part) {
    return part * Config::kHidden + item.column * Config::kHeadDim;
  }

  // q and the gradient of the output, or k and v (1): `own` says which lie in the tile's own rows, 128 a
  // block, and are kept. Of the others come 64 rows in each stage.
  __device__ void attention_gradient(const Instruction& item, int32_t step, int32_t loop) {
    const int own = item.phase == kGradKeys;
    wait_and_issue(item, step, loop);
    const int matrix = p_.place(item.layer, item.sequence);
    const auto source = [&](int of_keys, int operand) -> const TensorMap& {
      return !of_keys && operand == 1 ? p_.grad_mixed : p_.qkv;
    };
    const auto column = [&](int of_keys, int operand) {
      return of_keys ? head_column(item, 1 + operand) : head_column(item, 0);
    };
    Ring::wait_together(kept_.empty(), kept_place_.round ^ 1);
    if (elected()) {
      barrier_arrive_expect(kept_.full(), 2 * Kept::kOperandBytes);
#pragma unroll
      for (int operand = 0; operand < 2; ++operand) {
#pragma unroll
        for (int panel = 0; panel < kHeadPanels; ++panel) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            load_box(kept_.panel(operand, panel, half), &source(own, operand), kept_.full(),
                     column(own, operand) + 64 * panel, first_row(item) + 64 * half, matrix);
          }
        }
      }
    }
    advance(kept_place_, 1);
#pragma unroll 1
    for (int row = 0; row < p_.length; row += 64, Ring::next(place_)) {
      if (!open(place_, 2 * kHeadPanels)) continue;
#pragma unroll
      for (int i = 0; i < 2 * kHeadPanels; ++i) {
        const int operand = i / kHeadPanels;
        box_for_both(place_, i, source(1 - own, operand), column(1 - own, operand) + i % kHeadPanels * 64,
                     row, matrix);
      }
    }
  }

  const Parameters& p_;
  const Ring& ring_;
  const Kept& kept_;
  const uint64_t keep_;
  RingPlace place_{0, 0}, issue_{0, 0}, kept_place_{0, 0};
};

}  // namespace backward

}  // namespace loopmdm
