// Two warp groups that multiply in turn: while one works on what its products have given, the other's run.
#pragma once

#include "cuda/tile/stage_ring_sm90.cuh"

namespace loopmdm {

// Group 0 begins. A group waits for its turn at a barrier of its own, where the other one's threads arrive
// when they have issued their products; these need not be done. Both groups have the same number of turns,
// and as many arrive at each barrier as wait there: none is left over for whoever comes next.
template <bool kBoth>
class Turns {
  static constexpr int kFirstBarrier = 2, kThreads = 256;

 public:
  __device__ Turns() : group_(warp_group()) {
    if (group_ == 1) end();
  }

  __device__ void begin() const { meet_at<kThreads>(kFirstBarrier + group_); }
  __device__ void end() const { arrive_at<kThreads>(kFirstBarrier + 1 - group_); }
  // Behind the last one of a tile. The first group's next one is not told: it begins the next tile.
  __device__ void end_last() const {
    if (group_ == 0) end();
  }

 private:
  const int group_;
};

// Of a group that multiplies alone.
template <>
class Turns<false> {
 public:
  __device__ void begin() const {}
  __device__ void end() const {}
  __device__ void end_last() const {}
};

}  // namespace loopmdm
