// A block's way through the table, all of its threads together. One warp waits for counters; the weights of
// the next tile are on their way before.
#pragma once

#include "cuda/looped_blocks/progress.cuh"
#include "cuda/looped_blocks/row_phases.cuh"
#include "cuda/tile/product_sm80.cuh"

namespace loopmdm {

constexpr int kQkvBytes = Config::kNormalQkv ? 2 : 4;  // of a number of the rows that QKV multiplies

class Walk {
 public:
  __device__ Walk(const KernelParameters& parameters, uint8_t* memory)
      : p_(parameters), loops_(*parameters.max_loops), position_(blockIdx.x), policy_(keep_policy()) {
    const uint32_t address = shared_address(memory), skipped = (1024 - address % 1024) % 1024;
    stages_ = address + skipped;
    current_ = reinterpret_cast<Current*>(memory + skipped + Config::kStages * Config::kStageBytes);
  }

  __device__ const Instruction& item() const { return current_->item; }
  __device__ int32_t loop() const { return current_->loop; }
  __device__ Stages stages() const { return Stages(stages_); }
  __device__ SumStatistics& statistics() const { return current_->statistics; }

  // To the next tile that has work, whose inputs are then ready and first weights under way. False: no more.
  __device__ bool next() {
    for (Place place = seek(); place.index >= 0; place = seek()) {
      if (p_.adaptive && !joins(place)) continue;
      if (!fetched_) fetch(place);
      fetched_ = false;
      position_ += gridDim.x;
      if (threadIdx.x < 32) {
        const Instruction item = p_.table[place.index];
        int32_t loop = place.loop;
        takes_part(p_, item, loop);
        wait_for_inputs(p_, item, loop);
        if (threadIdx.x == 0) {
          current_->item = item;
          current_->loop = loop;
        }
      }
      __syncthreads();
      return true;
    }
    return false;
  }

  // The thread has read the tile's last stage: weights of the next tile may come while this one is finished.
  // Whether a sequence goes on is not known so early.
  __device__ void read_all() {
    __syncthreads();
    if (p_.adaptive) return;
    const Place place = seek();
    if (place.index < 0) return;
    fetch(place);
    fetched_ = true;
  }

  // The tile's results are stored.
  __device__ void complete() const {
    __syncthreads();
    if (threadIdx.x == 0 && item().signal >= 0) add_release(p_.counters + item().signal, item().signal_count);
  }

  // Of the four products. `source`: the buffer of the left operand, rows of a width that the product knows.
  template <int kLeftBytes, int kInner, int kTileColumns, int kParts = 1>
  __device__ Operands<kLeftBytes, kInner, kTileColumns, kParts> operands(const void* source, int matrix,
                                                                         const uint16_t* weight,
                                                                         int width) const {
    const int row = item().row * Config::kRows;
    const int64_t first = p_.token(matrix * p_.batch + item().sequence, row) * kInner;
    const auto* const left =
        static_cast<const uint8_t*>(source) + (first + item().part * (kInner / kParts)) * kLeftBytes;
    const auto* const tile = tile_of<kInner, kTileColumns, kParts>(weight, width, item());
    return {left, tile, p_.length - row, policy_};
  }

 private:
  struct Current {
    Instruction item;
    int32_t loop;
    int32_t verdict;  // see joins
    SumStatistics statistics;
  };
  static_assert(sizeof(Current) + 1024 <= 2048, "FIXED_BYTES of loopmdm_kernels/schedule/plan.py");

  template <int kInner, int kTileColumns, int kParts>
  __device__ static const uint16_t* tile_of(const uint16_t* weight, int width, const Instruction& item) {
    const int64_t row = static_cast<int64_t>(item.layer) * width + item.column * kTileColumns;
    return weight + row * kInner + item.part * (kInner / kParts);
  }

  // Where the block goes on. Without early exit the loops of each sequence are known, and what lies beyond
  // them is passed over.
  __device__ Place seek() {
    for (;; position_ += gridDim.x) {
      const Place place = place_of(position_, p_.size, loops_);
      if (place.index < 0 || p_.adaptive) return place;
      const Instruction& item = p_.table[place.index];
      if (item.phase == kEnter || item.phase == kLeave) return place;
      if (place.loop < p_.stop[item.sequence]) return place;
    }
  }

  // With early exit: waits until it is known whether the tile has work, and goes on behind it if not.
  __device__ bool joins(Place place) {
    constexpr int kWork = 0, kNone = 1, kOver = 2;
    if (threadIdx.x < 32) {
      int32_t loop = place.loop;
      const bool work = takes_part(p_, p_.table[place.index], loop);
      const int32_t verdict = work ? kWork : all_stopped(p_, loop) ? kOver : kNone;
      if (threadIdx.x == 0) current_->verdict = verdict;
    }
    __syncthreads();
    const int32_t verdict = current_->verdict;
    __syncthreads();
    if (verdict == kWork) return true;
    position_ += gridDim.x;
    if (verdict == kOver) position_ = first_leaving(position_, p_.size, loops_, gridDim.x);
    return false;
  }

  __device__ void fetch(Place place) const {
    const Instruction& item = p_.table[place.index];
    switch (item.phase) {
      case kQkv:
        return fetch<kQkvBytes, Config::kHidden, Config::kQkvColumns>(p_.qkv_weight, 3 * Config::kHidden,
                                                                      item);
      case kAttnOut:
        return fetch<2, Config::kHidden, Config::kAttnOutColumns>(p_.attn_out_weight, Config::kHidden, item);
      case kMlpIn:
        return fetch<4, Config::kHidden, Config::kMlpInColumns>(p_.mlp_in_weight, Config::kMlp, item);
      case kMlpOut:
        return fetch<2, Config::kMlp, Config::kMlpOutColumns, Config::kMlpOutTiles>(p_.mlp_out_weight,
                                                                                    Config::kHidden, item);
      default:
        return;
    }
  }

  template <int kLeftBytes, int kInner, int kTileColumns, int kParts = 1>
  __device__ void fetch(const uint16_t* weight, int width, const Instruction& item) const {
    const auto* const tile = tile_of<kInner, kTileColumns, kParts>(weight, width, item);
    Operands<kLeftBytes, kInner, kTileColumns, kParts>{nullptr, tile, 0, policy_}.copy_first_weights(
        stages());
  }

  const KernelParameters& p_;
  const int32_t loops_;
  int64_t position_;
  const uint64_t policy_;
  uint32_t stages_;
  Current* current_;
  bool fetched_ = false;
};

}  // namespace loopmdm
