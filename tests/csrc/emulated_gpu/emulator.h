// Runs a kernel on the CPU: every thread of every block is a fiber, and the instructions of
// csrc/cuda/ptx are emulated by what the PTX manual says of them. Loads arrive late and in random order,
// fibers take turns at random. A kernel in which every thread waits is found.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float atomicAdd(float* address, float value) {
  const float old = *address;
  *address += value;
  return old;
}
using std::min;

namespace emulator {

constexpr uint32_t kSharedBytes = 232448,
                   kSharedBase = 1024;  // where shared memory begins in its address space

constexpr size_t kStackBytes = 64 * 1024;

struct Barrier {
  int expected = 0, arrivals = 0;  // still to come in this round
  int64_t bytes = 0;               // that TMA still owes
  uint32_t round = 0;

  void settle() {
    if (arrivals == 0 && bytes == 0) {
      ++round;
      arrivals = expected;
    }
  }
};

// A meeting: the last of `number` threads to come does the work, then all go on.
struct Meeting {
  int come = 0;
  uint64_t round = 0;
  void* given[128];  // by the number of the thread in the group
};

struct Block {
  int index;
  std::vector<uint8_t> memory = std::vector<uint8_t>(kSharedBytes + 1024);
  uint8_t* shared;
  std::unordered_map<uint32_t, Barrier> barriers;
  std::vector<Meeting> warps = std::vector<Meeting>(12), groups = std::vector<Meeting>(3),
                       named = std::vector<Meeting>(3);

  explicit Block(int number) : index(number) {
    shared = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;
    memset(memory.data(), 0xFF, memory.size());  // NaN in every format
  }
};

// A group of copies that a thread has started and may wait for.
using Copies = std::vector<std::function<void()>>;

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on: without the system calls of swapcontext
  bool begun = false;
  std::deque<Copies> copies{1};                          // the last group is open
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // not cleared: most of it is never touched
  Block* block;
  int thread;
  std::function<bool()> waits_for;  // empty: can run
  bool done = false;
};

struct Load {
  Block* block;
  uint32_t barrier;
  std::function<int64_t()> copy;  // returns the bytes written
};

struct State {
  int threads;                                 // of a block
  int grid;                                    // blocks in all
  std::vector<std::unique_ptr<Block>> blocks;  // those that run at the same time
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Load> loads;
  Meeting cluster;
  ucontext_t start;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  std::function<void()> kernel;
  std::mt19937 random;
};
inline State* state = nullptr;
inline int64_t weight_bytes = 0;  // loaded by TMA in this run

inline Fiber& self() { return *state->current; }

inline void leave_fiber() {
  if (_setjmp(self().place) == 0) _longjmp(state->scheduler, 1);
}

inline void go_on(Fiber* fiber) {
  state->current = fiber;
  if (_setjmp(state->scheduler) != 0) return;
  if (fiber->begun) _longjmp(fiber->place, 1);
  fiber->begun = true;
  swapcontext(&state->start, &fiber->context);
}

inline void wait_until(std::function<bool()> condition) {
  if (condition()) return;
  self().waits_for = std::move(condition);
  leave_fiber();
}

inline Barrier& barrier(uint32_t address) { return self().block->barriers.at(address); }

// The swizzle is of addresses: bits 4-6, or as many as rows of 64 or 32 bytes have, by those from bit 7 on.
inline uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

inline uint8_t* shared_byte(uint32_t address) { return self().block->shared + (address - kSharedBase); }

// All `number` threads give a pointer; the last to come calls `work` with all of them.
template <class Work>
void meet(Meeting& meeting, int number, int place, void* given, Work work) {
  const uint64_t round = meeting.round;
  meeting.given[place] = given;
  if (++meeting.come == number) {
    work(meeting.given);
    meeting.come = 0;
    ++meeting.round;
  } else {
    wait_until([&meeting, round] { return meeting.round != round; });
  }
}

inline void enter_fiber() {
  state->kernel();
  self().done = true;
  leave_fiber();
}

// Blocks `first` to `last` of a grid. Returns whether all threads came to their end.
inline bool run_together(int first, int last, int grid, int threads, unsigned seed,
                         const std::function<void()>& kernel) {
  State here;
  state = &here;
  weight_bytes = 0;
  here.threads = threads;
  here.grid = grid;
  here.kernel = kernel;
  here.random.seed(seed);
  for (int number = first; number < last; ++number) {
    here.blocks.push_back(std::make_unique<Block>(number));
    for (int thread = 0; thread < threads; ++thread) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = here.blocks.back().get();
      fiber->thread = thread;
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.get();
      fiber->context.uc_stack.ss_size = kStackBytes;
      fiber->context.uc_link = nullptr;
      makecontext(&fiber->context, enter_fiber, 0);
      here.fibers.push_back(std::move(fiber));
    }
  }
  std::vector<Fiber*> running;
  for (auto& fiber : here.fibers) running.push_back(fiber.get());
  bool proceeded = true;
  while (!running.empty()) {
    // Some of the fibers in a row take a turn, so that warps get ahead of each other; all if those could not.
    const size_t first = here.random() % running.size();
    const size_t number = proceeded ? here.random() % running.size() + 1 : running.size();
    const bool all = number == running.size();
    proceeded = false;
    for (size_t i = 0; i < number; ++i) {
      Fiber* const fiber = running[(first + i) % running.size()];
      if (fiber->waits_for && !fiber->waits_for()) continue;
      fiber->waits_for = nullptr;
      go_on(fiber);
      proceeded = true;
    }
    running.erase(std::remove_if(running.begin(), running.end(), [](Fiber* fiber) { return fiber->done; }),
                  running.end());
    // Some of the loads arrive; all of them if nobody can do anything before.
    std::shuffle(here.loads.begin(), here.loads.end(), here.random);
    size_t arriving = proceeded ? here.random() % (here.loads.size() + 1) : here.loads.size();
    if (arriving == 0 && !proceeded && all) return false;
    for (; arriving > 0; --arriving) {
      Load load = std::move(here.loads.back());
      here.loads.pop_back();
      Barrier& waiting = load.block->barriers.at(load.barrier);
      waiting.bytes -= load.copy();
      waiting.settle();
    }
  }
  return here.loads.empty();
}

// A cooperative launch.
inline bool run(int num_blocks, int threads, unsigned seed, const std::function<void()>& kernel) {
  return run_together(0, num_blocks, num_blocks, threads, seed, kernel);
}

// A launch whose blocks know nothing of each other: some at a time.
inline bool run_apart(int num_blocks, int threads, unsigned seed, const std::function<void()>& kernel) {
  bool finished = true;
  for (int first = 0; first < num_blocks && finished; first += 4) {
    finished = run_together(first, min(first + 4, num_blocks), num_blocks, threads, seed, kernel);
  }
  return finished;
}

struct Number {
  int kind;
  operator unsigned() const {
    return kind == 0 ? self().thread : kind == 1 ? self().block->index : state->grid;
  }
};
struct Index {
  Number x;
};

}  // namespace emulator

inline emulator::Index threadIdx{{0}}, blockIdx{{1}}, gridDim{{2}};

inline void __syncwarp() {
  emulator::meet(emulator::self().block->warps[threadIdx.x / 32], 32, threadIdx.x % 32, nullptr,
                 [](void**) {});
}

inline void __syncthreads() {
  emulator::meet(emulator::self().block->named[0], emulator::state->threads, 0, nullptr, [](void**) {});
}

// `source`: from which lane a lane takes.
template <class T, class Source>
T exchange_in_warp(T value, Source source) {
  struct Exchange {
    T given, taken;
  } exchange{value, value};
  emulator::meet(
      emulator::self().block->warps[threadIdx.x / 32], 32, threadIdx.x % 32, &exchange, [source](void** all) {
        for (int lane = 0; lane < 32; ++lane) {
          static_cast<Exchange*>(all[lane])->taken = static_cast<Exchange*>(all[source(lane)])->given;
        }
      });
  return exchange.taken;
}

template <class T>
T __shfl_xor_sync(uint32_t, T value, int distance) {
  return exchange_in_warp(value, [distance](int lane) { return lane ^ distance; });
}

template <class T>
T __shfl_sync(uint32_t, T value, int from) {
  return exchange_in_warp(value, [from](int) { return from; });
}

inline bool __any_sync(uint32_t, bool value) {
  for (int distance = 16; distance > 0; distance /= 2) value |= __shfl_xor_sync(~0u, value, distance);
  return value;
}
