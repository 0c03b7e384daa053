#include "cpu/head/head_logits.h"

#include <algorithm>

#if defined(__linux__)
#  include <sys/mman.h>
#endif

#include "cpu/linear/linear.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/isa_table.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

LOOPMDM_DECLARE_KERNEL(HeadLogitsKernel, head_logits_kernel)

namespace {
constexpr int64_t kGroupRows = 4096;  // rows held as operands at one time
constexpr double kThreadWork = 1e5;   // multiply-adds that pay for another thread

// Fresh memory of this size costs a page fault each 4 KB, up to a fifth of the whole time: asks for large
// pages.
void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}
}  // namespace

void head_logits(const HeadProblem& p, bool narrow_out, void* out, Isa isa, int num_threads) {
  if (p.num_rows == 0) return;
  const HeadLogitsKernel& kernel = LOOPMDM_KERNEL(head_logits_kernel, isa);
  const int64_t words = operand_words(linear_kernel(isa), p.width, p.narrow);
  const int64_t group = std::min(kGroupRows, p.num_rows);
  const HeadTasks largest(group, p.vocab_size);
  const double work = static_cast<double>(group) * static_cast<double>(p.vocab_size * p.width);
  const int64_t useful = static_cast<int64_t>(std::max(1.0, work / kThreadWork));
  const int workers = static_cast<int>(std::min<int64_t>({num_threads, useful, largest.count()}));
  const int64_t row_scratch = p.width + kRowPadding;
  const int64_t out_row = p.vocab_size * static_cast<int64_t>(narrow_out ? sizeof(uint16_t) : sizeof(float));

  const auto operands = aligned_buffer<uint32_t>(group * words);
  const auto row_memory = aligned_buffer<float>(workers * row_scratch);
  const auto sums = aligned_buffer<float>(workers * largest.batch_rows * kTileTokens);

  expect_writes(out, p.num_rows * out_row);
  for (int64_t first = 0; first < p.num_rows; first += kGroupRows) {
    const HeadTasks tasks(std::min(kGroupRows, p.num_rows - first), p.vocab_size);
    parallel(workers, [&](Worker& worker) {
      worker.share(tasks.num_batches, [&](int64_t batch) {
        const int64_t row = tasks.first_row(batch);
        kernel.prepare(p, first + row, first + tasks.end_row(batch),
                       row_memory.get() + worker.index * row_scratch, operands.get() + row * words);
      });
      worker.share(tasks.count(), [&](int64_t task) {
        const int64_t row = tasks.first_row(tasks.batch(task));
        kernel.project(p, operands.get() + row * words, tasks.end_row(tasks.batch(task)) - row,
                       tasks.chunk(task), sums.get() + worker.index * largest.batch_rows * kTileTokens,
                       narrow_out, static_cast<char*>(out) + (first + row) * out_row);
      });
    });
  }
}

}  // namespace loopmdm::cpu
