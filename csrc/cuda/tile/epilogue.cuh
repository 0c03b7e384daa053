// What becomes of a tile's sums: rotary, GELU, gate and residual, and the statistics of the next norm.
#pragma once

#include "cuda/tile/rows.cuh"

namespace loopmdm {

// A group's sums over a part of the inner dimension, which wait for those of the others.
template <int kColumns>
__device__ void store_part(const float (&sums)[kColumns / 2], const Parameters& p, const Instruction& item,
                           const Seat& seat, int share) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = item.row * Config::kTileRows + seat.row + 8 * half;
    if (row >= p.length) continue;
    float* const line = p.partial_values +
                        p.token(item.part * p.batch + item.sequence, row) * Config::kHidden +
                        share * kColumns + seat.column(0);
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      store_pair(line + 8 * i, {sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]});
    }
  }
}

// Rounds and stores `kColumns` columns of a group, beginning at `column` of rows `width` wide.
template <int kColumns, class Launch>
__device__ void store_bf16(const float (&sums)[kColumns / 2], uint16_t* target, int64_t width, int column,
                           const Launch& p, const Instruction& item, int64_t first_token, const Seat& seat) {
  static_assert(kColumns == 16 || kColumns % 32 == 0, "a quad stores 32 columns together");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = item.row * Config::kTileRows + seat.row + 8 * half;
    if constexpr (kColumns == 16) {  // of a small head
      uint16_t* const line = target + (first_token + row) * width + column;
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const uint32_t word = pack_bf16(sums[4 * group + 2 * half], sums[4 * group + 2 * half + 1]);
        if (row < p.length) store(reinterpret_cast<uint32_t*>(line + seat.column(4 * group)), word);
      }
      continue;
    }
    uint16_t* const line = target + (first_token + row) * width + column + 8 * (seat.thread % 4);
#pragma unroll
    for (int group = 0; group < kColumns / 32; ++group) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int index = 16 * group + 4 * i + 2 * half;
        words[i] = pack_bf16(sums[index], sums[index + 1]);
      }
      transpose_quad(words);
      if (row < p.length) {
        store(reinterpret_cast<uint4*>(line + 32 * group),
              make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
}

// Rotates pairs (i, i + K/2) of each head, which one thread holds, or turns them back.
template <int kColumns, bool kBack = false, class Launch>
__device__ void rotate(float (&sums)[kColumns / 2], const Launch& p, const Instruction& item,
                       const Seat& seat) {
  constexpr int kHalf = Config::kHeadDim / 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(item.row * Config::kTileRows + seat.row + 8 * half, p.length - 1);
    const int64_t first_angle = static_cast<int64_t>(row) * kHalf + seat.column(0);
    const float *const cosines = p.cosines + first_angle, *const sines = p.sines + first_angle;
#pragma unroll
    for (int group = 0; group < kHalf / 8; ++group) {
      const float2 c = load_constant_pair(cosines + 8 * group), s = load_constant_pair(sines + 8 * group);
#pragma unroll
      for (int head = 0; head < kColumns / Config::kHeadDim; ++head) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float cosine = i ? c.y : c.x, sine = kBack ? -(i ? s.y : s.x) : i ? s.y : s.x;
          rotate_pair(sums[(head * Config::kHeadDim + 8 * group) / 2 + 2 * half + i],
                      sums[(head * Config::kHeadDim + 8 * group + kHalf) / 2 + 2 * half + i], cosine, sine);
        }
      }
    }
  }
}

template <int kColumns>
__device__ void add_bias(float (&sums)[kColumns / 2], const float* bias, const Seat& seat) {
  const float* const own = bias + seat.column(0);  // one address for all: registers are few
#pragma unroll
  for (int group = 0; group < kColumns / 8; ++group) {
    const float2 b = load_constant_pair(own + 8 * group);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sums[4 * group + 2 * half] += b.x;
      sums[4 * group + 2 * half + 1] += b.y;
    }
  }
}

template <int kSums>
__device__ void apply_gelu(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = gelu(sums[i]);
}

// Two columns of the stream: old + gate * (sums + bias), in the place of the sums. Returns what they add to
// the part's total.
__device__ inline float add_gated(float* pair, float2 old, float2 gate, float2 bias) {
  pair[0] = gated(pair[0], old.x, gate.x, bias.x);
  pair[1] = gated(pair[1], old.y, gate.y, bias.y);
  return pair[0] + pair[1];
}

// A slot of the stream, [B, L, D].
__device__ inline float* stream_in(const Parameters& p, int32_t slot, int32_t loop) {
  const int64_t matrix = static_cast<int64_t>(p.batch) * p.length * Config::kHidden;
  return p.stream_values + stream_slot(slot, loop, p.keep) * matrix;
}

// Where a thread's sums go: kColumns columns of two rows.
template <int kColumns>
struct StreamTile {
  int first;         // of its columns
  int64_t lines[2];  // where it is in the two rows
  bool inside[2];

  __device__ StreamTile(const Parameters& p, const Instruction& item, const Seat& seat, int part)
      : first(part * kColumns + seat.column(0)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = item.row * Config::kTileRows + seat.row + 8 * half;
      inside[half] = row < p.length;
      // Rows beyond the sequence read its first one and store nothing.
      lines[half] = p.token(item.sequence, inside[half] ? row : 0) * Config::kHidden + first;
    }
  }
};

// What the sums of 32 columns, a part of the statistics, meet: the stream as it was, gates and biases.
struct StreamBatch {
  static constexpr int kPairs = Config::kPart / 8;
  float2 old[kPairs][2], gates[kPairs], biases[kPairs];

  template <int kColumns>
  __device__ void load(const StreamTile<kColumns>& tile, const float* stream, const float* bias,
                       const float* gate, int pair) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = 8 * (pair + i);
      gates[i] = load_pair(gate + tile.first + column);
      biases[i] = bias ? load_pair(bias + tile.first + column) : make_float2(0, 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) old[i][half] = load_pair(stream + tile.lines[half] + column);
    }
  }
};

// The number among a row tile's squared norms of what a warp has of a residual tile.
__device__ inline int change_of(const Instruction& item, const Seat& seat) {
  return (column_of(item) * Config::kColumnGroups + seat.column_group) * Config::kRowWarps + seat.row / 16;
}

__device__ inline void store_change(const Parameters& p, const Instruction& item, int place, float2 change) {
  const int64_t tile = static_cast<int64_t>(item.sequence) * p.row_tiles + item.row;
  store(p.change + tile * Config::kChanges + place, change);
}

// Of all lanes of a warp.
__device__ inline float2 warp_sums(float changed, float size) {
  changed = warp_sum(changed);
  return make_float2(changed, warp_sum(size));
}

// Whether sequences may exit behind the instruction's layer.
__device__ inline bool may_exit(const Parameters& p, const Instruction& item) {
  return p.adaptive && item.layer == Config::kLayers - 1;
}

// stream = stream + gate * (sums + bias); statistics of the new columns; squared norms of them and of their
// difference to the loop's input, if sequences may exit. `batch` has the first 32 columns. Others are loaded
// before the ones in front of them are stored: a load cannot overtake a store, and would wait for L2 behind
// it. So it is with gates and biases: as constants all of them would be loaded at once, and spill registers.
template <int kColumns>
__device__ void update_stream(float (&sums)[kColumns / 2], StreamBatch& batch, const Parameters& p,
                              const Instruction& item, int32_t loop, const Seat& seat, int part,
                              const float* bias, const float* gate, PartStatistics* statistics, bool exits) {
  constexpr int kPairs = StreamBatch::kPairs;
  static_assert(kColumns % Config::kPart == 0, "whole parts");
  const StreamTile<kColumns> tile(p, item, seat, part);
  const float* const source = stream_in(p, item.read_slot, loop);
  float* const target = stream_in(p, item.write_slot, loop);
  const float* const loop_input = stream_in(p, 0, loop);
  float changed = 0, size = 0;
#pragma unroll
  for (int first = 0; first < kColumns / 8; first += kPairs) {
    float total[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[half] +=
            add_gated(&sums[4 * (first + i) + 2 * half], batch.old[i][half], batch.gates[i], batch.biases[i]);
      }
    }
    if (first + kPairs < kColumns / 8) batch.load(tile, source, bias, gate, first + kPairs);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const pair = &sums[4 * (first + i) + 2 * half];
        if (tile.inside[half]) store_pair(target + tile.lines[half] + 8 * (first + i), {pair[0], pair[1]});
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const PartStatistics found = part_statistics(sums, first, half, total[half]);
      if (tile.inside[half] && seat.thread % 4 == 0) {
        const int64_t token = tile.lines[half] / Config::kHidden;
        const int place = part * (kColumns / Config::kPart) + first / kPairs;
        store_pair(&statistics[token * Config::kParts + place].mean, {found.mean, found.deviations});
      }
    }
    if (!exits) continue;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!tile.inside[half]) continue;
        const float* const pair = &sums[4 * (first + i) + 2 * half];
        const float2 input = load_pair(loop_input + tile.lines[half] + 8 * (first + i));
        changed += (pair[0] - input.x) * (pair[0] - input.x) + (pair[1] - input.y) * (pair[1] - input.y);
        size += pair[0] * pair[0] + pair[1] * pair[1];
      }
    }
  }
  if (exits) {
    const float2 sums_of_warp = warp_sums(changed, size);
    if (threadIdx.x % 32 == 0) store_change(p, item, change_of(item, seat), sums_of_warp);
  }
}

}  // namespace loopmdm
