// Work on whole rows, kPart of them an instruction and block: norms there and back, gates, and sums over
// rows. First a warp goes through each row, then each thread goes down two columns.
#pragma once

#include "cuda/looped_blocks/kept_sm90.cuh"
#include "cuda/tile/math.cuh"

namespace loopmdm {

namespace backward {

__device__ inline uint32_t load_bf16_pair(const uint16_t* address) {
  return __ldcg(reinterpret_cast<const uint32_t*>(address));
}

__device__ inline void store_bf16_pair(uint16_t* address, float2 value) {
  store(reinterpret_cast<uint32_t*>(address), pack_bf16(value.x, value.y));
}

// Hidden from the compiler for the reason that Seat gives.
__device__ inline int hidden_thread() {
  int number = threadIdx.x;
  asm volatile("" : "+r"(number));
  return number;
}

constexpr int kTogether = 4;  // loads before the stores that they cannot overtake

// A lane's columns of a row, two of each 64.
struct WarpRow {
  static constexpr int kPairs = Config::kHidden / 64;
  float2 values[kPairs];
  float mean, scale;

  int first;

  __device__ int column(int pair) const { return first + 64 * pair; }
  __device__ float2 normalised(int pair) const {
    return {(values[pair].x - mean) * scale, (values[pair].y - mean) * scale};
  }

  __device__ WarpRow(const float* row, int thread) : first(2 * (thread % 32)) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      values[i] = load_pair(row + column(i));
      total += values[i].x + values[i].y;
    }
    mean = warp_sum(total) / Config::kHidden;
    float deviations = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = values[i].x - mean, b = values[i].y - mean;
      deviations += a * a + b * b;
    }
    scale = rsqrtf(warp_sum(deviations) / Config::kHidden + kLayerNormEps);
  }
};

// The part of an instruction's rows that the block has, and its number in the row tile.
__device__ inline int part_of(const Instruction& item) {
  return item.column * Config::kBlocks + rank_in_tile();
}

struct PartRows {
  int first, last;  // of the sequence

  __device__ PartRows(const Parameters& p, const Instruction& item)
      : first(item.row * Config::kTileRows + part_of(item) * kPart), last(min(first + kPart, p.length)) {}
};

// The stream of the sequence that a layer's first or second norm reads.
__device__ inline const float* norm_input(const Parameters& p, const Instruction& item, int32_t loop,
                                          bool first) {
  return first ? p.before_layer(item, loop) : p.middle + p.first_token(item) * Config::kHidden;
}

// norm(x) * gain + shift, rounded.
__device__ inline void normalise(const Parameters& p, const Instruction& item, int32_t loop) {
  const bool first = item.phase == kNorm1;
  const int branch = first ? 0 : 1;
  const float* const x = norm_input(p, item, loop, first);
  uint16_t* const target = (first ? p.rows1_values : p.rows2_values) + p.first_token(item) * Config::kHidden;
  const PartRows rows(p, item);
  const float4* const affine = affine_of(p, item, branch);
  const int thread = hidden_thread();
#pragma unroll 1
  for (int row = rows.first + thread / 32; row < rows.last; row += kWarps) {
    const int64_t line = static_cast<int64_t>(row) * Config::kHidden;
    const WarpRow values(x + line, thread);
#pragma unroll
    for (int batch = 0; batch < WarpRow::kPairs; batch += kTogether) {
      // Past L1, or the compiler would take all of them into registers before it stores anything.
      float4 vectors[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether && batch + i < WarpRow::kPairs; ++i)
        vectors[i] = __ldcg(affine + values.column(batch + i) / 2);
#pragma unroll
      for (int i = 0; i < kTogether && batch + i < WarpRow::kPairs; ++i) {
        const float2 value = values.normalised(batch + i);
        const float4 affine_pair = vectors[i];
        store_bf16_pair(
            target + line + values.column(batch + i),
            {fmaf(value.x, affine_pair.x, affine_pair.z), fmaf(value.y, affine_pair.y, affine_pair.w)});
      }
    }
  }
}

// What the norm's gradient needs to know of each row.
__device__ inline void gather_rows(const Parameters& p, const Instruction& item, const Kept& kept,
                                   const float* x, const float* grad_rows, const float4* affine) {
  const PartRows rows(p, item);
  const int thread = hidden_thread();
#pragma unroll 1
  for (int row = rows.first + thread / 32; row < rows.last; row += kWarps) {
    const int64_t line = static_cast<int64_t>(row) * Config::kHidden;
    const WarpRow values(x + line, thread);
    float plain = 0, product = 0;
#pragma unroll
    for (int i = 0; i < WarpRow::kPairs; ++i) {
      const int column = values.column(i);
      const float2 grad = load_pair(grad_rows + line + column);
      const float2 gain = load_constant_pair(&affine[column / 2].x);
      const float a = grad.x * gain.x, b = grad.y * gain.y;
      plain += a + b;
      const float2 value = values.normalised(i);
      product += a * value.x + b * value.y;
    }
    plain = warp_sum(plain) / Config::kHidden;
    product = warp_sum(product) / Config::kHidden;
    if (thread % 32 == 0) kept.barriers->rows[row - rows.first] = {values.mean, values.scale, plain, product};
  }
}

__device__ inline void add_to(float* sum, float2 value) {
  const float2 before = load_pair(sum);
  store_pair(sum, {before.x + value.x, before.y + value.y});
}

// Where the gradient of a branch goes; of the layer whose branch it is.
struct Branch {
  const uint16_t* values;
  uint16_t* gradient;
  const float* gate;
  float* grad_gate;
  float* plain;  // sum of the stream's gradient, or null

  __device__ Branch(const Parameters& p, const Instruction& item, int layer, int branch) {
    const int64_t first = p.token(p.place(layer, item.sequence), 0) * Config::kHidden;
    values = (branch ? p.branch2_values : p.branch1_values) + first;
    gradient = (branch ? p.grad_branch2_values : p.grad_branch1_values) + first;
    gate = gate_of(p, layer, item.sequence, branch);
    grad_gate =
        p.gates + p.part(2 * layer + branch, item.sequence, item.row, part_of(item)) * Config::kHidden;
    plain = branch ? p.grad_branch + p.part(layer, item.sequence, item.row, part_of(item)) * Config::kHidden
                   : nullptr;
  }
};

// The stream's gradient back through a norm, if there is one, and then to the branch that was added before.
__device__ inline void down_columns(const Parameters& p, const Instruction& item, const Kept& kept,
                                    const float* x, int norm, bool through_norm, const Branch& branch,
                                    bool to_branch) {
  constexpr int kHidden = Config::kHidden;
  const PartRows rows(p, item);
  const int64_t first = p.token(item.sequence, rows.first) * kHidden;
  const int64_t inside = static_cast<int64_t>(rows.first) * kHidden;
  float* const product_sum =
      p.norms + p.part((2 * item.layer + norm) * 2, item.sequence, item.row, part_of(item)) * kHidden;
  float* const plain_sum =
      p.norms + p.part((2 * item.layer + norm) * 2 + 1, item.sequence, item.row, part_of(item)) * kHidden;
#pragma unroll 1
  for (int column = 2 * hidden_thread(); column < kHidden; column += 2 * Config::kComputeThreads) {
    const float4 vectors = through_norm ? __ldg(affine_of(p, item, norm) + column / 2) : float4{};
    const float2 gate = to_branch ? load_constant_pair(branch.gate + column) : float2{};
    float2 product{}, plain{}, grad_gate{}, grad_branch{};
#pragma unroll 1
    for (int row = 0; row < rows.last - rows.first; row += kTogether) {
      float2 grads[kTogether], values[kTogether], grad_rows[kTogether];
      uint32_t branches[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        // Rows beyond the last are the last again, and not stored.
        const int64_t line =
            static_cast<int64_t>(min(row + i, rows.last - rows.first - 1)) * kHidden + column;
        grads[i] = load_pair(p.grad + first + line);
        if (through_norm) values[i] = load_pair(x + inside + line);
        if (through_norm) grad_rows[i] = load_pair(p.grad_rows + first + line);
        if (to_branch) branches[i] = load_bf16_pair(branch.values + inside + line);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (row + i >= rows.last - rows.first) continue;
        const int64_t line = static_cast<int64_t>(row + i) * kHidden + column;
        float2 grad = grads[i];
        if (through_norm) {
          const float4 row_numbers = kept.barriers->rows[row + i];
          const float a = (values[i].x - row_numbers.x) * row_numbers.y,
                      b = (values[i].y - row_numbers.x) * row_numbers.y;
          product.x += grad_rows[i].x * a;
          product.y += grad_rows[i].y * b;
          plain.x += grad_rows[i].x;
          plain.y += grad_rows[i].y;
          grad.x += (grad_rows[i].x * vectors.x - row_numbers.z - a * row_numbers.w) * row_numbers.y;
          grad.y += (grad_rows[i].y * vectors.y - row_numbers.z - b * row_numbers.w) * row_numbers.y;
          store_pair(p.grad + first + line, grad);
        }
        if (to_branch) {
          const float2 value = unpack_bf16(branches[i]);
          grad_gate.x += grad.x * value.x;
          grad_gate.y += grad.y * value.y;
          grad_branch.x += grad.x;
          grad_branch.y += grad.y;
          store_bf16_pair(branch.gradient + inside + line, {grad.x * gate.x, grad.y * gate.y});
        }
      }
    }
    if (through_norm) add_to(product_sum + column, product);
    if (through_norm) add_to(plain_sum + column, plain);
    if (to_branch) add_to(branch.grad_gate + column, grad_gate);
    if (to_branch && branch.plain) add_to(branch.plain + column, grad_branch);
  }
}

// TOP: to the last layer's MLP branch. MIDDLE: second norm, attention branch. BOTTOM: first norm, MLP branch
// of the layer below.
__device__ inline void stream_gradient(const Parameters& p, const Instruction& item, int32_t loop,
                                       const Kept& kept) {
  const bool through_norm = item.phase != kTop, first = item.phase == kBottom;
  const int norm = first ? 0 : 1, layer = first ? item.layer - 1 : item.layer;
  const float* const x = norm_input(p, item, loop, first);
  if (through_norm) {
    gather_rows(p, item, kept, x, p.grad_rows + p.token(item.sequence, 0) * Config::kHidden,
                affine_of(p, item, norm));
    meet<1>(Config::kComputeThreads);
  }
  const Branch branch(p, item, layer < 0 ? 0 : layer, item.phase == kMiddle ? 0 : 1);
  down_columns(p, item, kept, x, norm, through_norm, branch, layer >= 0);
}

}  // namespace backward

}  // namespace loopmdm
