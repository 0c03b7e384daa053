#include "board.h"

#include <algorithm>

namespace loopmdm::sudoku {

Shape::Shape(int box_rows_, int box_cols_)
    : box_rows(box_rows_),
      box_cols(box_cols_),
      size(box_rows_ * box_cols_),
      cells(size * size),
      all(static_cast<Mask>((1u << size) - 1)) {
  for (int cell = 0; cell < cells; ++cell) {
    const int r = cell / size, c = cell % size;
    row[cell] = static_cast<uint8_t>(r);
    col[cell] = static_cast<uint8_t>(c);
    box[cell] = static_cast<uint8_t>(r / box_rows * box_rows + c / box_cols);
  }
}

Board::Board(const Shape& shape_) : shape(&shape_), num_blank(shape_.cells) {
  std::fill_n(row, kMaxSize, shape->all);
  std::fill_n(col, kMaxSize, shape->all);
  std::fill_n(box, kMaxSize, shape->all);
  std::fill_n(digit, kMaxCells, uint8_t{0});
  for (int cell = 0; cell < shape->cells; ++cell) blank[cell] = static_cast<uint8_t>(cell);
}

bool Board::load(const uint8_t* clues) {
  *this = Board(*shape);
  for (int slot = shape->cells - 1; slot >= 0; --slot) {  // from the end: place() moves only later slots
    if (clues[slot] == 0) continue;
    const Mask bit = static_cast<Mask>(1u << (clues[slot] - 1));
    if (!(candidates(slot) & bit)) return false;
    place(slot, bit);
  }
  return true;
}

}  // namespace loopmdm::sudoku
