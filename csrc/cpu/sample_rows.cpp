#include "cpu/sample_rows.h"

#include <algorithm>
#include <limits>

#include "cpu/buffer.h"
#include "cpu/isa_table.h"
#include "cpu/threads.h"

namespace loopmdm::cpu {

LOOPMDM_DECLARE_KERNEL(SampleRowsKernel, sample_rows_kernel)

namespace {

constexpr int64_t kGroupRows = 4096;  // rows held as activations and partial statistics at one time
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
  if (p.num_rows == 0) return;
  const SampleRowsKernel& kernel = LOOPMDM_KERNEL(sample_rows_kernel, isa);
  const int64_t stride = (p.width + kActivationAlign - 1) / kActivationAlign * kActivationAlign;
  const int64_t num_chunks = (p.vocab_size + kChunkTokens - 1) / kChunkTokens;
  const int64_t group = std::min(kGroupRows, p.num_rows);
  const int64_t batches = (group + kBatchRows - 1) / kBatchRows;
  const double work = static_cast<double>(group) * static_cast<double>(p.vocab_size * stride);
  const int64_t useful = static_cast<int64_t>(std::max(1.0, work / kThreadWork));
  const int workers = static_cast<int>(std::min<int64_t>({num_threads, useful, batches * num_chunks}));

  const auto activations = aligned_buffer<float>(group * stride);
  const auto partial = aligned_buffer<RowStatistics>(group * num_chunks);  // [batch][chunk][row of the batch]
  const auto weight_tiles = aligned_buffer<float>(workers * kTileTokens * stride);
  const auto logits = aligned_buffer<float>(static_cast<int64_t>(workers) * kBatchRows * kTileTokens);

  for (int64_t first = 0; first < p.num_rows; first += kGroupRows) {
    const int64_t count = std::min(kGroupRows, p.num_rows - first);
    const int64_t num_batches = (count + kBatchRows - 1) / kBatchRows;
    const auto batch_rows = [&](int64_t batch) {
      return std::min<int64_t>(kBatchRows, count - batch * kBatchRows);
    };
    const auto activations_of = [&](int64_t batch) {
      return activations.get() + batch * kBatchRows * stride;
    };
    const auto partial_of = [&](int64_t batch, int64_t chunk) {
      return partial.get() + batch * kBatchRows * num_chunks + chunk * batch_rows(batch);
    };
    for_each_task(num_batches, std::min<int>(workers, num_batches), [&](int64_t batch, int) {
      const int64_t begin = first + batch * kBatchRows;
      kernel.prepare(p, begin, begin + batch_rows(batch), activations_of(batch));
    });
    for_each_task(num_batches * num_chunks, workers, [&](int64_t task, int worker) {
      // Consecutive tasks share a chunk of the weights.
      const int64_t batch = task % num_batches, chunk = task / num_batches;
      const int64_t begin = first + batch * kBatchRows;
      const SampleRowsScratch scratch = {
          weight_tiles.get() + worker * kTileTokens * stride,
          logits.get() + static_cast<int64_t>(worker) * kBatchRows * kTileTokens};
      kernel.scan(p, begin, begin + batch_rows(batch), activations_of(batch), chunk, scratch,
                  partial_of(batch, chunk));
    });
    for (int64_t i = 0; i < count; ++i) {
      const int64_t batch = i / kBatchRows, row = i % kBatchRows;
      RowStatistics stats = partial_of(batch, 0)[row];
      for (int64_t chunk = 1; chunk < num_chunks; ++chunk) merge(stats, partial_of(batch, chunk)[row]);
      write_result(p, stats, first + i, out);
    }
  }
}

}  // namespace loopmdm::cpu
