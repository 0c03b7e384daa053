// The functions of csrc/common that the kernels of the vocabulary head use, with C names for ctypes.
#include "common/philox.h"
#include "common/race.h"
#include "common/vocabulary_tiles.h"

using namespace loopmdm;

extern "C" {

float small_uniform() { return kSmallUniform; }
float small_race_time_c(float u) { return small_race_time(u); }
float uniform_coarse_c(uint32_t high) { return uniform_coarse(high); }
float uniform_refined_c(uint32_t high, uint32_t low) { return uniform_refined(high, low); }

void tile_c(int32_t number, int32_t row_tiles, int32_t column_tiles, int32_t* out) {
  const VocabularyTile tile = vocabulary_tile(number, row_tiles, column_tiles);
  out[0] = tile.row;
  out[1] = tile.column;
}
}
