// Attention of 64 queries of one head by one warp group, over blocks of keys. Scores, probabilities and
// sums stay in registers. The groups multiply in turn: the exponentials of one run while the other
// multiplies.
#pragma once

#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/product_sm90.cuh"
#include "cuda/tile/softmax.cuh"
#include "cuda/tile/turns_sm90.cuh"

namespace loopmdm {

namespace attention_tile {

constexpr int kPanelSteps = kHeadPanelBytes / 32;  // of 16 columns
// The scores of the next keys are made in the turn of these keys' values: where registers suffice, and where
// there is more than one block of keys (64 are a block only where the sequence has no more).
constexpr bool kScoresAhead = kHeadDim < 128 && kKeys > 64;

// The queries as left operand: a stage is free again at once.
__device__ inline void load_queries(uint32_t (&queries)[kHeadDim / 16][4], uint32_t panels,
                                    const Seat& seat) {
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      const uint32_t offset =
          panel_offset(seat.row % Config::kRows + 8 * (reg & 1), 16 * k + operand_column(seat.thread, reg),
                       Config::kRows, 2, kHeadPanelBytes);
      queries[k][reg] = load_shared(panels + offset);
    }
  }
}

// A tile of queries by all keys; `finish` gets the sums of its output and what they are to be divided by.
template <class Launch, class Finish>
__device__ inline void attend(const Launch& p, const Instruction& item, const Ring& ring, RingPlace& place,
                              const Seat& seat, Finish finish) {
  const uint32_t panel = seat.column_group * kHeadPanels;  // of the heads in a stage
  const uint8_t* const key_mask = p.key_mask ? p.key_mask + p.token(item.sequence, 0) : nullptr;
  const float scale = kLog2E * rsqrtf(static_cast<float>(kHeadDim));

  uint32_t queries[kHeadDim / 16][4];
  ring.wait_full(place);
  load_queries(queries, ring.stage(place) + panel * Config::kRows * kHeadPanelBytes, seat);
  ring.release(place);
  Ring::next(place);

  const auto score = [&](float (&scores)[kKeys / 2]) {
    products_begin(scores, queries);
    const uint32_t keys = ring.stage(place) + panel * kKeys * kHeadPanelBytes;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      WarpGroupProduct<kKeys>::template registers<false>(
          scores, queries[k],
          inner_major_descriptor(keys + k / kPanelSteps * kKeys * kHeadPanelBytes, k % kPanelSteps,
                                 kHeadPanelBytes),
          k > 0);
    }
    products_commit();
  };
  const auto mix = [&](float (&mixed)[kHeadDim / 2], const uint32_t (&weights)[kKeys / 16][4], RingPlace at) {
    const uint32_t values = ring.stage(at) + panel * kKeys * kHeadPanelBytes;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      WarpGroupProduct<kHeadDim>::template registers<true>(
          mixed, weights[k], outer_major_descriptor(values, kKeys * kHeadPanelBytes, k, kHeadPanelBytes),
          true);
    }
    products_commit();
  };

  float mixed[kHeadDim / 2] = {}, scores[kKeys / 2];
  Running running;
  const Turns<(Config::kHeadsPerTile == Config::kColumnGroups)> turns;
  turns.begin();
  const auto only_scores = [&] {
    clear(scores);  // for the reason that product_sm90.cuh gives
    ring.wait_full(place);
    score(scores);
    turns.end();
    products_wait<0>();
    pin(scores);
  };
  if constexpr (kScoresAhead) only_scores();
#pragma unroll 1
  for (int key = 0; key < p.length; key += kKeys) {
    if constexpr (!kScoresAhead) only_scores();
    ring.release(place);
    Ring::next(place);
    if (key_mask || key + kKeys > p.length) mask_scores(scores, key_mask, key, p.length, seat);
    uint32_t weights[kKeys / 16][4];
    exponentials(scores, weights, running, mixed, scale);

    const bool last = key + kKeys >= p.length, ahead = kScoresAhead && !last;
    const RingPlace values = place;
    ring.wait_full(values);
    Ring::next(place);
    if (ahead) ring.wait_full(place);
    turns.begin();
    products_begin(mixed, weights);
    mix(mixed, weights, values);
    if (ahead) {
      score(scores);
      turns.end();
    } else if (last) {
      turns.end_last();
    }
    products_wait<0>();
    pin(mixed);
    if (kScoresAhead) pin(scores);
    ring.release(values);
  }
  finish(mixed, running);
}

}  // namespace attention_tile

__device__ inline void attention(const Parameters& p, const Instruction& item, const Ring& ring,
                                 RingPlace& place, const Seat& seat) {
  using namespace attention_tile;
  const int head = column_of(item) * Config::kHeadsPerTile + seat.column_group;
  attend(p, item, ring, place, seat, [&](float (&mixed)[kHeadDim / 2], const Running& running) {
    divide_by_sums(mixed, running);
    store_bf16<kHeadDim>(mixed, p.mixed_values, Config::kHidden, head * kHeadDim, p, item,
                         p.token(item.sequence, 0), seat);
  });
}

}  // namespace loopmdm
