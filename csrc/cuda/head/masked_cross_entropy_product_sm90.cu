// The two products that follow the gradients of the logits G [r, V]: of the rows, G W [r, D], and of the
// weight, G^T h [V, D], with LOOPMDM_OF_WEIGHT; sums in fp32. The right operand is read along its outer
// dimension, and of the weight's gradient the left one too: nothing is transposed in memory. The bias's
// gradient, the sums of G's columns, is taken from the stages while they are multiplied.
#include "common/matrix_descriptor.h"
#include "cuda/tile/math.cuh"
#include "cuda/tile/stage_ring_sm90.cuh"

namespace loopmdm {

struct GradientProduct {
  static constexpr bool kOfWeight = LOOPMDM_OF_WEIGHT;
  static constexpr int kRows = 128, kColumns = 256, kStep = 64, kStages = 4;
  static constexpr int kComputeThreads = 256, kThreads = kComputeThreads + 128;
  static constexpr int kLeftBytes = 2 * kRows * kStep, kPanelBytes = 2 * 64 * kStep;
  static constexpr int kRightPanels = kColumns / 64, kStageBytes = kLeftBytes + kRightPanels * kPanelBytes;
  using Ring = StageRing<kStages, kStageBytes, kComputeThreads / 32, 2>;
};

struct MaskedCrossEntropyProductParameters {
  TensorMap left, right;  // [1, r, V]; [1, V, D] or [1, r, D], boxes of 64 by 64, of a left one by rows 128
  float* out;             // [rows, columns]
  float* bias_parts;      // of the weight: [4, rows up to whole pairs], sums over every fourth 16 of r
  int32_t tiles, rows, columns, column_tiles, steps, accumulate;
};

// Of a pair of blocks, which have the same columns and load half of the right operand each, for both.
struct GradientTile {
  int row, column;

  __device__ GradientTile(const MaskedCrossEntropyProductParameters& p, int32_t number)
      : row((2 * (number / p.column_tiles) + rank_in_cluster()) * GradientProduct::kRows),
        column(number % p.column_tiles * GradientProduct::kColumns) {}
};

__device__ inline void load_gradient_tiles(const MaskedCrossEntropyProductParameters& p,
                                           const GradientProduct::Ring& ring) {
  using Shape = GradientProduct;
  const bool leader = threadIdx.x % 32 == 0;
  RingPlace place{0, 0};
  for (int32_t number = blockIdx.x / 2; number < p.tiles; number += gridDim.x / 2) {
    const GradientTile tile(p, number);
    for (int step = 0; step < p.steps; ++step) {
      ring.wait_empty(place);
      if (leader) {
        const uint32_t stage = ring.stage(place), full = ring.full(place);
        const int inner = step * Shape::kStep;
        barrier_arrive_expect(full, Shape::kStageBytes);
        if (Shape::kOfWeight) {
          load_box(stage, &p.left, full, tile.row, inner, 0);
          load_box(stage + Shape::kPanelBytes, &p.left, full, tile.row + 64, inner, 0);
        } else {
          load_box(stage, &p.left, full, inner, tile.row, 0);
        }
        for (int i = 0; i < Shape::kRightPanels; i += 2) {
          const int panel = i + rank_in_cluster();
          load_box_for_all(stage + Shape::kLeftBytes + panel * Shape::kPanelBytes, &p.right, full,
                           tile.column + 64 * panel, inner, 0, 0b11);
        }
      }
      __syncwarp();
      Shape::Ring::next(place);
    }
  }
}

// The 16 rows of a stage that a warp adds up, two of the 64 columns of its warp group a lane.
__device__ inline void add_columns(float2& sum, uint32_t panel) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < 16; ++row) {
    const float2 pair = unpack_bf16(load_shared(panel + panel_offset(16 * warp + row, 2 * lane, 64, 2)));
    sum.x += pair.x;
    sum.y += pair.y;
  }
}

// Sums of the launches before are loaded 16 pairs at a time: a load cannot overtake the stores before it.
__device__ inline void store_tile(const float (&sums)[GradientProduct::kColumns / 2],
                                  const MaskedCrossEntropyProductParameters& p, GradientTile tile) {
  constexpr int kBatch = 16;
  const int thread = threadIdx.x % 128, group = warp_group();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile.row + 64 * group + fragment_row(thread, 2 * half);
    if (row >= p.rows) continue;
    const int first = tile.column + fragment_column(thread, 0);
    float* const line = p.out + static_cast<int64_t>(row) * p.columns + first;
#pragma unroll
    for (int batch = 0; batch < GradientProduct::kColumns / 8; batch += kBatch) {
      float2 old[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = 8 * (batch + i);
        old[i] = p.accumulate && first + column < p.columns ? load_pair(line + column) : make_float2(0, 0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = 8 * (batch + i), index = 4 * (batch + i) + 2 * half;
        const float2 sum = make_float2(old[i].x + sums[index], old[i].y + sums[index + 1]);
        if (first + column < p.columns) store_pair(line + column, sum);
      }
    }
  }
}

__device__ inline void multiply_gradient_tiles(const MaskedCrossEntropyProductParameters& p,
                                               const GradientProduct::Ring& ring) {
  using Shape = GradientProduct;
  const int group = warp_group();
  RingPlace place{0, 0};
  for (int32_t number = blockIdx.x / 2; number < p.tiles; number += gridDim.x / 2) {
    const GradientTile tile(p, number);
    const bool with_bias = Shape::kOfWeight && tile.column == 0;
    float sums[Shape::kColumns / 2];
    float2 bias = make_float2(0, 0);
    const auto multiply = [&](RingPlace at, int step) {
      const uint32_t stage = ring.stage(at);
#pragma unroll
      for (int k = 0; k < Shape::kStep / 16; ++k) {
        const uint32_t left = stage + group * Shape::kPanelBytes;
        WarpGroupProduct<Shape::kColumns>::template shared<Shape::kOfWeight, true>(
            sums,
            Shape::kOfWeight ? outer_major_descriptor(left, Shape::kPanelBytes, k)
                             : inner_major_descriptor(left, k),
            outer_major_descriptor(stage + Shape::kLeftBytes, Shape::kPanelBytes, k), step + k > 0);
      }
    };
    multiply_stages(sums, ring, place, p.steps, multiply, [&](RingPlace at) {
      if (with_bias) add_columns(bias, ring.stage(at) + group * Shape::kPanelBytes);
    });
    store_tile(sums, p, tile);
    if (with_bias) {
      const int64_t width = static_cast<int64_t>(p.tiles / p.column_tiles) * 2 * Shape::kRows;
      float* const part =
          p.bias_parts + threadIdx.x % 128 / 32 * width + tile.row + group * 64 + 2 * (threadIdx.x % 32);
      const float2 old = p.accumulate ? load_pair(part) : make_float2(0, 0);
      store_pair(part, make_float2(old.x + bias.x, old.y + bias.y));
    }
  }
}

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::GradientProduct::kThreads, 1)
    masked_cross_entropy_product_sm90(
        const __grid_constant__ loopmdm::MaskedCrossEntropyProductParameters p) {
  using namespace loopmdm;
  const GradientProduct::Ring ring(dynamic_shared_memory());
  if (threadIdx.x == 0) ring.initialise();
  GradientProduct::Ring::meet_all();
  load_and_compute<24>([&] { load_gradient_tiles(p, ring); }, [&] { multiply_gradient_tiles(p, ring); });
  GradientProduct::Ring::meet_all();
}
