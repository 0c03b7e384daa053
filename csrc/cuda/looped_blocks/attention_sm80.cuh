// Attention of 16 queries of one head by one warp, over blocks of keys: queries, scores, probabilities
// and sums in registers, as in FlashAttention-2 (Dao, 2023).
#pragma once

#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/product_sm80.cuh"
#include "cuda/tile/softmax.cuh"

namespace loopmdm {

// Stages of a tile: its queries, then keys and values of one block after another.
struct HeadRows {
  static constexpr int kWidth = Config::kHeadsPerTile * Config::kHeadDim, kChunks = kWidth / 8;
  static constexpr int kPanels = (kWidth + 63) / 64;
  static_assert(128 * kPanels * (Config::kKeyBlock > Config::kRows ? Config::kKeyBlock : Config::kRows) <=
                    Config::kStageBytes,
                "a stage holds a block of keys");

  const uint16_t* first;  // of the sequence's rows, at the tile's heads
  int row, length;

  __device__ void operator()(int number, uint32_t stage) const {
    constexpr int64_t kRow = 3 * Config::kHidden;
    const int block = (number - 1) / 2, key = block * Config::kKeyBlock;
    if (number == 0) {
      copy_rows<Config::kRows, kChunks>(stage, first + row * kRow, 2 * kRow, length - row);
    } else if (key < length) {
      const int column = number % 2 == 1 ? Config::kHidden : 2 * Config::kHidden;
      copy_rows<Config::kKeyBlock, kChunks>(stage, first + key * kRow + column, 2 * kRow, length - key);
    }
  }
};

// A head's columns in a stage of `rows` rows: the panel they begin in, and where in its rows, as the bytes to
// xor with an offset. Heads of 32 share a panel.
struct HeadPlace {
  uint32_t column;

  __device__ explicit HeadPlace(const Seat& seat) : column(seat.column_group * Config::kHeadDim) {}

  // Of the head's columns from 16 * step on.
  __device__ uint32_t panel(int step, int rows) const {
    return (Config::kHeadDim < 64 ? 0 : column / 64 + step / 4) * rows * kSwizzleRowBytes;
  }
  __device__ uint32_t bits(int step) const {
    return Config::kHeadDim < 64 ? 2 * column + 32 * step : 32 * (step % 4);
  }
};

// `when_read` is called when the last stage has been read.
template <class WhenRead>
__device__ void attention(const Parameters& p, const Instruction& item, int32_t loop, Stages stages,
                          const Seat& seat, const WhenRead& when_read) {
  using namespace attention_tile;
  const int lane = seat.thread % 32, slot = qkv_slot(item.read_slot, loop, Config::kLayers);
  const uint8_t* const key_mask = p.key_mask ? p.key_mask + p.token(item.sequence, 0) : nullptr;
  const float scale = kLog2E * rsqrtf(static_cast<float>(kHeadDim));
  const uint32_t row_place = row_operand_offset(lane), column_place = column_operand_offset(lane);
  const HeadPlace head(seat);
  const HeadRows load{p.qkv_values + p.token(slot * p.batch + item.sequence, 0) * (3 * Config::kHidden) +
                          item.column * HeadRows::kWidth,
                      item.row * Config::kRows, p.length};

  stages.begin(load);
  uint32_t queries[kHeadDim / 16][4];
  const uint32_t rows = stages.next(load) + (64 * seat.row_group + seat.thread / 32 * 16) * kSwizzleRowBytes;
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    load_matrices(queries[k], rows + head.panel(k, Config::kRows) + (row_place ^ head.bits(k)));
  }

  float mixed[kHeadDim / 2] = {};
  Running running;
#pragma unroll 1
  for (int key = 0; key < p.length; key += kKeys) {
    float scores[kKeys / 2] = {};
    const uint32_t keys = stages.next(load);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      multiply_columns<kKeys>(scores, queries[k], keys + head.panel(k, kKeys), column_place ^ head.bits(k));
    }
    if (key_mask || key + kKeys > p.length) mask_scores(scores, key_mask, key, p.length, seat);
    uint32_t weights[kKeys / 16][4];
    exponentials(scores, weights, running, mixed, scale);

    const uint32_t values = stages.next(load);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int columns = 0; columns < kHeadDim / 16; ++columns) {
        uint32_t right[4];
        load_transposed_matrices(right, values + head.panel(columns, kKeys) + 16 * kSwizzleRowBytes * k +
                                            (row_place ^ head.bits(columns)));
        multiply_add(&mixed[8 * columns], weights[k], right[0], right[1]);
        multiply_add(&mixed[8 * columns + 4], weights[k], right[2], right[3]);
      }
    }
  }
  when_read();
  divide_by_sums(mixed, running);
  store_bf16<kHeadDim>(mixed, p.mixed_values, Config::kHidden,
                       item.column * HeadRows::kWidth + static_cast<int>(head.column), p, item,
                       p.token(item.sequence, 0), seat);
}

}  // namespace loopmdm
