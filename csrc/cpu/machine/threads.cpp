#include "cpu/machine/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <thread>
#include <vector>

namespace loopmdm::cpu {
namespace {

// Pauses (of some 10 ns) before a waiting worker offers its core to others. Offering it to an unrelated
// process is costly, so that is done late; not where the workers waited for need that core themselves.
constexpr int kSpins = 500, kSpinsIfCrowded = 100;

// Set in a child of fork, which inherits the OpenMP runtime's records of threads but not the threads.
std::atomic<bool> forked{false};

// Whether this process was forked and has not called exec since (PF_FORKNOEXEC of Linux): its parent may have
// had OpenMP threads before this library was loaded.
bool forked_before_load() {
  constexpr uint64_t kForkNoExec = 0x40;
  std::ifstream file("/proc/self/stat");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return false;
  // After the name: state, parent, group, session, terminal, terminal's group, flags.
  size_t at = name_end + 1;
  for (int field = 0; field < 7 && at != std::string::npos; ++field) at = text.find(' ', at + (field > 0));
  return at != std::string::npos && (std::strtoull(text.c_str() + at, nullptr, 10) & kForkNoExec) != 0;
}

const int num_cores = static_cast<int>(std::thread::hardware_concurrency());  // 0: unknown

const bool watching_forks = [] {
  forked = forked_before_load();
  return pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;
}();

// The entry points that compilers call for `#pragma omp parallel`; LLVM's and Intel's runtimes have them too.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* context, unsigned num_threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*thread_num)() = nullptr;
  std::string name;
};

template <class Function>
bool find_function(void* scope, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(scope, name));
  return function != nullptr;
}

bool find_openmp(void* scope, OpenMp& found) {
  if (!find_function(scope, "GOMP_parallel", found.parallel) ||
      !find_function(scope, "omp_get_max_threads", found.max_threads) ||
      !find_function(scope, "omp_get_num_threads", found.num_threads) ||
      !find_function(scope, "omp_get_thread_num", found.thread_num))
    return false;
  Dl_info info;
  const bool known = dladdr(reinterpret_cast<void*>(found.parallel), &info) != 0 && info.dli_fname != nullptr;
  const std::string path = known ? info.dli_fname : "OpenMP";
  found.name = path.substr(path.rfind('/') + 1);
  return true;
}

// The runtime to which torch's own calls go, found as the dynamic linker found it: first among the symbols
// that all libraries see (which a preloaded runtime leads), then in what torch depends on. Null: none.
const OpenMp* torch_openmp() {
  static const OpenMp openmp = [] {
    OpenMp found;
    if (find_openmp(RTLD_DEFAULT, found)) return found;
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
    if (torch != nullptr && find_openmp(torch, found)) return found;
    return OpenMp{};
  }();
  return openmp.name.empty() ? nullptr : &openmp;
}

// What the next region runs on; null: std::thread.
const OpenMp* chosen_openmp() {
  const char* choice = std::getenv("LOOPMDM_CPU_THREADS");
  if (choice != nullptr && *choice != '\0') {
    if (std::string(choice) == "std") return nullptr;
    throw std::runtime_error("LOOPMDM_CPU_THREADS: got '" + std::string(choice) +
                             "'; expected 'std' for threads of our own, or nothing for those of torch");
  }
  return forked ? nullptr : torch_openmp();
}

struct RegionFailed {};  // leaves a barrier that one of the workers will never reach

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

class Region {
 public:
  Region(void (*body)(void*, Worker&), void* context, int num_threads)
      : body_(body),
        context_(context),
        num_threads_(num_threads),
        spins_(num_threads > num_cores ? kSpinsIfCrowded : kSpins) {
    std::fegetenv(&environment_);
  }

  void run(const OpenMp* openmp) {
    openmp != nullptr ? run_on_openmp(*openmp) : run_on_own_threads();
    if (error_) std::rethrow_exception(error_);
  }

  void barrier(int workers) {
    const int64_t round = released_.load(std::memory_order_relaxed) + 1;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == round * workers) {
      next_task_.store(0, std::memory_order_relaxed);
      released_.store(round, std::memory_order_release);
      return;
    }
    const auto released = [&] { return released_.load(std::memory_order_acquire) >= round; };
    for (int i = 0; i < spins_; ++i) {
      if (released()) return;
      pause_briefly();
    }
    while (!released()) {
      if (failed_) throw RegionFailed{};
      std::this_thread::yield();
    }
  }

  int64_t take_task() { return next_task_.fetch_add(1, std::memory_order_relaxed); }

 private:
  static constexpr int kCacheLine = 64;

  void work(int index, int workers) noexcept {
    std::fenv_t own;
    if (index > 0) {
      std::fegetenv(&own);
      std::fesetenv(&environment_);
    }
    try {
      Worker worker(*this, index, workers);
      body_(context_, worker);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    if (index > 0) std::fesetenv(&own);
  }

  void run_on_openmp(const OpenMp& openmp) {
    struct Call {
      Region& region;
      const OpenMp& openmp;
    } call{*this, openmp};
    const auto body = [](void* context) {
      const auto [region, openmp] = *static_cast<Call*>(context);
      const int index = openmp.thread_num();
      const int workers = std::min(region.num_threads_, openmp.num_threads());
      if (index < workers) region.work(index, workers);
    };
    // libgomp ends the threads that a smaller team leaves over, and torch would have to start them again: so
    // ask for as many as torch does, of which some have nothing to do.
    const int team = std::max(num_threads_, openmp.max_threads());
    openmp.parallel(body, &call, static_cast<unsigned>(team), 0);
  }

  void run_on_own_threads() {
    std::atomic<int> workers{0};  // 0: not known yet
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<size_t>(num_threads_ - 1));
    try {
      for (int index = 1; index < num_threads_; ++index)
        helpers.emplace_back([this, &workers, index] {
          workers.wait(0);
          work(index, workers);
        });
    } catch (const std::exception&) {
      // The system grants no more threads; those at hand do all the work.
    }
    workers = static_cast<int>(helpers.size()) + 1;
    workers.notify_all();
    work(0, workers);
    for (std::thread& helper : helpers) helper.join();
  }

  void (*const body_)(void*, Worker&);
  void* const context_;
  const int num_threads_;
  const int spins_;
  std::fenv_t environment_;
  std::exception_ptr error_;  // of the worker that set failed_

  // Those who wait at the barrier read another cache line than the one on which the others arrive. The counts
  // only grow: there is nothing to put back between two rounds.
  alignas(kCacheLine) std::atomic<int64_t> released_{0};  // rounds completed
  std::atomic<bool> failed_{false};
  alignas(kCacheLine) std::atomic<int64_t> arrived_{0};
  alignas(kCacheLine) std::atomic<int64_t> next_task_{0};
};

void Worker::barrier() { region_.barrier(count); }

int64_t Worker::take_task() { return region_.take_task(); }

std::string thread_runtime() {
  const OpenMp* openmp = chosen_openmp();
  return openmp != nullptr ? openmp->name : "std::thread";
}

void run_region(int num_threads, void (*body)(void* context, Worker& worker), void* context) {
  const OpenMp* openmp = chosen_openmp();
  Region region(body, context, num_threads);
  if (num_threads > 1) return region.run(openmp);
  Worker caller(region, 0, 1);
  body(context, caller);
}

}  // namespace loopmdm::cpu
