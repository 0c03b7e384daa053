// The functions of csrc/common that device code uses, with C names for ctypes.
#include "common/fragment.h"
#include "common/matrix_descriptor.h"
#include "common/philox.h"
#include "common/race.h"
#include "common/row_statistics.h"
#include "common/schedule.h"
#include "common/swizzle.h"
#include "common/vocabulary_tiles.h"

using namespace loopmdm;

extern "C" {

uint32_t panel_offset_c(uint32_t row, uint32_t column, uint32_t rows, uint32_t bytes, uint32_t row_bytes) {
  return panel_offset(row, column, rows, bytes, row_bytes);
}

uint64_t inner_major_c(uint32_t panel, uint32_t step, uint32_t row_bytes, uint32_t apart) {
  return inner_major_descriptor(panel, step, row_bytes, apart);
}

uint64_t outer_major_c(uint32_t panel, uint32_t bytes, uint32_t step, uint32_t row_bytes) {
  return outer_major_descriptor(panel, bytes, step, row_bytes);
}

int fragment_row_c(int thread, int index) { return fragment_row(thread, index); }
int fragment_column_c(int thread, int index) { return fragment_column(thread, index); }
int operand_row_c(int thread, int reg) { return operand_row(thread, reg); }
int operand_column_c(int thread, int reg) { return operand_column(thread, reg); }
int stream_step_c(int thread, int step) { return stream_step(thread, step); }
int quad_word_c(int lane, int bit, int low) { return quad_word(lane, bit, low); }

void place_c(int64_t position, int32_t enter, int32_t loop, int32_t leave, int32_t loops, int32_t* out) {
  const Place place = place_of(position, {enter, loop, leave}, loops);
  out[0] = place.loop;
  out[1] = place.index;
}

int64_t first_leaving_c(int64_t position, int32_t enter, int32_t loop, int32_t leave, int32_t loops,
                        int32_t num_blocks) {
  return first_leaving(position, {enter, loop, leave}, loops, num_blocks);
}

int32_t generation_c(int32_t count, int32_t loop) { return generation(count, loop); }
int32_t stream_slot_c(int32_t slot, int32_t loop, int32_t kept) { return stream_slot(slot, loop, kept); }
int32_t qkv_slot_c(int32_t slot, int32_t loop, int32_t layers) { return qkv_slot(slot, loop, layers); }

// A producer and a consumer that share a ring of `slots` stages and two barriers a stage, as mbarriers
// behave: a wait for parity p passes when the round of parity p is complete. Each takes a step when `order`
// says so and it is not waiting. Returns the number of items the consumer took out of order, or -1 if one
// read a stage that was not full or filled one that was not empty.
int run_ring(uint32_t slots, int items, const uint8_t* order, int steps, int* taken) {
  uint32_t full[16] = {}, empty[16] = {};  // completed rounds
  int held[16];
  for (int& item : held) item = -1;
  RingPlace fill{0, 0}, drain{0, 0};
  int produced = 0, wrong = 0;
  *taken = 0;
  const auto complete = [](uint32_t rounds, uint32_t parity) { return (rounds & 1) != parity; };
  for (int step = 0; step < steps; ++step) {
    if (order[step] == 0 && produced < items && complete(empty[fill.slot], fill.round ^ 1)) {
      if (held[fill.slot] != -1) return -1;
      held[fill.slot] = produced++;
      ++full[fill.slot];
      advance(fill, slots);
    } else if (order[step] == 1 && complete(full[drain.slot], drain.round)) {
      if (held[drain.slot] == -1) return -1;
      wrong += held[drain.slot] != (*taken)++;
      held[drain.slot] = -1;
      ++empty[drain.slot];
      advance(drain, slots);
    }
  }
  return wrong;
}

void merge_parts(const float* parts, int number, float width, float* out) {
  PartSums sums;
  for (int i = 0; i < number; ++i) add_part(sums, {parts[2 * i], parts[2 * i + 1]}, width);
  out[0] = sums.mean;
  out[1] = variance(sums, width);
}

// As lanes of a quad do it.
void merge_quarters(const float* parts, int number, float width, float* out) {
  const int own = (number + 3) / 4;
  PartSums lanes[4];
  for (int part = 0; part < number; ++part) {
    add_part(lanes[part / own], {parts[2 * part], parts[2 * part + 1]}, width);
  }
  const PartSums sums =
      merge_sums(merge_sums(lanes[0], lanes[1], width), merge_sums(lanes[2], lanes[3], width), width);
  out[0] = sums.mean;
  out[1] = variance(sums, width);
}

int instruction_bytes() { return sizeof(Instruction); }

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
