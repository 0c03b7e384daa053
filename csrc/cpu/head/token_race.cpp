#include "cpu/head/token_race.h"

#include <algorithm>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "cpu/head/sample_rows.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {

constexpr int64_t kGroupRows = 4096;  // rows held as operands at one time
constexpr double kThreadWork = 1e5;   // multiply-adds that pay for another thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int32_t winner(const TokenRaceProblem& p, RaceState& state) {
  if (p.rows->temperature == 0) state.token = state.top1_token;
  return state.token;
}

// All tokens, where none of the contenders reached anything: as `sample_rows` decides then.
void race_all(const TokenRaceProblem& p, const SampleRowsKernel& kernel, int64_t row,
              const uint32_t* operands, uint32_t* panel, RaceState& state) {
  const SampleRowsProblem& rows = *p.rows;
  std::vector<int32_t> tokens(static_cast<size_t>(rows.head.vocab_size));
  std::iota(tokens.begin(), tokens.end(), 0);
  if (rows.excluded_token >= 0) tokens.erase(tokens.begin() + rows.excluded_token);
  kernel.race_contenders(p, row, operands, tokens.data(), static_cast<int64_t>(tokens.size()), panel, state);
  if (winner(p, state) < 0) state.token = state.top1_token;
  if (state.token >= 0) return;
  state.token = rows.excluded_token == 0 ? 1 : 0;
  state.finite = false;
}

}  // namespace

void quantize_head(const LinearSource& head, bool bf16, const QuantizedHead& out, bool fresh, Isa isa,
                   int num_threads) {
  const QuantizedSize size(head.columns, head.depth);
  const SampleRowsKernel& kernel = sample_rows_kernel(isa);
  if (fresh) prefer_large_pages(out.bytes, size.total() * 4, true);
  for_each_task(size.tokens / linear_kernel(isa).panel, num_threads,
                [&](int64_t panel, int) { kernel.quantize_panel(head, bf16, panel, out); });
}

void sample_tokens(const TokenRaceProblem& p, int64_t* token, bool* finite, Isa isa, int num_threads) {
  const SampleRowsProblem& rows = *p.rows;
  const HeadProblem& head = rows.head;
  if (head.num_rows == 0) return;
  const SampleRowsKernel& kernel = sample_rows_kernel(isa);
  const LinearKernel& linear = linear_kernel(isa);
  const int64_t words = operand_words(linear, head.width, head.bf16);
  const int64_t byte_words = QuantizedSize(head.vocab_size, head.width).words;
  const int64_t group = std::min(kGroupRows, head.num_rows);
  const HeadTasks largest(group, head.vocab_size);
  const double work = static_cast<double>(group) * static_cast<double>(head.vocab_size * head.width);
  const int64_t useful = static_cast<int64_t>(std::max(1.0, work / kThreadWork));
  const int workers = static_cast<int>(std::min<int64_t>({num_threads, useful, largest.count()}));
  const int64_t row_scratch = head.width + kRowPadding;
  const int64_t scratch = largest.batch_rows * kTileTokens, most = largest.batch_rows * kChunkTokens;

  const auto operands = aligned_buffer<uint32_t>(group * words);
  const auto bytes = aligned_buffer<uint32_t>(group * byte_words);
  const auto bounds = aligned_buffer<RowBound>(group);
  const auto row_memory = aligned_buffer<float>(workers * row_scratch);
  const auto sums = aligned_buffer<float>(workers * scratch);
  const auto floors = aligned_buffer<float>(workers * group);
  const auto found = aligned_buffer<Contender>(workers * most);
  const auto panels = aligned_buffer<uint32_t>(workers * (head.width + 1) * linear.lanes);

  for (int64_t first = 0; first < head.num_rows; first += kGroupRows) {
    const HeadTasks tasks(std::min(kGroupRows, head.num_rows - first), head.vocab_size);
    std::vector<std::vector<Contender>> contenders(static_cast<size_t>(tasks.num_rows));
    std::vector<float> floor(static_cast<size_t>(tasks.num_rows), -kInfinity);
    std::mutex mutex;
    parallel(workers, [&](Worker& worker) {
      float* const own_floors = floors.get() + worker.index * group;
      Contender* const own = found.get() + worker.index * most;
      std::vector<Contender> kept;
      std::fill_n(own_floors, tasks.num_rows, -kInfinity);
      worker.share(tasks.num_batches, [&](int64_t batch) {
        const int64_t begin = tasks.first_row(batch), end = tasks.end_row(batch);
        kernel.prepare(head, first + begin, first + end, row_memory.get() + worker.index * row_scratch,
                       operands.get() + begin * words);
        for (int64_t row = begin; row < end; ++row)
          kernel.quantize_row(head, operands.get() + row * words, bytes.get() + row * byte_words,
                              bounds[row]);
      });
      const auto may_win = [&](const Contender& c) { return !(c.score < own_floors[c.row - first]); };
      worker.share(tasks.count(), [&](int64_t task) {
        const int64_t row = tasks.first_row(tasks.batch(task));
        const int64_t count =
            kernel.find_contenders(p, first + row, first + tasks.end_row(tasks.batch(task)),
                                   bytes.get() + row * byte_words, bounds.get() + row, tasks.chunk(task),
                                   sums.get() + worker.index * scratch, own_floors + row, own);
        std::copy_if(own, own + count, std::back_inserter(kept), may_win);
      });
      {
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t row = 0; row < tasks.num_rows; ++row)
          floor[static_cast<size_t>(row)] = std::max(floor[static_cast<size_t>(row)], own_floors[row]);
        for (const Contender& c : kept)
          if (may_win(c)) contenders[static_cast<size_t>(c.row - first)].push_back(c);
      }
      worker.barrier();
      uint32_t* const panel = panels.get() + worker.index * (head.width + 1) * linear.lanes;
      std::vector<int32_t> tokens;
      worker.share(tasks.num_rows, [&](int64_t row) {
        tokens.clear();
        for (const Contender& c : contenders[static_cast<size_t>(row)])
          if (!(c.score < floor[static_cast<size_t>(row)])) tokens.push_back(c.token);
        std::sort(tokens.begin(), tokens.end());
        RaceState state = {-kInfinity, kLowestFloat, -1, -1, true};
        const uint32_t* of_row = operands.get() + row * words;
        kernel.race_contenders(p, first + row, of_row, tokens.data(), static_cast<int64_t>(tokens.size()),
                               panel, state);
        if (winner(p, state) < 0) race_all(p, kernel, first + row, of_row, panel, state);
        token[first + row] = state.token;
        finite[first + row] = state.finite;
      });
    });
  }
}

}  // namespace loopmdm::cpu
