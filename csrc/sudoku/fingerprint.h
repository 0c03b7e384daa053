// The identity of a solution grid, which alone decides the split it belongs to.
#pragma once

#include "board.h"

namespace loopmdm::sudoku {

// 9x9: a number that all 2 * 6^8 * 9! images of a grid under the Sudoku symmetry group share (and
// that nearly all inequivalent grids differ in). Other sizes: a hash of the exact grid.
uint64_t grid_id(const Shape& shape, const uint8_t* grid);

// One id in 16 belongs to the test split.
bool in_test_split(uint64_t id);

}  // namespace loopmdm::sudoku
