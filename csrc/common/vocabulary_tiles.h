// Order of the tiles of a product of all rows by the whole vocabulary. A chunk is what one warp group reduces
// to one record of each row; it depends on nothing but the token, so a row does not depend on the others.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

constexpr int kChunkTokens = 256;
// Tiles of rows, or pairs of them, that meet a part of the weight before the next part: few enough for L2,
// many enough for the weight to be read from device memory once for all of them.
constexpr int kRowTilesTogether = 16;

struct VocabularyTile {
  int32_t row, column;
};

LOOPMDM_HD VocabularyTile vocabulary_tile(int32_t number, int32_t row_tiles, int32_t column_tiles) {
  const int32_t together = kRowTilesTogether * column_tiles;
  const int32_t first = number / together * kRowTilesTogether;
  const int32_t rows = row_tiles - first < kRowTilesTogether ? row_tiles - first : kRowTilesTogether;
  const int32_t inside = number % together;
  return {first + inside % rows, inside / rows};
}

}  // namespace loopmdm
