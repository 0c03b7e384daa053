// What becomes of the sums of the backward pass's products.
#pragma once

#include "cuda/looped_blocks/backward_rows_sm90.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/product_sm90.cuh"

namespace loopmdm {

namespace backward {

constexpr int kSums = kColumns / 2;  // of a thread

// The thread's two rows of the sequence, and where their first pair of columns lies in rows `width` wide.
struct Lines {
  int row[2];
  bool inside[2];
  int64_t offset[2];

  // Rows beyond the sequence read its first one and store nothing.
  __device__ Lines(const Parameters& p, const Instruction& item, const Seat& seat, int width) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = item.row * Config::kTileRows + seat.row + 8 * half;
      inside[half] = row[half] < p.length;
      offset[half] = static_cast<int64_t>(inside[half] ? row[half] : 0) * width + item.column * kColumns +
                     seat.column(0);
    }
  }
};

__device__ inline void store_record(const float (&sums)[kSums], uint16_t* values, int width,
                                    const Parameters& p, const Instruction& item, const Seat& seat) {
  store_bf16<kColumns>(sums, values, width, item.column * kColumns, p, item, p.first_token(item), seat);
}

// Adds the bias, and stores what GELU is applied to and what it gives. Some columns at a time: the bias of
// the next is not read by way of the constant cache, so that its loads do not overtake the stores before
// them, or the compiler would take all of it into registers, and sums of 256 columns leave none.
__device__ inline void store_gelu(float (&sums)[kSums], const Parameters& p, const Instruction& item,
                                  const Seat& seat) {
  constexpr int kMlp = Config::kMlp, kBatch = 8 * kTogether;
  const int first = item.column * kColumns;
  const float* const bias = p.mlp_in_bias + item.layer * kMlp + first + seat.column(0);
#pragma unroll
  for (int batch = 0; batch < kColumns / kBatch; ++batch) {
    float part[kBatch / 2];
#pragma unroll
    for (int i = 0; i < kBatch / 2; ++i) {
      part[i] = sums[batch * kBatch / 2 + i] + bias[batch * kBatch + 8 * (i / 4) + i % 2];
    }
    const auto store_part = [&](uint16_t* values) {
      store_bf16<kBatch>(part, values, kMlp, first + batch * kBatch, p, item, p.first_token(item), seat);
    };
    store_part(p.mlp_in_values);
    apply_gelu(part);
    store_part(p.gelu_values);
  }
}

// The stream of the sequence after the branch that the sums are.
__device__ inline void add_branch(const float (&sums)[kSums], const Parameters& p, const Instruction& item,
                                  const Seat& seat, const float* gate, const float* before, float* after) {
  const Lines lines(p, item, seat, Config::kHidden);
  const float* const own_gate = gate + item.column * kColumns + seat.column(0);
#pragma unroll
  for (int batch = 0; batch < kColumns / 8; batch += kTogether) {
    float2 old[kTogether][2], gates[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      gates[i] = load_constant_pair(own_gate + 8 * (batch + i));
#pragma unroll
      for (int half = 0; half < 2; ++half)
        old[i][half] = load_pair(before + lines.offset[half] + 8 * (batch + i));
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const pair = &sums[4 * (batch + i) + 2 * half];
        const float2 result = {old[i][half].x + gates[i].x * pair[0], old[i][half].y + gates[i].y * pair[1]};
        if (lines.inside[half]) store_pair(after + lines.offset[half] + 8 * (batch + i), result);
      }
    }
  }
}

// d gelu(x) / dx, with the sigmoid of `gelu`.
__device__ inline float gelu_slope(float x) {
  const float u = 0.7978845608028654f * x * (1.0f + 0.044715f * x * x);
  const float share = __fdividef(1.0f, 1.0f + fast_exp2(-2.0f * kLog2E * u));
  const float slope = 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
  return share + 2.0f * x * share * (1.0f - share) * slope;
}

// Gradients of GELU's results to those of what it was applied to; their sums over the warp's 16 rows.
__device__ inline void through_gelu(float (&sums)[kSums], const Parameters& p, const Instruction& item,
                                    const Seat& seat) {
  const Lines lines(p, item, seat, Config::kMlp);
  const uint16_t* const mlp_in = p.mlp_in_values + p.first_token(item) * Config::kMlp;
  float* const bias = p.grad_mlp_in_bias +
                      p.part(item.layer, item.sequence, item.row, seat.row / 16) * Config::kMlp +
                      item.column * kColumns + seat.column(0);
#pragma unroll
  for (int batch = 0; batch < kColumns / 8; batch += kTogether) {
    uint32_t words[kTogether][2];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      for (int half = 0; half < 2; ++half)
        words[i][half] = load_bf16_pair(mlp_in + lines.offset[half] + 8 * (batch + i));
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      float2 total{};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 value = unpack_bf16(words[i][half]);
        float* const pair = &sums[4 * (batch + i) + 2 * half];
        pair[0] = lines.inside[half] ? pair[0] * gelu_slope(value.x) : 0.0f;
        pair[1] = lines.inside[half] ? pair[1] * gelu_slope(value.y) : 0.0f;
        total.x += pair[0];
        total.y += pair[1];
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        total.x += __shfl_xor_sync(~0u, total.x, distance);
        total.y += __shfl_xor_sync(~0u, total.y, distance);
      }
      if (seat.thread % 32 < 4) add_to(bias + 8 * (batch + i), total);
    }
  }
}

// Stores the gradient of attention's output, and of each of its heads the product with that output.
__device__ inline void store_grad_mixed(const float (&sums)[kSums], const Parameters& p,
                                        const Instruction& item, const Seat& seat) {
  constexpr int kHeadGroups = Config::kHeadDim / 8;
  const Lines lines(p, item, seat, Config::kHidden);
  const uint16_t* const mixed = p.mixed_values + p.first_token(item) * Config::kHidden;
#pragma unroll
  for (int head = 0; head < kColumns / Config::kHeadDim; ++head) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float inner = 0;
#pragma unroll
      for (int i = 0; i < kHeadGroups; ++i) {
        const int group = head * kHeadGroups + i;
        const float2 value = unpack_bf16(load_bf16_pair(mixed + lines.offset[half] + 8 * group));
        // As attention's gradient will read it.
        const float2 grad =
            unpack_bf16(pack_bf16(sums[4 * group + 2 * half], sums[4 * group + 2 * half + 1]));
        inner += grad.x * value.x + grad.y * value.y;
      }
      inner = quad_sum(inner);
      float* const heads = p.inner + p.head_rows(item, item.column * (kColumns / Config::kHeadDim) + head);
      if (seat.thread % 4 == 0) store(heads + lines.row[half], lines.inside[half] ? inner : 0.0f);
    }
  }
  store_record(sums, p.grad_mixed_values, Config::kHidden, p, item, seat);
}

__device__ inline void store_grad_rows(const float (&sums)[kSums], const Parameters& p,
                                       const Instruction& item, const Seat& seat) {
  const Lines lines(p, item, seat, Config::kHidden);
  float* const target = p.grad_rows + p.token(item.sequence, 0) * Config::kHidden;
#pragma unroll
  for (int group = 0; group < kColumns / 8; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* const pair = &sums[4 * group + 2 * half];
      if (lines.inside[half]) store_pair(target + lines.offset[half] + 8 * group, {pair[0], pair[1]});
    }
  }
}

// A weight's gradient belongs to one tile of the table: nobody else adds to it.
__device__ inline void add_to_weight(const float (&sums)[kSums], float* gradient, int height, int width,
                                     const Instruction& item, const Seat& seat) {
  const int first = item.row * Config::kTileRows + seat.row;
  float* const matrix =
      gradient + static_cast<int64_t>(item.layer) * height * width + item.column * kColumns + seat.column(0);
#pragma unroll
  for (int batch = 0; batch < kColumns / 8; batch += kTogether) {
    float2 old[kTogether][2];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(first + 8 * half, height - 1);
        old[i][half] = load_pair(matrix + static_cast<int64_t>(row) * width + 8 * (batch + i));
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const pair = &sums[4 * (batch + i) + 2 * half];
        if (first + 8 * half >= height) continue;
        store_pair(matrix + static_cast<int64_t>(first + 8 * half) * width + 8 * (batch + i),
                   {old[i][half].x + pair[0], old[i][half].y + pair[1]});
      }
    }
  }
}

}  // namespace backward

}  // namespace loopmdm
