// ATTN_OUT inside a tile of MLP_IN, of a narrow model whose blocks wait longer for each other than they
// compute: the attention output of the tile's rows, gate, residual, norm and modulation, then the tile's own
// product. Each group of warps has half of the columns. What the other one needs of them, statistics and left
// operands, goes through the stages of the tile's own product, where no rows are loaded to. The bits are
// those of the two phases.
#pragma once

#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/product_sm90.cuh"
#include "cuda/tile/turns_sm90.cuh"

namespace loopmdm {

namespace after_attn_out {

constexpr int kSteps = Config::kHidden / Config::kStep;
constexpr int kColumns = Config::kHidden / Config::kColumnGroups;  // of a group
constexpr int kBatch = Config::kPart / 8, kParts = kColumns / Config::kPart;
constexpr int kOperands = kColumns / 16, kOperandsOfStage = Config::kStep / 16;
constexpr uint32_t kOperandBytes = 16 * 128;                        // four words of each of a group's threads
constexpr uint32_t kStatistics = kOperandsOfStage * kOperandBytes;  // behind the operands of the first stage

// The stage so many steps further, where they are fewer than the ring has.
__device__ inline uint32_t stage_behind(const Ring& ring, RingPlace place, int steps) {
  const uint32_t slot = place.slot + steps;
  return ring.stage({slot < Config::kStages ? slot : slot - Config::kStages, 0});
}

__device__ inline uint32_t statistics_at(uint32_t stage, int part, int row) {
  return stage + kStatistics + (part * Config::kRows + row) * sizeof(PartStatistics);
}

// The group's columns of the new stream, in the place of the sums, and their statistics; the first of a row's
// tiles leaves them for MLP_OUT. Others read the old stream still.
__device__ inline void update(float (&sums)[kColumns / 2], const float2 (&old)[kColumns / 8][2],
                              const Parameters& p, const Instruction& item, const Seat& seat,
                              uint32_t statistics) {
  const int row = item.row * Config::kTileRows + seat.row;
  const int first = seat.column_group * kColumns + seat.column(0);
  const float* const gate = gate_of(p, item.layer, item.sequence, 0) + first;
  float* const middle = p.middle_values + p.token(item.sequence, row) * Config::kHidden + first;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float total[2] = {0, 0};
#pragma unroll
    for (int i = kBatch * part; i < kBatch * (part + 1); ++i) {
      const float2 gates = load_constant_pair(gate + 8 * i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const pair = &sums[4 * i + 2 * half];
        total[half] += add_gated(pair, old[i][half], gates, make_float2(0, 0));
        if (item.column == 0 && row + 8 * half < p.length)
          store_pair(middle + 8 * (half * Config::kHidden + i), {pair[0], pair[1]});
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const PartStatistics found = part_statistics(sums, kBatch * part, half, total[half]);
      if (seat.thread % 4 == 0) {
        store_shared_pair(statistics_at(statistics, kParts * seat.column_group + part, seat.row + 8 * half),
                          {found.mean, found.deviations});
      }
    }
  }
}

// Normalised, modulated and rounded, as left operands of both groups.
__device__ inline void make_operands(const float (&rows)[kColumns / 2], const Parameters& p,
                                     const Instruction& item, const Ring& ring, RingPlace place,
                                     const Seat& seat) {
  const uint32_t statistics = ring.stage(place);
  float2 norm[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    norm[half] = merged_norm(seat.thread, [&](int part) {
      return load_shared_pair(statistics_at(statistics, part, seat.row + 8 * half));
    });
  }
  const float4* const affine =
      affine_of(p, item, 1) + (seat.column_group * kColumns + operand_column(seat.thread, 0)) / 2;
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    uint32_t words[4];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const float4 vectors = __ldg(affine + 8 * k + 4 * upper);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const pair = &rows[4 * (2 * k + upper) + 2 * half];
        words[2 * upper + half] = modulated({pair[0], pair[1]}, norm[half].x, norm[half].y, vectors);
      }
    }
    const int operand = kOperands * seat.column_group + k;
    store_shared_four(stage_behind(ring, place, operand / kOperandsOfStage) +
                          operand % kOperandsOfStage * kOperandBytes + 16 * seat.thread,
                      make_uint4(words[0], words[1], words[2], words[3]));
  }
}

}  // namespace after_attn_out

// The sums of the tile's own product.
template <int kSums>
__device__ void product_after_attn_out(float (&sums)[kSums], const Parameters& p, const Instruction& item,
                                       int32_t loop, const Ring& ring, RingPlace& place, const Seat& seat,
                                       int32_t resident) {
  using namespace after_attn_out;
  static_assert(kSums > 0 && kSteps <= Config::kStages, "operands of all steps at once");
  const int64_t matrix = static_cast<int64_t>(p.batch) * p.length * Config::kHidden;
  const float* const source = p.stream_values + stream_slot(item.read_slot, loop, p.keep) * matrix +
                              seat.column_group * kColumns + seat.column(0);
  float2 old[kColumns / 8][2];  // loaded before the product, behind which it would be waited for
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = item.row * Config::kTileRows + seat.row + 8 * half;
    // Rows beyond the sequence read its first one and store nothing.
    const float* const line = source + p.token(item.sequence, row < p.length ? row : 0) * Config::kHidden;
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) old[i][half] = load_pair(line + 8 * i);
  }
  float rows[kColumns / 2];
  shared_product(rows, ring, place, seat, kSteps);

  RingPlace own = place;
  for (int step = 0; step < kSteps; ++step, Ring::next(own)) ring.wait_full(own);
  update(rows, old, p, item, seat, ring.stage(place));
  meet_groups();
  make_operands(rows, p, item, ring, place, seat);
  shared_proxy_fence();
  meet_groups();
  register_product(sums, ring, place, seat, resident, [&](uint32_t (&operand)[4][4], RingPlace at, int) {
#pragma unroll
    for (int k = 0; k < kOperandsOfStage; ++k) {
      const uint4 words = load_shared_four(ring.stage(at) + k * kOperandBytes + 16 * seat.thread);
      operand[k][0] = words.x;
      operand[k][1] = words.y;
      operand[k][2] = words.z;
      operand[k][3] = words.w;
    }
  });
}

}  // namespace loopmdm
