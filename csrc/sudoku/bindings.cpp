// Python module loopmdm._sudoku: numpy arrays in and out; the package loopmdm.data.sudoku has checked them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "fingerprint.h"
#include "generate.h"
#include "solver.h"

namespace py = pybind11;

namespace loopmdm::sudoku {
namespace {

using Cells = py::array_t<uint8_t, py::array::c_style>;

Shape make_shape(int box_rows, int box_cols) {
  if (box_rows < 1 || box_cols < 1 || box_rows * box_cols > kMaxSize)
    throw std::invalid_argument("box_rows * box_cols must be in 1.." + std::to_string(kMaxSize));
  return Shape(box_rows, box_cols);
}

const uint8_t* rows_of(const Cells& array, const Shape& shape) {
  if (array.ndim() != 2 || array.shape(1) != shape.cells)
    throw std::invalid_argument("boards must have shape [N, " + std::to_string(shape.cells) + "]");
  return array.data();
}

Cells new_cells(py::ssize_t num, const Shape& shape) { return Cells({num, py::ssize_t{shape.cells}}); }

// Runs job(i) for i in [0, num) on `threads` threads without the GIL.
template <class Job>
void for_each(int64_t num, int threads, const Job& job) {
  py::gil_scoped_release release;
  constexpr int64_t kChunk = 16;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(kChunk)) < num;)
      for (int64_t i = begin; i < std::min(begin + kChunk, num); ++i) job(i);
  };
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system grants no more threads; those at hand do all the work.
  }
  work();
  for (auto& helper : helpers) helper.join();
}

py::tuple py_generate(int box_rows, int box_cols, uint64_t seed, uint64_t first, int64_t num, int fewest,
                      int most, bool minimal, int split, int threads) {
  const Shape shape = make_shape(box_rows, box_cols);
  const PuzzleLaw law{fewest, most, minimal, static_cast<Split>(split)};
  Cells clues = new_cells(num, shape), solutions = new_cells(num, shape);
  uint8_t *c = clues.mutable_data(), *s = solutions.mutable_data();
  std::atomic<bool> failed{false};
  for_each(num, threads, [&](int64_t i) {
    if (!failed && !generate(shape, law, seed, first + i, c + i * shape.cells, s + i * shape.cells))
      failed = true;
  });
  if (failed) throw std::invalid_argument("no puzzle with at most " + std::to_string(most) + " clues found");
  return py::make_tuple(clues, solutions);
}

py::tuple py_augment(int box_rows, int box_cols, const Cells& clues, const Cells& solutions, uint64_t seed,
                     int64_t num, int threads) {
  const Shape shape = make_shape(box_rows, box_cols);
  const uint8_t *c = rows_of(clues, shape), *s = rows_of(solutions, shape);
  const int pool = static_cast<int>(clues.shape(0));
  Cells new_clues = new_cells(num, shape), new_solutions = new_cells(num, shape);
  uint8_t *nc = new_clues.mutable_data(), *ns = new_solutions.mutable_data();
  for_each(num, threads, [&](int64_t i) {
    Random random(seed, static_cast<uint64_t>(i));
    const int64_t pick = random.below(pool);
    augment(shape, random, c + pick * shape.cells, s + pick * shape.cells, nc + i * shape.cells,
            ns + i * shape.cells);
  });
  return py::make_tuple(new_clues, new_solutions);
}

py::tuple py_solve(int box_rows, int box_cols, const Cells& clues, int limit, int threads) {
  const Shape shape = make_shape(box_rows, box_cols);
  const uint8_t* c = rows_of(clues, shape);
  const py::ssize_t num = clues.shape(0);
  Cells solutions = new_cells(num, shape);
  py::array_t<int32_t> counts(num);
  uint8_t* s = solutions.mutable_data();
  int32_t* count = counts.mutable_data();
  for_each(num, threads, [&](int64_t i) {
    Search search;
    search.limit = limit;
    Board board(shape);
    if (board.load(c + i * shape.cells)) search.run(board);
    count[i] = search.count;
    if (search.count)
      std::copy_n(search.solution, shape.cells, s + i * shape.cells);
    else
      std::fill_n(s + i * shape.cells, shape.cells, uint8_t{0});
  });
  return py::make_tuple(solutions, counts);
}

py::array_t<float> py_difficulty(int box_rows, int box_cols, const Cells& clues, int threads) {
  const Shape shape = make_shape(box_rows, box_cols);
  const uint8_t* c = rows_of(clues, shape);
  py::array_t<float> result(clues.shape(0));
  float* out = result.mutable_data();
  for_each(clues.shape(0), threads, [&](int64_t i) { out[i] = difficulty(shape, c + i * shape.cells); });
  return result;
}

py::array_t<uint64_t> py_grid_ids(int box_rows, int box_cols, const Cells& grids, int threads) {
  const Shape shape = make_shape(box_rows, box_cols);
  const uint8_t* g = rows_of(grids, shape);
  py::array_t<uint64_t> ids(grids.shape(0));
  uint64_t* out = ids.mutable_data();
  for_each(grids.shape(0), threads, [&](int64_t i) { out[i] = grid_id(shape, g + i * shape.cells); });
  return ids;
}

py::array_t<bool> py_in_test_split(const py::array_t<uint64_t, py::array::c_style>& ids) {
  py::array_t<bool> result(ids.size());
  bool* out = result.mutable_data();
  for (py::ssize_t i = 0; i < ids.size(); ++i) out[i] = in_test_split(ids.data()[i]);
  return result;
}

}  // namespace
}  // namespace loopmdm::sudoku

PYBIND11_MODULE(_sudoku, m) {
  namespace sudoku = loopmdm::sudoku;
  m.doc() = "Sudoku generator, solver and fingerprints; use loopmdm.data.sudoku.";
  m.def("generate", &sudoku::py_generate, py::arg("box_rows"), py::arg("box_cols"), py::kw_only(),
        py::arg("seed"), py::arg("first"), py::arg("num"), py::arg("fewest"), py::arg("most"),
        py::arg("minimal"), py::arg("split"), py::arg("threads"));
  m.def("augment", &sudoku::py_augment, py::arg("box_rows"), py::arg("box_cols"),
        py::arg("clues").noconvert(), py::arg("solutions").noconvert(), py::kw_only(), py::arg("seed"),
        py::arg("num"), py::arg("threads"));
  m.def("solve", &sudoku::py_solve, py::arg("box_rows"), py::arg("box_cols"), py::arg("clues").noconvert(),
        py::kw_only(), py::arg("limit"), py::arg("threads"));
  m.def("difficulty", &sudoku::py_difficulty, py::arg("box_rows"), py::arg("box_cols"),
        py::arg("clues").noconvert(), py::kw_only(), py::arg("threads"));
  m.def("grid_ids", &sudoku::py_grid_ids, py::arg("box_rows"), py::arg("box_cols"),
        py::arg("grids").noconvert(), py::kw_only(), py::arg("threads"));
  m.def("in_test_split", &sudoku::py_in_test_split, py::arg("ids").noconvert());
}
