#include "generate.h"

#include <algorithm>
#include <numeric>

#include "fingerprint.h"
#include "solver.h"

namespace loopmdm::sudoku {
namespace {

constexpr int kMaxGrids = 1 << 16;  // full grids tried for one puzzle before giving up

// Is `digit` forced at the blank `cell`, either as its only candidate or as a unit's only place for it?
bool forced(const Board& board, int cell, Mask digit) {
  if (board.candidates(cell) == digit) return true;
  const Shape& shape = *board.shape;
  bool row = true, col = true, box = true;
  for (int slot = 0; slot < board.num_blank; ++slot) {
    const int other = board.blank[slot];
    if (other == cell || !(board.candidates(other) & digit)) continue;
    row &= shape.row[other] != shape.row[cell];
    col &= shape.col[other] != shape.col[cell];
    box &= shape.box[other] != shape.box[cell];
  }
  return row || col || box;
}

// The board had one solution before `cell` (the last blank) lost `digit`: has it still?
bool stays_unique(const Board& board, int cell, Mask digit) {
  if (forced(board, cell, digit)) return true;
  for (Mask others = board.candidates(cell) & ~digit; others; others &= others - 1) {
    Board child = board;
    child.place(board.num_blank - 1, others & -others);
    Search search;
    search.limit = 1;
    search.run(child);
    if (search.count) return false;
  }
  return true;
}

// Removes clues of a full grid in random order while the solution stays unique, down to `target` at
// best. One pass suffices: a clue that is needed now is needed with fewer clues too.
int dig(const Shape& shape, Random& random, int target, const uint8_t* solution, uint8_t* clues) {
  uint8_t order[kMaxCells];
  std::iota(order, order + shape.cells, uint8_t{0});
  random.shuffle(order, shape.cells);
  Board board(shape);
  board.load(solution);
  for (int i = 0; i < shape.cells && shape.cells - board.num_blank > target; ++i) {
    const int cell = order[i];
    const Mask digit = static_cast<Mask>(1u << (solution[cell] - 1));
    board.clear(cell);
    if (!stays_unique(board, cell, digit)) board.place(board.num_blank - 1, digit);
  }
  std::copy_n(board.digit, shape.cells, clues);
  return shape.cells - board.num_blank;
}

// source[i] = the line that comes to stand at i: groups permuted, and lines inside each group.
void permute_lines(Random& random, int groups, int per_group, int* source) {
  int group[kMaxSize], inside[kMaxSize];
  std::iota(group, group + groups, 0);
  random.shuffle(group, groups);
  for (int g = 0; g < groups; ++g) {
    std::iota(inside, inside + per_group, group[g] * per_group);
    random.shuffle(inside, per_group);
    std::copy_n(inside, per_group, source + g * per_group);
  }
}

}  // namespace

void fill(const Shape& shape, Random& random, uint8_t* grid) {
  // Boxes on the diagonal share no unit, so they start as independent permutations; at 4x4 half of these
  // starts cannot be completed.
  uint8_t digits[kMaxSize];
  std::iota(digits, digits + shape.size, uint8_t{1});
  for (Search search; search.count == 0;) {
    std::fill_n(grid, shape.cells, uint8_t{0});
    for (int k = 0; k < std::min(shape.box_rows, shape.box_cols); ++k) {
      random.shuffle(digits, shape.size);
      for (int i = 0; i < shape.size; ++i) {
        const int row = k * shape.box_rows + i / shape.box_cols,
                  col = k * shape.box_cols + i % shape.box_cols;
        grid[row * shape.size + col] = digits[i];
      }
    }
    Board board(shape);
    board.load(grid);
    random.shuffle(board.blank, board.num_blank);  // ties of the search fall on a random cell
    search.limit = 1;
    search.random = &random;
    search.run(board);
    std::copy_n(search.solution, shape.cells, grid);
  }
}

bool generate(const Shape& shape, const PuzzleLaw& law, uint64_t seed, uint64_t index, uint8_t* clues,
              uint8_t* solution) {
  Random random(seed, index);
  const int target = law.minimal ? 0 : law.fewest + random.below(law.most - law.fewest + 1);
  for (int attempt = 0; attempt < kMaxGrids; ++attempt) {
    fill(shape, random, solution);
    if (law.split != Split::kAny && in_test_split(grid_id(shape, solution)) != (law.split == Split::kTest))
      continue;
    const int num_clues = dig(shape, random, target, solution, clues);
    if (law.minimal || num_clues <= law.most) return true;
  }
  return false;
}

void augment(const Shape& shape, Random& random, const uint8_t* clues, const uint8_t* solution,
             uint8_t* new_clues, uint8_t* new_solution) {
  const int n = shape.size;
  do {
    int row[kMaxSize], col[kMaxSize];
    uint8_t digit[kMaxSize + 1];
    std::iota(digit, digit + n + 1, uint8_t{0});
    random.shuffle(digit + 1, n);
    permute_lines(random, n / shape.box_rows, shape.box_rows, row);
    permute_lines(random, n / shape.box_cols, shape.box_cols, col);
    const bool transpose = shape.box_rows == shape.box_cols && random.below(2);
    for (int r = 0; r < n; ++r)
      for (int c = 0; c < n; ++c) {
        const int from = transpose ? col[c] * n + row[r] : row[r] * n + col[c];
        new_clues[r * n + c] = digit[clues[from]];
        new_solution[r * n + c] = digit[solution[from]];
      }
    // The 9x9 id is the same for all images; elsewhere an image may be an exact test grid.
  } while (shape.size != kMaxSize && in_test_split(grid_id(shape, new_solution)));
}

}  // namespace loopmdm::sudoku
