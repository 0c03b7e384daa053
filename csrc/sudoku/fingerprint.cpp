// The 9x9 fingerprint. Two parallel lines (rows or columns) define a permutation of the digits:
// what stands in one, to what stands beside it in the other. Relabelling digits conjugates it,
// permuting the positions leaves it alone, swapping the lines inverts it: its cycle type, and how each
// cycle spreads over the three boxes, never change. These labels of the 72 pairs start a colour
// refinement (1-WL) over lines, cells, boxes and digits in which every multiset enters as a sum of
// mixed words, so no order of lines, and neither rows nor columns, are preferred.
#include "fingerprint.h"

#include <algorithm>

#include "random.h"

namespace loopmdm::sudoku {
namespace {

constexpr int kSize = 9, kBand = 3, kRounds = 2;

struct Grid {
  uint8_t digit[2][kSize][kSize];  // [rows or columns][line][position], digits from 0

  explicit Grid(const uint8_t* cells) {
    for (int r = 0; r < kSize; ++r)
      for (int c = 0; c < kSize; ++c)
        digit[0][r][c] = digit[1][c][r] = static_cast<uint8_t>(cells[r * kSize + c] - 1);
  }
};

// The cycles of the permutation a -> b as a multiset of box spreads.
uint64_t pair_label(const uint8_t* a, const uint8_t* b) {
  uint8_t position[kSize];
  for (int i = 0; i < kSize; ++i) position[a[i]] = static_cast<uint8_t>(i);
  uint64_t label = 0;
  for (unsigned pending = (1u << kSize) - 1; pending;) {
    const int start = __builtin_ctz(pending);
    int spread[kBand] = {};
    int digit = start;
    do {
      pending &= ~(1u << digit);
      ++spread[position[digit] / kBand];
      digit = b[position[digit]];
    } while (digit != start);
    std::sort(spread, spread + kBand);
    label += mix(static_cast<uint64_t>(spread[0] * 100 + spread[1] * 10 + spread[2]) * kGolden);
  }
  return mix(label);
}

uint64_t class_fingerprint(const Grid& grid) {
  uint64_t label[2][kSize][kSize] = {};
  for (int side = 0; side < 2; ++side)
    for (int i = 0; i < kSize; ++i)
      for (int j = 0; j < i; ++j)
        label[side][i][j] = label[side][j][i] = pair_label(grid.digit[side][i], grid.digit[side][j]);

  uint64_t line[2][kSize] = {};
  uint64_t cell[kSize][kSize] = {};
  for (int round = 0; round < kRounds; ++round) {
    uint64_t next[2][kSize];
    for (int side = 0; side < 2; ++side) {
      for (int i = 0; i < kSize; ++i) {
        uint64_t bands = 0;
        for (int band = 0; band < kBand; ++band) {
          uint64_t sum = 0;
          for (int j = band * kBand; j < (band + 1) * kBand; ++j)
            if (j != i) sum += mix(line[side][j] ^ label[side][i][j]);
          bands += mix(band == i / kBand ? ~sum : sum);
        }
        uint64_t boxes = 0;
        for (int part = 0; part < kBand; ++part) {
          uint64_t sum = 0;
          for (int p = part * kBand; p < (part + 1) * kBand; ++p) sum += side ? cell[p][i] : cell[i][p];
          boxes += mix(sum);
        }
        next[side][i] = mix(line[side][i] + mix(bands + mix(boxes + kGolden)));
      }
    }
    std::copy_n(&next[0][0], 2 * kSize, &line[0][0]);

    uint64_t box[kSize] = {}, digit[kSize] = {};
    for (int r = 0; r < kSize; ++r)
      for (int c = 0; c < kSize; ++c) {
        cell[r][c] = mix(cell[r][c] + mix(line[0][r]) + mix(line[1][c]));
        box[r / kBand * kBand + c / kBand] += cell[r][c];
        digit[grid.digit[0][r][c]] += cell[r][c];
      }
    for (int r = 0; r < kSize; ++r)
      for (int c = 0; c < kSize; ++c)
        cell[r][c] =
            mix(cell[r][c] + mix(box[r / kBand * kBand + c / kBand]) + mix(~digit[grid.digit[0][r][c]]));
  }
  uint64_t sum = 0;
  for (int r = 0; r < kSize; ++r)
    for (int c = 0; c < kSize; ++c) sum += mix(cell[r][c]);
  return mix(sum);
}

}  // namespace

uint64_t grid_id(const Shape& shape, const uint8_t* grid) {
  if (shape.size == kSize) return class_fingerprint(Grid(grid));
  uint64_t hash = 0;
  for (int cell = 0; cell < shape.cells; ++cell) hash = mix(hash + kGolden + grid[cell]);
  return hash;
}

bool in_test_split(uint64_t id) { return mix(id + kGolden) >> 60 == 0; }

}  // namespace loopmdm::sudoku
