// What becomes of a tile's sums: rotary, GELU, gate and residual, and the statistics of the next norm.
#pragma once

#include "cuda/tile/rows.cuh"

namespace loopmdm {

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
          float& first = sums[(head * Config::kHeadDim + 8 * group) / 2 + 2 * half + i];
          float& second = sums[(head * Config::kHeadDim + 8 * group + kHalf) / 2 + 2 * half + i];
          const float a = first, b = second;
          first = a * cosine - b * sine;
          second = b * cosine + a * sine;
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
  pair[0] = old.x + gate.x * (pair[0] + bias.x);
  pair[1] = old.y + gate.y * (pair[1] + bias.y);
  return pair[0] + pair[1];
}

// Of a row's part, whose columns begin at `batch` times 8 of the sums, by its quad.
template <int kSums>
__device__ PartStatistics part_statistics(const float (&sums)[kSums], int batch, int half, float total) {
  const float mean = quad_sum(total) / Config::kPart;
  float deviations = 0;
#pragma unroll
  for (int i = 0; i < Config::kPart / 8; ++i) {
    const float* const pair = &sums[4 * (batch + i) + 2 * half];
    deviations += (pair[0] - mean) * (pair[0] - mean) + (pair[1] - mean) * (pair[1] - mean);
  }
  return {mean, quad_sum(deviations)};
}

// stream = stream + gate * (sums + bias); statistics of the new columns; squared norms of them and of their
// difference to the loop's input, if `change` is given. Loads go in batches of 32 columns, a part of the
// statistics: a load cannot overtake the stores before it, and one at a time would wait for L2 each time.
template <int kColumns>
__device__ void update_stream(float (&sums)[kColumns / 2], const Parameters& p, const Instruction& item,
                              int32_t loop, const Seat& seat, int part, const float* bias, const float* gate,
                              PartStatistics* statistics, float2* change) {
  constexpr int kBatch = Config::kPart / 8;
  static_assert(kColumns % Config::kPart == 0, "whole parts");
  const int64_t matrix = static_cast<int64_t>(p.batch) * p.length * Config::kHidden;
  const int row = item.row * Config::kTileRows + seat.row;
  const bool inside[2] = {row < p.length, row + 8 < p.length};
  const int first = part * kColumns + seat.column(0);
  // Rows beyond the sequence read its first one and store nothing.
  const int64_t lines[2] = {p.token(item.sequence, inside[0] ? row : 0) * Config::kHidden + first,
                            p.token(item.sequence, inside[1] ? row + 8 : 0) * Config::kHidden + first};
  const float* const source =
      Config::kFused ? p.middle_values : p.stream_values + stream_slot(item.read_slot, loop, p.keep) * matrix;
  float* const target = p.stream_values + stream_slot(item.write_slot, loop, p.keep) * matrix;
  const float* const loop_input = p.stream_values + stream_slot(0, loop, p.keep) * matrix;
  float changed = 0, size = 0;
#pragma unroll
  for (int batch = 0; batch < kColumns / 8; batch += kBatch) {
    float2 old[kBatch][2], gates[kBatch], biases[kBatch];
    float total[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int column = 8 * (batch + i);
      gates[i] = load_pair(gate + first + column);
      biases[i] = bias ? load_pair(bias + first + column) : make_float2(0, 0);
      for (int half = 0; half < 2; ++half) old[i][half] = load_pair(source + lines[half] + column);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const pair = &sums[4 * (batch + i) + 2 * half];
        total[half] += add_gated(pair, old[i][half], gates[i], biases[i]);
        if (inside[half]) store_pair(target + lines[half] + 8 * (batch + i), {pair[0], pair[1]});
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const PartStatistics found = part_statistics(sums, batch, half, total[half]);
      if (inside[half] && seat.thread % 4 == 0) {
        const int64_t token = p.token(item.sequence, row + 8 * half);
        const int place = part * (kColumns / Config::kPart) + batch / kBatch;
        store_pair(&statistics[token * Config::kParts + place].mean, {found.mean, found.deviations});
      }
    }
    if (!change) continue;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!inside[half]) continue;
        const float* const pair = &sums[4 * (batch + i) + 2 * half];
        const float2 input = load_pair(loop_input + lines[half] + 8 * (batch + i));
        changed += (pair[0] - input.x) * (pair[0] - input.x) + (pair[1] - input.y) * (pair[1] - input.y);
        size += pair[0] * pair[0] + pair[1] * pair[1];
      }
    }
  }
  if (change) {
    changed = warp_sum(changed);
    size = warp_sum(size);
    const int64_t tile =
        (static_cast<int64_t>(item.sequence) * p.row_tiles + item.row) * Config::kChanges + part;
    if (threadIdx.x % 32 == 0)
      store(change + tile * Config::kRowWarps + seat.row / 16, make_float2(changed, size));
  }
}

}  // namespace loopmdm
