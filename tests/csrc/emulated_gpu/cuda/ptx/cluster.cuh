// Emulated: see emulator.h. Blocks that follow each other are a cluster: pairs, or as many as the kernel
// says.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace loopmdm {

#if defined(LOOPMDM_BLOCKS)
constexpr int kClusterBlocks = LOOPMDM_BLOCKS;
#else
constexpr int kClusterBlocks = 2;
#endif

inline int rank_in_cluster() { return emulator::self().block->index % kClusterBlocks; }

// Does `work` as if by a thread of block `rank` of the cluster.
template <class Work>
void in_block(int rank, Work work) {
  emulator::Block* const own = emulator::self().block;
  const int wanted = own->index / kClusterBlocks * kClusterBlocks + rank,
            first = emulator::state->blocks.front()->index;
  emulator::Block& reached = *emulator::state->blocks.at(wanted - first);
  emulator::reach_into(reached);
  emulator::self().block = &reached;
  work();
  emulator::self().block = own;
}

inline void meet_in_cluster() {
  emulator::Meeting* meeting = nullptr;
  in_block(0, [&] { meeting = &emulator::self().block->cluster; });
  emulator::meet_and_tell(*meeting, kClusterBlocks * emulator::state->threads);
}

inline void barrier_arrive_at(uint32_t barrier, int rank) {
  in_block(rank, [&] {
    require_fence(barrier);
    barrier_arrive(barrier);
  });
}

inline void load_box_for_all(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row,
                             int matrix, uint16_t blocks) {
  for (int rank = 0; blocks >> rank; ++rank) {
    if (blocks >> rank & 1) in_block(rank, [&] { load_box(target, map, barrier, column, row, matrix); });
  }
}

// Only weights are loaded to be kept in L2. What one block loads for all counts once.
inline void load_box_for_all(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row,
                             int matrix, uint16_t blocks, uint64_t) {
  emulator::weight_bytes += map->words[1] * map->words[7] * map->words[8];
  load_box_for_all(target, map, barrier, column, row, matrix, blocks);
}

}  // namespace loopmdm
