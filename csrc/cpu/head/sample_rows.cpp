#include "cpu/head/sample_rows.h"

#include <algorithm>
#include <limits>

#include "cpu/linear/linear.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {

constexpr int64_t kGroupRows = 4096;  // rows held as operands and partial statistics at one time
constexpr double kThreadWork = 1e5;   // multiply-adds that pay for another thread

void write_result(const SampleRowsProblem& p, RowStatistics stats, int64_t row, const SampleRowsOutput& out) {
  // Without a maximum or a winner (every logit NaN or -inf) the token is still a possible one.
  const int32_t fallback = p.excluded_token == 0 ? 1 : 0;
  if (stats.top1_token < 0) {
    stats.top1_token = fallback;
    stats.sum = std::numeric_limits<double>::quiet_NaN();
  }
  if (p.temperature == 0) {
    stats.race_token = stats.top1_token;
    stats.race_logit = stats.top1_logit;
  } else if (stats.race_token < 0) {
    stats.race_token = stats.top1_token;
    stats.race_logit = stats.top1_logit;
  }
  const RowResult result = finish(stats, stats.race_logit);
  out.token[row] = stats.race_token;
  out.log_prob[row] = result.log_prob;
  out.top1_token[row] = stats.top1_token;
  out.top1_prob[row] = result.top1_prob;
  out.top2_prob[row] = result.top2_prob;
  out.entropy[row] = result.entropy;
}

}  // namespace

void sample_rows(const SampleRowsProblem& p, const SampleRowsOutput& out, Isa isa, int num_threads) {
  const int64_t num_rows = p.head.num_rows;
  if (num_rows == 0) return;
  const SampleRowsKernel& kernel = sample_rows_kernel(isa);
  const int64_t words = operand_words(linear_kernel(isa), p.head.width, p.head.bf16);
  const int64_t group = std::min(kGroupRows, num_rows);
  const HeadTasks largest(group, p.head.vocab_size);
  const double work = static_cast<double>(group) * static_cast<double>(p.head.vocab_size * p.head.width);
  const int64_t useful = static_cast<int64_t>(std::max(1.0, work / kThreadWork));
  const int workers = static_cast<int>(std::min<int64_t>({num_threads, useful, largest.count()}));
  const int64_t row_scratch = p.head.width + kRowPadding;
  const int64_t scratch = round_up(kernel.logits_scratch(p.head, largest.batch_rows), kRowPadding);

  const auto operands = aligned_buffer<uint32_t>(group * words);
  const auto partial = aligned_buffer<RowStatistics>(largest.num_chunks * group);  // [chunk][row]
  const auto row_memory = aligned_buffer<float>(workers * row_scratch);
  const auto logits = aligned_buffer<float>(workers * scratch);
  const auto floors = aligned_buffer<float>(workers * group);

  for (int64_t first = 0; first < num_rows; first += kGroupRows) {
    const HeadTasks tasks(std::min(kGroupRows, num_rows - first), p.head.vocab_size);
    parallel(workers, [&](Worker& worker) {
      float* const worker_floors = floors.get() + worker.index * group;
      float* const worker_logits = logits.get() + worker.index * scratch;
      std::fill_n(worker_floors, tasks.num_rows, -std::numeric_limits<float>::infinity());
      worker.share(tasks.num_batches, [&](int64_t batch) {
        const int64_t row = tasks.first_row(batch);
        kernel.prepare(p.head, first + row, first + tasks.end_row(batch),
                       row_memory.get() + worker.index * row_scratch, operands.get() + row * words);
      });
      worker.share(tasks.count(), [&](int64_t task) {
        const int64_t row = tasks.first_row(tasks.batch(task));
        kernel.scan(p, first + row, first + tasks.end_row(tasks.batch(task)), operands.get() + row * words,
                    tasks.chunk(task), worker_logits, worker_floors + row,
                    partial.get() + tasks.chunk(task) * group + row);
      });
      worker.share(tasks.num_batches, [&](int64_t batch) {
        for (int64_t row = tasks.first_row(batch); row < tasks.end_row(batch); ++row) {
          RowStatistics stats = partial[row];
          for (int64_t chunk = 1; chunk < tasks.num_chunks; ++chunk)
            merge(stats, partial[chunk * group + row]);
          write_result(p, stats, first + row, out);
        }
      });
    });
  }
}

}  // namespace loopmdm::cpu
