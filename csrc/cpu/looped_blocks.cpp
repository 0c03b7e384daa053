#include "cpu/looped_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/folded.h"
#include "cpu/isa_table.h"
#include "cpu/threads.h"

namespace loopmdm::cpu {

LOOPMDM_DECLARE_KERNEL(LoopedBlocksKernel, looped_blocks_kernel)

namespace {

constexpr double kThreadWork = 5e5;  // multiply-adds of one block that pay for a thread
// The memory of one sequence at a time.
class SequenceMemory {
 public:
  SequenceMemory(const BlockShape& s, bool keep_old)
      : x_(zeroed<float>(s.length * s.hidden_padded)),
        queries_(zeroed<uint32_t>(s.length * s.hidden_words())),
        keys_(zeroed<uint32_t>(2 * s.key_size())),
        values_(zeroed<uint32_t>(2 * s.value_size())),
        bias_(aligned_buffer<float>(s.keys)),
        old_(keep_old ? zeroed<float>(s.length * s.hidden_padded) : nullptr),
        change_(keep_old ? zeroed<float>(2 * s.length) : nullptr) {
    state.x = x_.get();
    state.queries = queries_.get();
    for (int parity = 0; parity < 2; ++parity) {
      state.keys[parity] = keys_.get() + parity * s.key_size();
      state.values[parity] = values_.get() + parity * s.value_size();
    }
    old = old_.get();
    change = change_.get();
    bias = bias_.get();
  }

  SequenceState state{};
  float *old, *change, *bias;

 private:
  AlignedBuffer<float> x_;
  AlignedBuffer<uint32_t> queries_, keys_, values_;
  AlignedBuffer<float> bias_, old_, change_;
};

struct Rows {
  int64_t first, last, step;  // blocks of `step` rows
};

Rows rows_of(int64_t length, int index, int count) {
  const int64_t share = round_up((length + count - 1) / count, 2);
  const int64_t first = std::min(length, share * index), last = std::min(length, first + share);
  const int64_t blocks = std::max<int64_t>(1, (last - first + kBlockRows - 1) / kBlockRows);
  return {first, last, std::max<int64_t>(2, round_up((last - first + blocks - 1) / blocks, 6))};
}

class Run {
 public:
  Run(const LoopedBlocksProblem& p, const LoopedBlocksOutput& out, Isa isa)
      : p_(p),
        out_(out),
        kernel_(LOOPMDM_KERNEL(looped_blocks_kernel, isa)),
        shape_(block_shape(p, isa)),
        tape_bytes_(shape_.tape_bytes()),
        vectors_(p, shape_),
        exits_(p.exit_threshold >= 0) {}

  void go(int num_threads) {
    const double work = static_cast<double>(p_.batch * p_.length) * static_cast<double>(p_.hidden) *
                        static_cast<double>(4 * p_.hidden + 2 * p_.width);
    const int wanted =
        static_cast<int>(std::clamp(work / kThreadWork, 1.0, static_cast<double>(num_threads)));
    const int64_t bytes = round_up(kernel_.scratch_bytes(shape_), 64);
    const auto scratch = aligned_buffer<char>(bytes * wanted);
    std::vector<SequenceMemory> own;
    own.reserve(static_cast<size_t>(wanted));
    for (int i = 0; i < (p_.batch >= wanted ? wanted : 1); ++i) own.emplace_back(shape_, exits_);
    parallel(wanted, [&](Worker& worker) {
      void* mine = scratch.get() + worker.index * bytes;
      kernel_.clear_scratch(shape_, mine);
      // Each has a sequence to itself while there are enough; the last few are shared, row by row.
      const bool apart = static_cast<int>(own.size()) >= worker.count;
      const int64_t alone = apart ? p_.batch / worker.count * worker.count : 0;
      worker.share(alone, [&](int64_t sequence) {
        one_sequence(sequence, own[static_cast<size_t>(worker.index)], 0, 1, mine, [] {});
      });
      for (int64_t sequence = alone; sequence < p_.batch; ++sequence) {
        one_sequence(sequence, own[0], worker.index, worker.count, mine, [&] { worker.barrier(); });
        worker.barrier();
      }
    });
  }

 private:
  template <class Sync>
  void one_sequence(int64_t sequence, SequenceMemory& memory, int index, int count, void* scratch,
                    const Sync& sync) {
    const Rows rows = rows_of(p_.length, index, count);
    const int64_t loops = p_.num_loops[sequence], n = p_.num_blocks;
    if (index == 0) start(sequence, memory);
    sync();
    const SequenceState& state = memory.state;
    const float* x = p_.x + sequence * p_.length * p_.hidden;
    for (int64_t r = rows.first; r < rows.last; ++r)
      std::copy_n(x + r * p_.hidden, p_.hidden, state.x + r * shape_.hidden_padded);

    const auto for_row_blocks = [&](auto&& job) {
      for (int64_t r = rows.first; r < rows.last; r += rows.step) job(r, std::min(rows.step, rows.last - r));
    };
    const auto project = [&](int64_t application, int64_t first, int64_t rows_here) {
      const int64_t block = application % n;
      kernel_.project(shape_, p_.narrow, p_.blocks[block], vectors_.of(block, sequence), state,
                      tape_of(application, sequence), parity_of(application), first, rows_here, scratch);
    };
    int64_t loop = 0;
    for (bool going = loops > 0; going;) {
      if (loop == 0 || exits_)
        for_row_blocks([&](int64_t r, int64_t rows_here) { project(loop * n, r, rows_here); });
      if (exits_) keep(memory, rows);
      if (out_.loop_inputs)
        copy_rows(state, rows, out_.loop_inputs + (loop * p_.batch + sequence) * p_.length * p_.hidden);
      for (int64_t block = 0; block < n; ++block) {
        const int64_t application = loop * n + block;
        const bool last = block + 1 == n && (exits_ || loop + 1 == loops);
        sync();
        const Dropout dropout = dropout_of(p_, application);
        for_row_blocks([&](int64_t r, int64_t rows_here) {
          kernel_.finish(shape_, p_.narrow, p_.blocks[block], vectors_.of(block, sequence), state,
                         tape_of(application, sequence), parity_of(application), dropout, r, rows_here,
                         scratch);
          if (!last) project(application + 1, r, rows_here);
        });
      }
      ++loop;
      going = loop < loops;
      if (exits_) {
        measure(memory, rows);
        sync();
        going = going && !(relative_change(memory) < p_.exit_threshold);
        sync();
      }
    }
    copy_rows(state, rows, out_.x + sequence * p_.length * p_.hidden);
    if (index == 0) out_.loops_used[sequence] = loop;
  }

  static int parity_of(int64_t application) { return static_cast<int>(application % 2); }

  void start(int64_t sequence, SequenceMemory& memory) const {
    SequenceState& state = memory.state;
    state.cos = p_.cos;
    state.sin = p_.sin;
    state.first_element = sequence * p_.length * p_.hidden;
    state.key_bias = nullptr;
    if (needs_key_bias(p_, shape_)) {
      fill_key_bias(p_, shape_, sequence, memory.bias);
      state.key_bias = memory.bias;
    }
  }

  BlockTape tape_of(int64_t application, int64_t sequence) const {
    if (out_.tape == nullptr) return {};
    return shape_.tape_at(out_.tape + (application * p_.batch + sequence) * tape_bytes_);
  }

  void copy_rows(const SequenceState& state, const Rows& rows, float* to) const {
    for (int64_t r = rows.first; r < rows.last; ++r)
      std::copy_n(state.x + r * shape_.hidden_padded, p_.hidden, to + r * p_.hidden);
  }

  void keep(SequenceMemory& memory, const Rows& rows) const {
    const int64_t width = shape_.hidden_padded;
    std::copy_n(memory.state.x + rows.first * width, (rows.last - rows.first) * width,
                memory.old + rows.first * width);
  }

  void measure(SequenceMemory& memory, const Rows& rows) const {
    const int64_t width = shape_.hidden_padded;
    for (int64_t r = rows.first; r < rows.last; ++r)
      kernel_.row_change(memory.state.x + r * width, memory.old + r * width, width, memory.change + 2 * r,
                         memory.change + 2 * r + 1);
  }

  // ||H(k) - H(k-1)|| / ||H(k)||, rows added in order whoever computed them.
  double relative_change(const SequenceMemory& memory) const {
    double change = 0, size = 0;
    for (int64_t r = 0; r < p_.length; ++r) {
      change += memory.change[2 * r];
      size += memory.change[2 * r + 1];
    }
    return std::sqrt(change) / std::sqrt(size);
  }

  const LoopedBlocksProblem& p_;
  const LoopedBlocksOutput& out_;
  const LoopedBlocksKernel& kernel_;
  const BlockShape shape_;
  const int64_t tape_bytes_;
  const FoldedVectors vectors_;
  const bool exits_;
};

}  // namespace

BlockShape block_shape(const LoopedBlocksProblem& p, Isa isa) {
  const LinearKernel& linear = linear_kernel(isa);
  const int64_t head_dim = p.hidden / p.heads;
  return {.length = p.length,
          .hidden = p.hidden,
          .width = p.width,
          .heads = p.heads,
          .head_dim = head_dim,
          .hidden_padded = round_up(p.hidden, 2 * linear.lanes),
          .width_padded = round_up(p.width, 2 * linear.lanes),
          .head_width = round_up(head_dim, linear.lanes),
          .keys = round_up(p.length, linear.panel),
          .per_word = operands_per_word(linear, p.narrow)};
}

namespace {

BlockTape lay_out(const BlockShape& s, Layout& layout) {
  const int64_t row = s.length * s.hidden_words();
  BlockTape t;
  for (uint32_t** rows :
       {&t.normed1, &t.query, &t.key, &t.value, &t.mixed, &t.branch1, &t.normed2, &t.branch2})
    *rows = layout.take<uint32_t>(row);
  t.inner = layout.take<uint32_t>(s.length * s.width_words());
  t.scale1 = layout.take<float>(s.length);
  t.scale2 = layout.take<float>(s.length);
  t.log_sum_exp = layout.take<float>(s.heads * s.length);
  return t;
}

}  // namespace

int64_t BlockShape::tape_bytes() const {
  Layout layout(nullptr);
  lay_out(*this, layout);
  return layout.bytes();
}

BlockTape BlockShape::tape_at(char* memory) const {
  Layout layout(memory);
  return lay_out(*this, layout);
}

void looped_blocks(const LoopedBlocksProblem& problem, const LoopedBlocksOutput& out, Isa isa,
                   int num_threads) {
  if (out.tape) {
    const int64_t loops = *std::max_element(problem.num_loops, problem.num_loops + problem.batch);
    prefer_large_pages(out.tape,
                       loops * problem.num_blocks * problem.batch * block_shape(problem, isa).tape_bytes());
  }
  Run(problem, out, isa).go(num_threads);
}

}  // namespace loopmdm::cpu
