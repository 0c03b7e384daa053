#include "solver.h"

#include <algorithm>
#include <cmath>

namespace loopmdm::sudoku {
namespace {

bool single(Mask mask) { return (mask & (mask - 1)) == 0; }

// Which digits occur once, and which twice or more, among the candidates of a unit's blank cells.
struct Tally {
  Mask once[kMaxSize] = {}, twice[kMaxSize] = {};

  void add(int unit, Mask mask) {
    twice[unit] |= once[unit] & mask;
    once[unit] |= mask;
  }
  Mask unique(int unit) const { return once[unit] & ~twice[unit]; }
  bool misses(const Mask* free, int size) const {
    for (int unit = 0; unit < size; ++unit)
      if (once[unit] != free[unit]) return true;
    return false;
  }
};

enum class Step { kContradiction, kNothing, kProgress };

Step hidden_singles(Board& board) {
  const Shape& shape = *board.shape;
  Tally row, col, box;
  for (int slot = 0; slot < board.num_blank; ++slot) {
    const int cell = board.blank[slot];
    const Mask mask = board.candidates(cell);
    row.add(shape.row[cell], mask);
    col.add(shape.col[cell], mask);
    box.add(shape.box[cell], mask);
  }
  if (row.misses(board.row, shape.size) || col.misses(board.col, shape.size) ||
      box.misses(board.box, shape.size))
    return Step::kContradiction;
  Step step = Step::kNothing;
  for (int slot = board.num_blank - 1; slot >= 0; --slot) {
    const int cell = board.blank[slot];
    const Mask forced = board.candidates(cell) & (row.unique(shape.row[cell]) | col.unique(shape.col[cell]) |
                                                  box.unique(shape.box[cell]));
    if (!forced) continue;
    if (!single(forced)) return Step::kContradiction;
    board.place(slot, forced);
    step = Step::kProgress;
  }
  return step;
}

}  // namespace

bool naked_singles(Board& board) {
  for (bool progress = true; progress;) {
    progress = false;
    for (int slot = board.num_blank - 1; slot >= 0; --slot) {
      const Mask mask = board.candidates(board.blank[slot]);
      if (mask == 0) return false;
      if (!single(mask)) continue;
      board.place(slot, mask);
      progress = true;
    }
  }
  return true;
}

bool propagate(Board& board) {
  for (;;) {
    if (!naked_singles(board)) return false;
    const Step step = hidden_singles(board);
    if (step != Step::kProgress) return step == Step::kNothing;
  }
}

void Search::run(Board board) {
  if (!propagate(board)) return;
  if (board.num_blank == 0) {
    if (count++ == 0) std::copy_n(board.digit, board.shape->cells, solution);
    return;
  }
  int best_slot = 0, fewest = kMaxSize + 1;
  for (int slot = 0; slot < board.num_blank && fewest > 2; ++slot) {
    const int options = __builtin_popcount(board.candidates(board.blank[slot]));
    if (options < fewest) fewest = options, best_slot = slot;
  }
  ++branches;
  Mask bits[kMaxSize];
  int num_bits = 0;
  for (Mask mask = board.candidates(board.blank[best_slot]); mask; mask &= mask - 1)
    bits[num_bits++] = mask & -mask;
  if (random) random->shuffle(bits, num_bits);
  for (int i = 0; i < num_bits && count < limit; ++i) {
    Board child = board;
    child.place(best_slot, bits[i]);
    run(child);
  }
}

float difficulty(const Shape& shape, const uint8_t* clues) {
  Board board(shape);
  if (!board.load(clues)) return INFINITY;
  Board naked = board;
  if (naked_singles(naked) && naked.num_blank == 0) return 0;
  Search search;
  search.run(board);
  if (search.branches == 0) return 1;
  return 2 + std::log2(static_cast<float>(search.branches));
}

}  // namespace loopmdm::sudoku
