// What happens to a sequence outside the layers: it enters, it may stop, it leaves.
#pragma once

#include "cuda/looped_blocks/row_phases.cuh"

namespace loopmdm {

// One warp a row, one lane a column of a part. Where MLP_SUM normalises the rows of other layers and loops,
// those of the first are normalised here.
__device__ inline void enter(const Parameters& p, const Instruction& item, int32_t loop) {
  const int64_t matrix = static_cast<int64_t>(p.batch) * p.length * Config::kHidden;
  float* const target = p.stream_values + stream_slot(item.write_slot, loop, p.keep) * matrix;
  const RowSpan rows(p, item, Config::kTileRows);
  const int lane = threadIdx.x % 32;
  for (int row = rows.first + threadIdx.x / 32; row < rows.last; row += Config::kComputeThreads / 32) {
    const int64_t token = p.token(item.sequence, row);
#pragma unroll 4
    for (int part = 0; part < Config::kParts; ++part) {
      const int64_t place = token * Config::kHidden + part * Config::kPart + lane;
      const float value = __ldg(p.input + place);
      store(target + place, value);
      const float mean = warp_sum(value) / Config::kPart;
      const float deviations = warp_sum((value - mean) * (value - mean));
      if (lane == 0) store_pair(&p.statistics1[token * Config::kParts + part].mean, {mean, deviations});
    }
    if constexpr (Config::kSumRows > 0) {
      __syncwarp();
      normalise_rows<1>(p, token, 1, 1, target, p.statistics1, affine_of(p, item, 0));
    }
  }
}

// Adds the squared norms of the loop before in a fixed order and publishes whether the sequence goes on.
__device__ inline void decide(const Parameters& p, const Instruction& item, int32_t loop) {
  if (threadIdx.x >= 32 || rank_in_tile() != 0) return;
  int32_t* const stop = p.stop + item.sequence;
  bool goes_on = loop + 1 < *stop;
  if (loop > 0) {
    const int number = p.row_tiles * Config::kChanges;
    const float2* const parts = p.change + static_cast<int64_t>(item.sequence) * number;
    float changed = 0, size = 0;
    for (int i = threadIdx.x; i < number; i += 32) {
      const float2 part = __ldcg(parts + i);
      changed += part.x;
      size += part.y;
    }
    changed = warp_sum(changed);
    size = warp_sum(size);
    if (sqrtf(changed) / sqrtf(size) < p.exit_threshold) {
      goes_on = false;
      if (threadIdx.x == 0) store(stop, loop);
    }
  }
  if (threadIdx.x == 0) {
    store_release(p.progress(item.sequence), goes_on ? loop + 1 : kFinal);
    if (!goes_on) {
      raise_to(p.longest(), *stop);
      add_release(p.settled(), 1);
    }
  }
}

__device__ inline void leave(const Parameters& p, const Instruction& item, int32_t loop) {
  const int64_t matrix = static_cast<int64_t>(p.batch) * p.length * Config::kHidden;
  const RowSpan rows(p, item, Config::kTileRows);
  const int64_t offset = p.token(item.sequence, rows.first) * Config::kHidden;
  const float* const source = p.stream_values + stream_slot(item.read_slot, loop, p.keep) * matrix + offset;
  for (int i = 2 * threadIdx.x; i < (rows.last - rows.first) * Config::kHidden;
       i += 2 * Config::kComputeThreads) {
    store_pair(p.output + offset + i, load_pair(source + i));
  }
}

}  // namespace loopmdm
