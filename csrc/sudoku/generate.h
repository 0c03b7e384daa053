// Random full grids, puzzles dug out of them, and random symmetries.
#pragma once

#include "board.h"
#include "random.h"

namespace loopmdm::sudoku {

enum class Split { kAny = -1, kTrain = 0, kTest = 1 };

struct PuzzleLaw {
  int fewest, most;  // the number of clues is aimed uniformly at [fewest, most]; both `cells`: full grids
  bool minimal;      // dig until no clue can go, whatever their number
  Split split;
};

// A random full grid.
void fill(const Shape& shape, Random& random, uint8_t* grid);

// Puzzle `index` of `seed`. False if no grid of the split gave a puzzle that meets the law.
bool generate(const Shape& shape, const PuzzleLaw& law, uint64_t seed, uint64_t index, uint8_t* clues,
              uint8_t* solution);

// A random image of a puzzle and its solution under digit relabelling, permutations of rows in bands,
// of bands, of columns in stacks, of stacks, and (square boxes) transposition. It stays in the train split.
void augment(const Shape& shape, Random& random, const uint8_t* clues, const uint8_t* solution,
             uint8_t* new_clues, uint8_t* new_solution);

}  // namespace loopmdm::sudoku
