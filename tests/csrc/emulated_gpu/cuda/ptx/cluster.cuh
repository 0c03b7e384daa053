// Emulated: see emulator.h. Blocks 2 i and 2 i + 1 are a pair.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace loopmdm {

inline int rank_in_cluster() { return emulator::self().block->index % 2; }

// Does `work` as if by a thread of block `rank` of the pair.
template <class Work>
void in_block(int rank, Work work) {
  emulator::Block* const own = emulator::self().block;
  const int wanted = own->index / 2 * 2 + rank, first = emulator::state->blocks.front()->index;
  emulator::Block& reached = *emulator::state->blocks.at(wanted - first);
  emulator::reach_into(reached);
  emulator::self().block = &reached;
  work();
  emulator::self().block = own;
}

inline void meet_in_pair() {
  emulator::Meeting* meeting = nullptr;
  in_block(0, [&] { meeting = &emulator::self().block->pair; });
  emulator::meet_and_tell(*meeting, 2 * emulator::state->threads);
}

inline void barrier_arrive_at(uint32_t barrier, int rank) {
  in_block(rank, [&] {
    require_fence(barrier);
    barrier_arrive(barrier);
  });
}

inline void load_box_for_pair(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row,
                              int matrix) {
  for (int rank = 0; rank < 2; ++rank) {
    in_block(rank, [&] { load_box(target, map, barrier, column, row, matrix); });
  }
}

// Only weights are loaded to be kept in L2. What one block loads for both counts once.
inline void load_box_for_pair(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row,
                              int matrix, uint64_t) {
  emulator::weight_bytes += map->words[1] * map->words[7] * map->words[8];
  load_box_for_pair(target, map, barrier, column, row, matrix);
}

}  // namespace loopmdm
