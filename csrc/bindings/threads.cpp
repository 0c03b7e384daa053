#include "cpu/machine/threads.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/ops.h"
#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

// Each worker announces every round, meets the others at a barrier and counts the announcements it finds.
// Returns the counts, one a worker: rounds * workers, unless a barrier let somebody through too early. The
// worker `failing`, if there is one, throws in round rounds / 2.
std::vector<int64_t> debug_parallel(int num_threads, int64_t rounds, int failing) {
  check_num_threads(num_threads);
  const py::gil_scoped_release release;
  std::vector<int64_t> announced(static_cast<size_t>(num_threads), -1), seen(announced.size());
  int workers = 0;
  cpu::parallel(num_threads, [&](cpu::Worker& worker) {
    if (worker.index == 0) workers = worker.count;
    for (int64_t round = 0; round < rounds; ++round) {
      if (worker.index == failing && round == rounds / 2)
        throw std::runtime_error("debug_parallel: worker " + std::to_string(failing) + " fails");
      announced[worker.index] = round;
      worker.barrier();
      for (int other = 0; other < worker.count; ++other) seen[worker.index] += announced[other] == round;
      worker.barrier();
    }
  });
  seen.resize(static_cast<size_t>(workers));
  return seen;
}

// How often each task of every phase ran: 1, and in the order of the phases.
std::vector<int64_t> debug_share(int num_threads, int64_t num_tasks, int64_t phases) {
  const py::gil_scoped_release release;
  std::vector<int64_t> runs(static_cast<size_t>(num_tasks));
  cpu::parallel(num_threads, [&](cpu::Worker& worker) {
    for (int64_t phase = 0; phase < phases; ++phase)
      worker.share(num_tasks,
                   [&](int64_t task) { runs[static_cast<size_t>((task + phase) % num_tasks)] += 1; });
  });
  return runs;
}

}  // namespace

void bind_threads(py::module_& m) {
  m.def("thread_runtime", &cpu::thread_runtime);
  m.def("debug_parallel", &debug_parallel, py::arg("num_threads"), py::arg("rounds"),
        py::arg("failing") = -1);
  m.def("debug_share", &debug_share, py::arg("num_threads"), py::arg("num_tasks"), py::arg("phases"));
}

}  // namespace loopmdm
