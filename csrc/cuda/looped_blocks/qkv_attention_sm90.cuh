// QKV inside a tile of ATTENTION, of a narrow model and at most 128 tokens: a head of a whole sequence, from
// the stream. Each group of warps has 64 rows, of which it makes queries, which stay in registers, and keys
// and values, which both read from a stage that nothing is loaded to. The bits are those of the two phases.
#pragma once

#include "cuda/looped_blocks/attention_sm90.cuh"

namespace loopmdm {

namespace attention_tile {

// One operand of all keys.
constexpr uint32_t kHeadBytes = 2 * kKeys * kHeadDim;

// Sums of q, k and v of the group's rows, beside each other.
template <int kSums>
__device__ void project_rows(float (&sums)[kSums], const Parameters& p, const Instruction& item,
                             const Ring& ring, RingPlace& place, const Seat& seat, int32_t resident) {
  constexpr uint32_t kRight = 2 * kSums * 128;
  const RowScales rows = RowScales::load(p, item, p.statistics1, seat);
  const StreamReader reader(seat, affine_of(p, item, 0));
  clear(sums);
#pragma unroll 1
  for (int step = 0; step < Config::kHidden / Config::kStep; ++step) {
    uint32_t operands[4][4];
    StreamReader::Vectors vectors;
    reader.load_vectors(vectors, step * Config::kStep);
    const RingPlace weights = place;
    Ring::next(place);
    for (int group = 0; group < Config::kGroups; ++group) {
      ring.wait_full(place);
      if (group == seat.column_group) reader.read_stage(operands, ring.stage(place), vectors, rows);
      ring.release(place);
      Ring::next(place);
    }
    ring.wait_full(weights);
    const uint32_t right = ring.right(weights, 0, resident, step, kRight);
    products_begin(sums, operands);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      WarpGroupProduct<2 * kSums>::template registers<false>(sums, operands[k],
                                                             inner_major_descriptor(right, k), step + k > 0);
    }
    products_commit();
    products_wait<0>();
    pin(sums);
    ring.release(weights);
  }
}

// Rounded, where a product finds them as keys or values.
template <int kSums>
__device__ void store_head(const float* sums, uint32_t panel, const Seat& seat) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = seat.row + 8 * half;
#pragma unroll
    for (int group = 0; group < kSums / 16; ++group) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = sums + 16 * group + 4 * i + 2 * half;
        words[i] = pack_bf16(pair[0], pair[1]);
      }
      transpose_quad(words);
      if (row >= kKeys) continue;
      store_shared_four(
          panel + panel_offset(row, 32 * group + 8 * (seat.thread % 4), kKeys, 2, kHeadPanelBytes),
          make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

}  // namespace attention_tile

template <int kDim>
__device__ void qkv_attention(const Parameters& p, const Instruction& item, const Ring& ring,
                              RingPlace& place, int32_t resident) {
  using namespace attention_tile;
  static_assert(kDim <= 64 && 4 * kKeys * kDim <= Config::kStageBytes, "keys and values in a stage");
  static_assert(6 * kDim * Config::kStep <= Config::kStageBytes, "and the weights of a step");
  Seat seat;
  seat.row += 64 * seat.column_group;
  float sums[3 * kDim / 2];
  project_rows(sums, p, item, ring, place, seat, resident);
  float turned[kDim];  // queries and keys
#pragma unroll
  for (int i = 0; i < kDim; ++i) turned[i] = sums[i];
  if (p.cosines) rotate<2 * kDim>(turned, p, item, seat);

  ring.wait_full(place);
  const uint32_t keys = ring.stage(place), values = keys + kHeadBytes;
  store_head<kDim / 2>(turned + kDim / 2, keys, seat);
  store_head<kDim / 2>(sums + kDim, values, seat);
  shared_proxy_fence();
  meet_groups();

  uint32_t queries[kDim / 16][4];
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      const float* const pair = turned + 4 * (2 * k + (reg >> 1)) + 2 * (reg & 1);
      queries[k][reg] = pack_bf16(pair[0], pair[1]);
    }
  }
  float scores[kKeys / 2], mixed[kDim / 2] = {};
  clear(scores);
  products_begin(scores, queries);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    WarpGroupProduct<kKeys>::template registers<false>(
        scores, queries[k], inner_major_descriptor(keys, k, kHeadPanelBytes), k > 0);
  }
  products_commit();
  products_wait<0>();
  pin(scores);

  const uint8_t* const key_mask = p.key_mask ? p.key_mask + p.token(item.sequence, 0) : nullptr;
  if (key_mask || kKeys > p.length) mask_scores(scores, key_mask, 0, p.length, seat);
  Running running;
  uint32_t weights[kKeys / 16][4];
  exponentials(scores, weights, running, mixed, kLog2E * rsqrtf(static_cast<float>(kDim)));
  products_begin(mixed, weights);
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    WarpGroupProduct<kDim>::template registers<true>(
        mixed, weights[k], outer_major_descriptor(values, kHeadBytes, k, kHeadPanelBytes), true);
  }
  products_commit();
  products_wait<0>();
  pin(mixed);
  ring.release(place);
  Ring::next(place);
  divide_by_sums(mixed, running);
  store_bf16<kDim>(mixed, p.mixed_values, Config::kHidden, item.column * kDim, p, item,
                   p.token(item.sequence, 0), seat);
}

}  // namespace loopmdm
