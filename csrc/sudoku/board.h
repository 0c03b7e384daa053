// A Sudoku of size n = box_rows * box_cols (boxes of box_rows x box_cols cells), and a partly filled
// board kept as three free-digit masks per cell: what a cell may hold is row & column & box.
#pragma once

#include <cstdint>

namespace loopmdm::sudoku {

constexpr int kMaxSize = 9;
constexpr int kMaxCells = kMaxSize * kMaxSize;

using Mask = uint16_t;  // bit d-1 stands for digit d

struct Shape {
  int box_rows, box_cols, size, cells;
  Mask all;
  uint8_t row[kMaxCells], col[kMaxCells], box[kMaxCells];

  Shape(int box_rows, int box_cols);
};

struct Board {
  const Shape* shape;
  Mask row[kMaxSize], col[kMaxSize], box[kMaxSize];  // digits still free in each unit
  uint8_t digit[kMaxCells];                          // 0 = blank
  uint8_t blank[kMaxCells];                          // the blank cells, in any order
  int num_blank;

  explicit Board(const Shape& shape);

  // A board with these clues; returns false if two clues of one unit are equal.
  bool load(const uint8_t* clues);

  Mask candidates(int cell) const {
    return row[shape->row[cell]] & col[shape->col[cell]] & box[shape->box[cell]];
  }

  // Fills the blank cell that stands at `slot` of the list of blanks.
  void place(int slot, Mask bit) {
    const int cell = blank[slot];
    blank[slot] = blank[--num_blank];
    digit[cell] = static_cast<uint8_t>(__builtin_ctz(bit) + 1);
    row[shape->row[cell]] &= ~bit;
    col[shape->col[cell]] &= ~bit;
    box[shape->box[cell]] &= ~bit;
  }

  // Blanks a filled cell; it becomes the last of the list of blanks.
  void clear(int cell) {
    const Mask bit = static_cast<Mask>(1u << (digit[cell] - 1));
    blank[num_blank++] = static_cast<uint8_t>(cell);
    digit[cell] = 0;
    row[shape->row[cell]] |= bit;
    col[shape->col[cell]] |= bit;
    box[shape->box[cell]] |= bit;
  }
};

}  // namespace loopmdm::sudoku
