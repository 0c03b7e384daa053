// Constraint propagation (naked and hidden singles) and depth-first search on the cell with the
// fewest candidates.
#pragma once

#include "board.h"
#include "random.h"

namespace loopmdm::sudoku {

// Fills every cell that has one candidate left, and repeats. False on a contradiction.
bool naked_singles(Board& board);

// Naked singles, and every digit that has one place left in a unit. False on a contradiction.
bool propagate(Board& board);

struct Search {
  int limit = 2;                // stop after this many solutions
  Random* random = nullptr;     // try digits in random order; nullptr: ascending
  int count = 0;                // solutions found
  int64_t branches = 0;         // nodes at which a digit had to be guessed
  uint8_t solution[kMaxCells];  // the first one found

  void run(Board board);
};

// 0: naked singles alone solve it; 1: hidden singles as well; otherwise 2 + log2(b), b being the
// branching nodes of the complete search (the one that also proves the solution unique).
float difficulty(const Shape& shape, const uint8_t* clues);

}  // namespace loopmdm::sudoku
