// Phases and arithmetic of the instruction tables (loopmdm_kernels/schedule) and of the ring of stages.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

// As in loopmdm_kernels/schedule/forward.py.
enum Phase : int32_t {
  kEnter,
  kNorm1,
  kQkv,
  kAttention,
  kAttnOut,
  kNorm2,
  kMlpIn,
  kMlpOut,
  kMlpSum,
  kExit,
  kLeave,
  kEnd
};

namespace backward {

// As in loopmdm_kernels/schedule/backward.py.
enum Phase : int32_t {
  kNorm1,
  kQkv,
  kAttention,
  kAttnOut,
  kNorm2,
  kMlpIn,
  kMlpOut,
  kTop,
  kGradMlpIn,
  kGradNorm2,
  kMiddle,
  kGradMixed,
  kGradQueries,
  kGradKeys,
  kGradNorm1,
  kBottom,
  kWeightMlpOut,
  kWeightMlpIn,
  kWeightAttnOut,
  kWeightQkv,
  kNothing,  // of a sequence that does not take part in the loop: only the signal
  kEnd
};

}  // namespace backward

struct Instruction {
  int32_t phase, layer, sequence, row, column;
  int32_t wait, wait_number, wait_count;
  int32_t signal, signal_count;
  int32_t read_slot, write_slot;
  int32_t part;
};

constexpr int32_t kFinal = 0x7F7F7F7F;  // progress of a sequence whose number of loops is settled

struct TableSize {
  int32_t enter, loop, leave;
};

struct Place {
  int32_t loop;   // -1 for ENTER, the number of loops for LEAVE
  int32_t index;  // in the table; -1: beyond the end
};

// Where a place of the sequence enter, loop 0, loop 1, ..., leave lies in the table.
LOOPMDM_HD Place place_of(int64_t position, TableSize size, int32_t loops) {
  if (position < size.enter) return {-1, static_cast<int32_t>(position)};
  position -= size.enter;
  const int64_t looped = static_cast<int64_t>(size.loop) * loops;
  if (position < looped) {
    const int32_t loop = static_cast<int32_t>(position / size.loop);
    return {loop, size.enter + static_cast<int32_t>(position - static_cast<int64_t>(loop) * size.loop)};
  }
  position -= looped;
  if (position < size.leave) return {loops, size.enter + size.loop + static_cast<int32_t>(position)};
  return {loops, -1};
}

// The block's first position that is not before LEAVE: where it goes on when every sequence has stopped.
LOOPMDM_HD int64_t first_leaving(int64_t position, TableSize size, int32_t loops, int32_t num_blocks) {
  const int64_t leaving = size.enter + static_cast<int64_t>(size.loop) * loops;
  if (position >= leaving) return position;
  return position + (leaving - position + num_blocks - 1) / num_blocks * num_blocks;
}

// What a counter has reached when all tiles of the phase waited for are complete in this loop.
LOOPMDM_HD int32_t generation(int32_t count, int32_t loop) { return count * (loop + 1); }

// `kept`: of a stream that keeps the inputs of all loops, which are then as many slots.
LOOPMDM_HD int32_t stream_slot(int32_t slot, int32_t loop, int32_t kept) {
  return kept ? slot + loop : (slot + loop) & 1;
}

LOOPMDM_HD int32_t qkv_slot(int32_t slot, int32_t loop, int32_t layers) { return (slot + loop * layers) & 1; }

// A place in a ring of stages. A barrier's parity tells one round from the next: consumers wait for the
// parity of the round, producers for that of the round before, which a fresh barrier counts as complete.
struct RingPlace {
  uint32_t slot, round;
};

LOOPMDM_HD void advance(RingPlace& place, uint32_t slots) {
  if (++place.slot == slots) {
    place.slot = 0;
    place.round ^= 1;
  }
}

}  // namespace loopmdm
