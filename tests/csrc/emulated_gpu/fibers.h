// Threads of a grid as fibers that take turns at random, and what happens beside them: loads and products.
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
#include <string>
#include <unordered_map>
#include <vector>

#include "known.h"

namespace emulator {

constexpr uint32_t kSharedBytes = 232448,
                   kSharedBase = 1024;  // where shared memory begins in its address space

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kNamed = 4;  // of the hardware's barriers: as many as the kernels use

// Who has stored, and in which time of its warp: for each four bytes of a page of global memory.
struct Tag {
  int32_t thread;  // -1: nothing
  uint32_t time;
};
struct Page {
  std::vector<Tag> tags = std::vector<Tag>(1024, Tag{-1, 0});
};

inline std::string fault;  // of this run

struct Barrier {
  int expected = 0, arrivals = 0;  // still to come in this round
  int64_t bytes = 0;               // that TMA still owes
  uint32_t round = 0;
  Known arriving, told;  // by arrivals of this round; by rounds that are over
  Tag initialised{-1, 0};
  bool fenced = false;  // its initialisation is known to bulk copies
  int first_clock = 0;
  uint32_t seen[kWarps] = {};  // when lanes of each warp saw the end of the round before

  void settle() {
    if (arrivals != 0 || bytes != 0) return;
    for (int warp = 0; warp < kWarps; ++warp) {
      // A lane that has not seen it by now would wait for the same parity again.
      if (seen[warp] > arriving.times[first_clock + warp]) fault = "a lane may miss a round of a barrier";
      seen[warp] = 0;
    }
    ++round;
    arrivals = expected;
    told.learn(arriving);
  }
};

// A meeting: the last of `number` threads to come does the work, then all go on.
struct Meeting {
  const char* name = "";      // of a warp: its instruction,
  uint64_t instructions = 0;  // and those before
  int come = 0, threads = 0;
  uint64_t round = 0;
  void* given[32];    // by lane
  Known together[2];  // of those who come, for even and odd rounds
};

struct Block;

// A product of 16 of the 64 rows of a warp group, by one of its warps.
struct Product {
  int lanes = 0;      // that have issued it
  float* values[32];  // of the lanes' sums
  uint32_t left[32][4];
  uint64_t left_descriptor, right_descriptor;
  bool add;
  void (*multiply)(const Product& product, const Block& block, int warp);
};

// Those of a warp that are not done. A product reads its operands and adds to its sums at a random moment
// after all lanes have issued it; what a warp issues stays in order.
struct WarpProducts {
  std::deque<Product> under_way;
  uint64_t done = 0;
  std::vector<uint32_t> waited;  // for each product, when its wait was over
};

// Shared memory in lines of 128 bytes: when each was last written by a copy and read by each warp.
constexpr uint32_t kLineBytes = 128, kLines = kSharedBytes / kLineBytes;
constexpr uint32_t kUnderWay = 0x80000000;  // a copy is; of a read: a product is, and its number
struct Lines {
  std::vector<uint32_t> written = std::vector<uint32_t>(kLines);
  std::vector<uint32_t> read[kWarps];

  Lines() {
    for (auto& times : read) times.resize(kLines);
  }
};

// What a thread may not touch: registers of products before number `end`.
struct SumsUnderWay {
  float* registers;
  int number;
  std::unique_ptr<float[]> values;
  uint64_t end;
};
struct OperandUnderWay {
  const uint32_t* registers;
  uint32_t words[4];
  uint64_t end;
};

struct ThreadProducts {
  uint64_t issued = 0;
  std::vector<std::pair<const uint8_t*, size_t>> fenced;  // registers, since the thread had them back
  std::deque<uint64_t> groups;                            // that no wait has covered, each by its end
  std::vector<SumsUnderWay> sums;
  std::vector<OperandUnderWay> operands;

  bool has_fenced(const void* registers, size_t bytes) const {
    const auto* const first = static_cast<const uint8_t*>(registers);
    return std::any_of(fenced.begin(), fenced.end(), [&](const auto& known) {
      return known.first <= first && first + bytes <= known.first + known.second;
    });
  }
};

struct Block {
  int index, first_clock, running = 0;  // threads that are not at their end
  std::vector<uint8_t> memory = std::vector<uint8_t>(kSharedBytes + 1024);
  uint8_t* shared;
  std::vector<uint32_t> reached;  // when warps of other blocks last reached into its shared memory
  Known at_end;                   // to any of its threads, when they ended
  std::vector<uint8_t> copied = std::vector<uint8_t>(kSharedBytes, 0xFF);  // without the stores of threads
  Lines lines;
  std::unordered_map<uint32_t, Barrier> barriers;
  std::vector<Meeting> warps = std::vector<Meeting>(kWarps), named = std::vector<Meeting>(kNamed);
  Meeting cluster;
  std::vector<WarpProducts> products = std::vector<WarpProducts>(kWarps);
  std::vector<std::pair<uint64_t, uint64_t>> descriptors[3];  // of all products of a warp group

  Block(int number, int clock) : index(number), first_clock(clock) {
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
  std::deque<Copies> copies{1};  // the last group is open
  std::vector<std::pair<uint32_t, uint32_t>>
      stored;  // of shared memory since the last proxy fence: where, bytes
  ThreadProducts products;
  uint64_t instructions = 0;                             // a hash of those that warps execute together
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // not cleared: most of it is never touched
  Block* block;
  int thread;
  std::function<bool()> waits_for;  // empty: can run
  bool done = false;
  int clock;                  // of its warp
  int number;                 // of all threads that run together
  uint64_t met[kNamed] = {};  // rounds of named barriers
  Known known;
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
  ucontext_t start;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  std::function<void()> kernel;
  std::mt19937 random;
  std::vector<uint32_t> now;  // of each clock
  std::unordered_map<uintptr_t, Page> pages;
  uintptr_t last_number = 0;  // of the page that was looked up last
  Page* last_page = nullptr;  // null: it has no tags
  std::unordered_map<const int32_t*, Known> signals;
};
inline State* state = nullptr;
inline int64_t weight_bytes = 0;  // loaded by TMA in this run

inline Fiber& self() { return *state->current; }

inline void leave_fiber() {
  if (_setjmp(self().place) == 0) _longjmp(state->scheduler, 1);
}

// Of the thread that runs; it does not go on.
[[noreturn]] inline void fail(const char* what) {
  fault = what;
  _longjmp(state->scheduler, 1);
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

// The swizzle is of addresses: bits 4-6, or as many as rows of 64 or 32 bytes have, by those from bit 7 on.
inline uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

inline uint8_t* shared_byte(uint32_t address) {
  if (address - kSharedBase >= kSharedBytes) fail("an address outside of shared memory");
  return self().block->shared + (address - kSharedBase);
}

// Whether a test has chosen this fault of those that it has planted in the source.
inline int chosen_fault = -1;
inline bool planted(int number) { return number == chosen_fault; }

// What others learn of the thread where they see its signal. Within a warp a signal of one lane stands for
// what all have done so far.
inline Known told() {
  Fiber& fiber = self();
  Known known = fiber.known;
  known.times[fiber.clock] = state->now[fiber.clock]++;
  return known;
}

// One of `number` threads has come; the last of them calls `work`.
template <class Work>
void come(Meeting& meeting, int number, Work work) {
  if (++meeting.come < number) return;
  work();
  meeting.come = 0;
  ++meeting.round;
}

// And waits for the others.
template <class Work>
void meet(Meeting& meeting, int number, Work work) {
  const uint64_t round = meeting.round;
  come(meeting, number, work);
  wait_until([&meeting, round] { return meeting.round != round; });
}

// What those who come to a meeting know together, with what the thread knows.
inline Known& tell(Meeting& meeting) {
  Known& together = meeting.together[meeting.round % 2];
  if (meeting.come == 0) {
    together = told();
  } else {
    together.learn(told());
  }
  return together;
}

// Waits for `number` threads, each of which then knows what all know.
inline void meet_and_tell(Meeting& meeting, int number) {
  const Known& together = tell(meeting);
  meet(meeting, number, [] {});
  self().known.learn(together);
}

// An instruction that all lanes of a warp must execute together; where they meet next they compare.
inline void executed_together(const char* name) {
  self().instructions = self().instructions * 31 + reinterpret_cast<uintptr_t>(name);
}

// A meeting of the lanes of a warp, by one instruction of this name.
inline Meeting& lanes_at(const char* name) {
  Fiber& fiber = self();
  Meeting& meeting = fiber.block->warps[fiber.thread / 32];
  if (meeting.come == 0) {
    meeting.name = name;
    meeting.instructions = fiber.instructions;
  }
  if (meeting.name != name) fail("lanes of a warp are at different instructions");
  if (meeting.instructions != fiber.instructions)
    fail("lanes of a warp have executed different instructions");
  return meeting;
}

// The lanes of a warp give a pointer each; the last to come calls `work` with all of them.
template <class Work>
void meet_in_warp(const char* name, void* given, Work work) {
  Meeting& meeting = lanes_at(name);
  meeting.given[self().thread % 32] = given;
  meet(meeting, 32, [&] { work(meeting.given); });
}

// The thread comes to one of the hardware's barriers, of which `threads` is a part of the instruction.
inline Meeting& come_to(int barrier, int threads) {
  Fiber& fiber = self();
  if (barrier < 0 || barrier >= kNamed) fail("a named barrier that is not there");
  Meeting& meeting = fiber.block->named[barrier];
  if (meeting.come == 0) meeting.threads = threads;
  if (threads % 32 != 0 || meeting.threads != threads)
    fail("threads name different numbers at a named barrier");
  if (fiber.met[barrier]++ != meeting.round) fail("other threads meet at a named barrier than before");
  return meeting;
}

inline void meet_at(int barrier, int threads) {
  executed_together("bar.sync");
  meet_and_tell(come_to(barrier, threads), threads);
}

// Without waiting for the others, and without what they know.
inline void arrive_at(int barrier, int threads) {
  executed_together("bar.arrive");
  Meeting& meeting = come_to(barrier, threads);
  tell(meeting);
  come(meeting, threads, [] {});
}

// Notes that the thread reaches into the shared memory of a block, which may end only when it knows that this
// is over.
inline void reach_into(Block& block) {
  if (&block == self().block) return;
  if (block.running == 0) fail("shared memory of a block that has ended");
  block.reached.resize(state->now.size());
  block.reached[self().clock] = state->now[self().clock];
}

inline void enter_fiber() {
  state->kernel();
  if (!self().products.sums.empty()) fail("a thread ends before its products");
  self().done = true;
  Block& block = *self().block;
  block.at_end.learn(self().known);
  if (--block.running > 0) leave_fiber();
  for (const Meeting& meeting : block.named) {
    if (meeting.come > 0) fail("threads have come to a named barrier where nobody meets them");
  }
  for (size_t i = 0; i < block.reached.size(); ++i) {
    if (block.reached[i] > block.at_end.times[i]) fail("a block may end while others reach into it");
  }
  leave_fiber();
}

// Products are done, all or some. Returns how many.
inline size_t multiply(bool all) {
  size_t number = 0;
  for (const auto& block : state->blocks) {
    for (size_t warp = 0; warp < block->products.size(); ++warp) {
      WarpProducts& products = block->products[warp];
      auto& waiting = products.under_way;
      if (waiting.empty() || (!all && state->random() % 2)) continue;
      size_t some = all ? waiting.size() : state->random() % (waiting.size() + 1);
      for (; some > 0 && waiting.front().lanes == 32; --some, ++number, ++products.done) {
        waiting.front().multiply(waiting.front(), *block, static_cast<int>(warp));
        waiting.pop_front();
      }
    }
  }
  return number;
}

// Whether all lanes of each warp, and all warps of each group, have done the same.
inline bool agreed() {
  for (const auto& fiber : state->fibers) {
    const auto& first = state->fibers[&fiber - state->fibers.data() - fiber->thread % 32];
    const auto& group = state->fibers[&fiber - state->fibers.data() - fiber->thread % 128];
    if (fiber->instructions != first->instructions || fiber->products.issued != group->products.issued)
      return false;
  }
  return true;
}

// Blocks `first` to `last` of a grid. Returns whether all threads came to their end.
inline bool run_together(int first, int last, int grid, int threads, unsigned seed,
                         const std::function<void()>& kernel) {
  State here;
  state = &here;
  weight_bytes = 0;
  fault.clear();
  here.threads = threads;
  here.grid = grid;
  here.kernel = kernel;
  here.random.seed(seed);
  here.now.assign((last - first) * kClocks, 1);
  for (int number = first; number < last; ++number) {
    here.blocks.push_back(std::make_unique<Block>(number, (number - first) * kClocks));
    for (int thread = 0; thread < threads; ++thread) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = here.blocks.back().get();
      fiber->thread = thread;
      ++fiber->block->running;
      fiber->clock = here.blocks.back()->first_clock + thread / 32;
      fiber->number = static_cast<int>(here.fibers.size());
      fiber->known = Known(here.now.size());
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
      if (!fault.empty()) return false;
      proceeded = true;
    }
    running.erase(std::remove_if(running.begin(), running.end(), [](Fiber* fiber) { return fiber->done; }),
                  running.end());
    // Some of the products are done and some of the loads arrive; all if nobody can do anything before.
    const bool multiplied = multiply(!proceeded) > 0;
    if (!fault.empty()) return false;
    std::shuffle(here.loads.begin(), here.loads.end(), here.random);
    size_t arriving = proceeded ? here.random() % (here.loads.size() + 1) : here.loads.size();
    if (arriving == 0 && !multiplied && !proceeded && all) {
      fault = "all threads wait";
      return false;
    }
    proceeded |= multiplied;
    for (; arriving > 0; --arriving) {
      Load load = std::move(here.loads.back());
      here.loads.pop_back();
      Barrier& waiting = load.block->barriers.at(load.barrier);
      waiting.bytes -= load.copy();
      const int clock = load.block->first_clock + kCopies;
      waiting.arriving.times[clock] = here.now[clock];
      waiting.settle();
      if (!fault.empty()) return false;
    }
  }
  if (!here.loads.empty()) fault = "loads arrive after the end";
  if (!agreed()) fault = "lanes of a warp, or warps of a group, have executed different instructions";
  return fault.empty();
}

// A cooperative launch.
inline bool run(int num_blocks, int threads, unsigned seed, const std::function<void()>& kernel) {
  return run_together(0, num_blocks, num_blocks, threads, seed, kernel);
}

// A launch whose blocks know nothing of each other: some at a time.
inline bool run_apart(int num_blocks, int threads, unsigned seed, const std::function<void()>& kernel) {
  bool finished = true;
  for (int first = 0; first < num_blocks && finished; first += 4) {
    finished = run_together(first, std::min(first + 4, num_blocks), num_blocks, threads, seed, kernel);
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
