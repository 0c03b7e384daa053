#include "cpu/head/head_logits.h"

#include <algorithm>

#include "cpu/linear/linear.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {
constexpr int64_t kGroupRows = 4096;  // rows held as operands at one time
constexpr double kThreadWork = 1e5;   // multiply-adds that pay for another thread
}  // namespace

void head_logits(const HeadProblem& p, bool bf16_out, void* out, Isa isa, int num_threads) {
  if (p.num_rows == 0) return;
  const HeadLogitsKernel& kernel = head_logits_kernel(isa);
  const int64_t words = operand_words(linear_kernel(isa), p.width, p.bf16);
  const int64_t group = std::min(kGroupRows, p.num_rows);
  const HeadTasks largest(group, p.vocab_size);
  const double work = static_cast<double>(group) * static_cast<double>(p.vocab_size * p.width);
  const int64_t useful = static_cast<int64_t>(std::max(1.0, work / kThreadWork));
  const int workers = static_cast<int>(std::min<int64_t>({num_threads, useful, largest.count()}));
  const int64_t row_scratch = p.width + kRowPadding;
  const int64_t scratch = round_up(kernel.logits_scratch(p, largest.batch_rows), kRowPadding);
  const int64_t out_row = p.vocab_size * static_cast<int64_t>(bf16_out ? sizeof(uint16_t) : sizeof(float));

  const auto operands = aligned_buffer<uint32_t>(group * words);
  const auto row_memory = aligned_buffer<float>(workers * row_scratch);
  const auto sums = aligned_buffer<float>(workers * scratch);

  prefer_large_pages(out, p.num_rows * out_row);
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
                       tasks.chunk(task), sums.get() + worker.index * scratch, bf16_out,
                       static_cast<char*>(out) + (first + row) * out_row);
      });
    });
  }
}

}  // namespace loopmdm::cpu
