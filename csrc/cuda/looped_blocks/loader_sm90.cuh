// The warp that reads the table, waits for counters and fills the ring. It runs ahead of the arithmetic:
// while the block computes a tile, or the grid is not done with a phase, the weights of the next tile are on
// their way.
#pragma once

#include "cuda/looped_blocks/progress.cuh"
#include "cuda/tile/ring_sm90.cuh"

namespace loopmdm {

// Of a product's tile; of all else 0.
__device__ inline int columns_of(int32_t phase) {
  return phase == kQkv       ? Config::kQkvColumns
         : phase == kAttnOut ? Config::kAttnOutColumns
         : phase == kMlpIn   ? Config::kMlpInColumns
         : phase == kMlpOut  ? Config::kMlpOutColumns
                             : 0;
}
__device__ inline int steps_of(int32_t phase) {
  return (phase == kMlpOut ? Config::kMlpOutInner : Config::kHidden) / Config::kStep;
}

class Loader {
 public:
  __device__ Loader(const KernelParameters& parameters, const Ring& ring)
      : p_(parameters), ring_(ring), keep_(keep_policy()) {}

  __device__ void run() {
    const int32_t loops = *p_.max_loops;
    const int32_t workers = static_cast<int32_t>(gridDim.x) / Config::kBlocks;
    for (int64_t position = blockIdx.x / Config::kBlocks;;) {
      const Place place = place_of(position, p_.size, loops);
      if (place.index < 0) break;
      position += workers;
      const Instruction item = p_.table[place.index];
      int32_t loop = place.loop;
      if (!takes_part(p_, item, loop)) {
        if (all_stopped(p_, loop)) position = first_leaving(position, p_.size, loops, workers);
        continue;
      }
      load(item, loop);
    }
    Instruction end{};
    end.phase = kEnd;
    ring_.issue(issue_, end, 0);
  }

 private:
  __device__ void load(const Instruction& item, int32_t loop) {
    if (columns_of(item.phase) > 0) return product(item, loop);
    if (item.phase == kAttention) return attention(item, loop);
    wait(item, loop);
    ring_.issue(issue_, item, loop);
  }

  __device__ void wait(const Instruction& item, int32_t loop) const {
    wait_for_inputs(p_, item, loop);
    proxy_fence();
  }

  // The two operands of a product's stages.
  struct Operands {
    const TensorMap *left, *weight;
    int matrix, first;    // of the left operand; of the inner dimension, in steps
    int column, columns;  // the first one of the tile, and their number
    bool of_stream;       // the left operand is fp32, to be normalised by who reads it

    __device__ uint32_t left_bytes() const { return (of_stream ? 4 : 2) * Config::kRows * Config::kStep; }
    __device__ uint32_t right_bytes() const { return 2 * columns * Config::kStep; }
  };

  __device__ Operands operands_of(const Instruction& item, int32_t loop) const {
    const int32_t phase = item.phase;
    const bool of_norm = phase == kQkv || phase == kMlpIn;
    const bool of_stream = phase == kQkv ? !Config::kNormalQkv : phase == kMlpIn && !Config::kNormalMlpIn;
    const int slot = stream_slot(item.read_slot, loop, p_.keep);
    return {of_stream           ? &p_.stream
            : of_norm           ? &p_.rows
            : phase == kAttnOut ? &p_.mixed
                                : &p_.gelu,
            phase == kQkv       ? &p_.qkv_weight
            : phase == kAttnOut ? &p_.attn_out_weight
            : phase == kMlpIn   ? &p_.mlp_in_weight
                                : &p_.mlp_out_weight,
            (of_stream ? slot * p_.batch : 0) + item.sequence,
            item.part * steps_of(phase),
            column_of(item) * columns_of(phase),
            columns_of(phase),
            of_stream};
  }

  // Stages of 64 of the inner dimension. The weights of the first ones do not wait for the counters, and the
  // rows of these not for the instruction's turn.
  __device__ void product(const Instruction& item, int32_t loop) {
    const int steps = steps_of(item.phase), ahead = min(steps, Config::kStages);
    const Operands operands = operands_of(item, loop);
    RingPlace place = place_;
#pragma unroll 1
    for (int step = 0; step < ahead; ++step, Ring::next(place)) weights(place, item, operands, step);
    wait(item, loop);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, Ring::next(place_)) {
      if (step == ahead) ring_.issue(issue_, item, loop);
      if (step >= ahead) weights(place_, item, operands, step);
      rows(operands, item, step);
    }
    if (steps == ahead) ring_.issue(issue_, item, loop);
  }

  __device__ void weights(RingPlace place, const Instruction& item, const Operands& operands,
                          int step) const {
    ring_.wait_empty(place);
    if (!elected()) return;
    const uint32_t full = ring_.full(place), left = operands.left_bytes(), right = operands.right_bytes();
    barrier_arrive_expect(full, left + right);
    const uint32_t target = ring_.stage(place) + left;
    const int inner = (operands.first + step) * Config::kStep, column = operands.column;
    if constexpr (Config::kBlocks > 1) {
      load_box_for_all(target + row_block() * (right / 2), operands.weight, full, inner,
                       column + row_block() * (operands.columns / 2), item.layer, of_side(), keep_);
    } else {
      load_box(target, operands.weight, full, inner, column, item.layer, keep_);
    }
  }

  // In panels of 128 bytes; of those for two sides each loads half of the rows.
  __device__ void rows(const Operands& operands, const Instruction& item, int step) const {
    if (!elected()) return;
    constexpr int kBoxRows = Config::kRows / Config::kSides;
    const uint32_t stage = ring_.stage(place_) + side() * kBoxRows * 128, full = ring_.full(place_);
    const int column = (operands.first + step) * Config::kStep, row = first_row(item) + side() * kBoxRows;
    const auto panel = [&](int number) {
      const uint32_t target = stage + number * 128 * Config::kRows;
      const int first = column + number * (Config::kStep / 2);
      if constexpr (Config::kSides > 1) {
        load_box_for_all(target, operands.left, full, first, row, operands.matrix, 0b11 << (2 * row_block()));
      } else {
        load_box(target, operands.left, full, first, row, operands.matrix);
      }
    };
    panel(0);
    if (!Config::kNormalMlpIn && operands.of_stream) panel(1);
  }

  // Blocks that have the same columns.
  __device__ static uint16_t of_side() { return Config::kSides > 1 ? 0b101 << side() : 0b11; }

  // Stages of attention: the queries, then keys and values of one block after another.
  __device__ void attention(const Instruction& item, int32_t loop) {
    wait(item, loop);
    ring_.issue(issue_, item, loop);
    const int matrix = qkv_slot(item.read_slot, loop, Config::kLayers) * p_.batch + item.sequence;
    const int column = column_of(item) * Config::kHeadsPerTile * Config::kHeadDim;
    heads<Config::kRows>(matrix, column, first_row(item));
#pragma unroll 1
    for (int key = 0; key < p_.length; key += Config::kKeyBlock) {
      heads<Config::kKeyBlock, (Config::kBlocks > 1)>(matrix, Config::kHidden + column, key);
      heads<Config::kKeyBlock, (Config::kBlocks > 1)>(matrix, 2 * Config::kHidden + column, key);
    }
  }

  // kNumber rows; of those that are for two blocks each loads every second box.
  template <int kNumber, bool kForPair = false>
  __device__ void heads(int matrix, int column, int row) {
    constexpr int kBoxRows = Config::kBlocks > 1 ? 64 : Config::kRows;
    constexpr int kPanels = Config::kHeadsPerTile * kHeadPanels, kBytes = kHeadPanelBytes;
    static_assert(kPanels * kNumber * kBytes <= Config::kStageBytes, "a stage holds a block of keys");
    static_assert(!kForPair || kNumber == 2 * kBoxRows, "a box each");
    ring_.wait_empty(place_);
    if (elected()) {
      const uint32_t full = ring_.full(place_);
      barrier_arrive_expect(full, kPanels * kNumber * kBytes);
      for (int panel = 0; panel < kPanels; ++panel) {
        const auto box = [&](int below, auto load) {
          load(ring_.stage(place_) + (panel * kNumber + below) * kBytes, &p_.qkv, full,
               column + kBytes / 2 * panel, row + below, matrix);
        };
        if constexpr (kForPair) {
          box(row_block() * kBoxRows, [](auto... where) { load_box_for_all(where..., of_side()); });
        } else {
          for (int below = 0; below < kNumber; below += kBoxRows) {
            box(below, [](auto... where) { load_box(where...); });
          }
        }
      }
    }
    Ring::next(place_);
  }

  const KernelParameters& p_;
  const Ring& ring_;
  const uint64_t keep_;
  RingPlace place_{0, 0}, issue_{0, 0};
};

}  // namespace loopmdm
