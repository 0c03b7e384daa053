// Fork and join for the kernels. One region can hold many phases, with barriers between them.
//
// The threads are those torch's own operations run on: the OpenMP runtime that torch loaded is called by
// address, nothing is linked. A second set of threads would compete with torch's, which spin for milliseconds
// after each of its operations. Without such a runtime, in a forked child (where its threads do not exist)
// and with LOOPMDM_CPU_THREADS=std a region starts std::threads instead.
//
// Not for kernels: this instantiates the C++ library.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

namespace loopmdm::cpu {

// "libgomp.so.1" or another file name of an OpenMP runtime, or "std::thread": what the next region uses.
// Throws std::runtime_error if LOOPMDM_CPU_THREADS has a value other than "std".
std::string thread_runtime();

class Region;

// One of the threads of a region.
class Worker {
 public:
  Worker(Region& region, int index, int count) : index(index), count(count), region_(region) {}

  const int index;  // 0 is the thread that called parallel()
  const int count;  // of workers that really run: 1..num_threads, the same for all of them

  // Returns when all workers have called it; what each wrote before, all can read after.
  void barrier();

  // A phase of the region, which all workers call: runs job(task) once for each task in [0, num_tasks),
  // whoever is free taking the next, and returns when all are done.
  template <class Job>
  void share(int64_t num_tasks, Job&& job) {
    if (count == 1) {  // an atomic counter would wait for all that a task wrote
      for (int64_t task = 0; task < num_tasks; ++task) job(task);
      return;
    }
    for (int64_t task; (task = take_task()) < num_tasks;) job(task);
    barrier();
  }

  // For a phase whose workers hold several tasks at a time: 0, 1, 2, ... since the last barrier, which ends
  // it.
  int64_t take_task();

 private:
  Region& region_;
};

void run_region(int num_threads, void (*body)(void* context, Worker& worker), void* context);

// Runs body(Worker&) on up to num_threads threads at once, the caller being one. They compute with the
// caller's rounding and denormal modes. If a body throws, the others leave their next barrier by an exception
// too, and the first one is rethrown here when all have ended. Not to be called by a worker.
template <class Body>
void parallel(int num_threads, Body&& body) {
  using Callable = std::remove_reference_t<Body>;
  run_region(
      num_threads, [](void* context, Worker& worker) { (*static_cast<Callable*>(context))(worker); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

// A region of one phase: job(task, worker index).
template <class Job>
void for_each_task(int64_t num_tasks, int num_threads, Job&& job) {
  parallel(num_threads,
           [&](Worker& worker) { worker.share(num_tasks, [&](int64_t task) { job(task, worker.index); }); });
}

}  // namespace loopmdm::cpu
