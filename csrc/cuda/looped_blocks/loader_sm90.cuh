// The warp that reads the table, waits for counters and fills the ring. It runs ahead of the arithmetic:
// while the block computes a tile, or the grid is not done with a phase, the weights of the next tile are on
// their way.
#pragma once

#include "cuda/looped_blocks/progress.cuh"
#include "cuda/tile/ring_sm90.cuh"

namespace loopmdm {

class Loader {
 public:
  __device__ Loader(const KernelParameters& parameters, const Ring& ring)
      : p_(parameters), ring_(ring), leader_(threadIdx.x % 32 == 0), keep_(keep_policy()) {}

  __device__ void run() {
    const int32_t loops = *p_.max_loops;
    const TableSize sizes = padded(p_.size, gridDim.x);
    int32_t kept = 0;  // bytes of the loop's weights so far that stay
    for (int64_t position = blockIdx.x;;) {
      const Place place = place_of(position, sizes, loops);
      if (place.index < 0) break;
      position += gridDim.x;
      const int32_t index = index_of(place, sizes, p_.size, loops);
      if (index < 0) continue;
      const Instruction item = p_.table[index];
      int32_t loop = place.loop;
      if (index < p_.size.enter + static_cast<int32_t>(gridDim.x)) kept = 0;  // the first one of a loop
      const int32_t resident = keep(item, kept);
      if (!takes_part(p_, item, loop)) {
        if (all_stopped(p_, loop)) position = first_leaving(position, sizes, loops, gridDim.x);
        continue;
      }
      load(item, loop, resident);
    }
    Instruction end{};
    end.phase = kEnd;
    ring_.issue(issue_, end, 0);
  }

 private:
  // The place of an instruction's weights among those that stay, or -1. A block executes the same
  // instructions in every loop, and those of a sequence that has stopped count too: the places are always the
  // same.
  __device__ static int32_t keep(const Instruction& item, int32_t& kept) {
    if (Config::kResidentBytes == 0) return -1;
    const int32_t bytes =
        2 * (item.phase == kQkv       ? Config::kQkvColumns * Config::kHidden
             : item.phase == kAttnOut ? Config::kAttnOutColumns * Config::kHidden
             : item.phase == kMlpIn   ? Config::kMlpInColumns * Config::kHidden
             : item.phase == kMlpOut  ? Config::kMlpOutColumns * (Config::kMlp / Config::kMlpOutParts)
                                      : 0);
    if (bytes == 0 || kept + bytes > Config::kResidentBytes) return -1;
    kept += bytes;
    return kept - bytes;
  }

  __device__ void load(const Instruction& item, int32_t loop, int32_t resident) {
    const int slot = stream_slot(item.read_slot, loop, p_.keep) * p_.batch + item.sequence;
    switch (item.phase) {
      case kQkv:
        return product<4, Config::kHidden, Config::kQkvColumns>(item, loop, resident, p_.stream, slot,
                                                                p_.qkv_weight);
      case kAttention:
        return attention(item, loop);
      case kAttnOut:
        return product<2, Config::kHidden, Config::kAttnOutColumns>(item, loop, resident, p_.mixed,
                                                                    item.sequence, p_.attn_out_weight);
      case kMlpIn:
        return product<4, Config::kHidden, Config::kMlpInColumns>(item, loop, resident, p_.stream, slot,
                                                                  p_.mlp_in_weight);
      case kMlpOut:
        return product<2, Config::kMlp / Config::kMlpOutParts, Config::kMlpOutColumns>(
            item, loop, resident, p_.gelu, item.sequence, p_.mlp_out_weight);
      default:
        wait_and_issue(item, loop);
    }
  }

  __device__ void wait_and_issue(const Instruction& item, int32_t loop, int32_t resident = -1) {
    wait_for_inputs(p_, item, loop);
    proxy_fence();
    ring_.issue(issue_, item, loop, resident);
  }

  // A stage of a product: 64 of the inner dimension, `kLeftBytes` each of kRows rows and two of kColumns. The
  // weights of the first stages do not wait for the counters. Weights that stay are loaded in the first loop.
  template <int kLeftBytes, int kInner, int kColumns>
  __device__ void product(const Instruction& item, int32_t loop, int32_t resident, const TensorMap& left,
                          int matrix, const TensorMap& weight) {
    constexpr int kSteps = kInner / Config::kStep;
    constexpr int kAhead = kSteps < Config::kStages ? kSteps : Config::kStages;
    const int first = item.part * kSteps;
    const auto fill = [&](RingPlace place, int step) {
      weights<kLeftBytes, kColumns>(place, resident, loop > 0, weight, item, first, step);
    };
    RingPlace ahead = place_;
    for (int step = 0; step < kAhead; ++step) {
      fill(ahead, step);
      Ring::next(ahead);
    }
    wait_and_issue(item, loop, resident);
    for (int step = 0; step < kSteps; ++step) {
      if (step >= kAhead) fill(place_, step);
      rows<kLeftBytes>(left, item, matrix, first + step);
      Ring::next(place_);
    }
  }

  template <int kLeftBytes, int kColumns>
  __device__ void weights(RingPlace place, int32_t resident, bool loaded, const TensorMap& weight,
                          const Instruction& item, int first, int step) const {
    constexpr uint32_t kLeft = kLeftBytes * Config::kRows * Config::kStep,
                       kRight = 2 * kColumns * Config::kStep;
    static_assert(kLeft + kRight <= Config::kStageBytes, "a stage holds both operands");
    ring_.wait_empty(place);
    if (!leader_) return;
    const uint32_t full = ring_.full(place);
    if (Config::kResidentBytes > 0 && resident >= 0 && loaded) return barrier_arrive_expect(full, kLeft);
    barrier_arrive_expect(full, kLeft + kRight);
    load_box(ring_.right(place, kLeft, resident, step, kRight), &weight, full, (first + step) * Config::kStep,
             item.column * kColumns, item.layer, keep_);
  }

  template <int kLeftBytes>
  __device__ void rows(const TensorMap& left, const Instruction& item, int matrix, int step) const {
    if (!leader_) return;
    constexpr int kPanel = 128 / kLeftBytes;  // columns of a box
#pragma unroll
    for (int panel = 0; panel < Config::kStep / kPanel; ++panel) {
      load_box(ring_.stage(place_) + panel * 128 * Config::kRows, &left, ring_.full(place_),
               step * Config::kStep + panel * kPanel, item.row * Config::kRows, matrix);
    }
  }

  // Stages of attention: the queries, then keys and values of one block after another.
  __device__ void attention(const Instruction& item, int32_t loop) {
    wait_and_issue(item, loop);
    const int matrix = qkv_slot(item.read_slot, loop, Config::kLayers) * p_.batch + item.sequence;
    const int column = item.column * Config::kHeadsPerTile * Config::kHeadDim;
    heads<Config::kRows>(matrix, column, item.row * Config::kRows);
    for (int key = 0; key < p_.length; key += Config::kKeyBlock) {
      heads<Config::kKeyBlock>(matrix, Config::kHidden + column, key);
      heads<Config::kKeyBlock>(matrix, 2 * Config::kHidden + column, key);
    }
  }

  template <int kNumber>
  __device__ void heads(int matrix, int column, int row) {
    constexpr int kPanels = Config::kHeadsPerTile * kHeadPanels, kBytes = kHeadPanelBytes;
    static_assert(kPanels * kNumber * kBytes <= Config::kStageBytes, "a stage holds a block of keys");
    ring_.wait_empty(place_);
    if (leader_) {
      const uint32_t full = ring_.full(place_);
      barrier_arrive_expect(full, kPanels * kNumber * kBytes);
      for (int panel = 0; panel < kPanels; ++panel) {
        for (int box = 0; box < kNumber; box += Config::kRows) {
          load_box(ring_.stage(place_) + (panel * kNumber + box) * kBytes, &p_.qkv, full,
                   column + kBytes / 2 * panel, row + box, matrix);
        }
      }
    }
    Ring::next(place_);
  }

  const KernelParameters& p_;
  const Ring& ring_;
  const bool leader_;
  const uint64_t keep_;
  RingPlace place_{0, 0}, issue_{0, 0};
};

}  // namespace loopmdm
