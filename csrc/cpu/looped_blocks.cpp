#include "cpu/looped_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/isa_table.h"
#include "cpu/threads.h"

namespace loopmdm::cpu {

LOOPMDM_DECLARE_KERNEL(LoopedBlocksKernel, looped_blocks_kernel)

namespace {

constexpr double kThreadWork = 5e5;  // multiply-adds of one block that pay for a thread
constexpr float kMaskedKey = -1e30f;
constexpr int kVectorsPerBlock = 6;  // shift, gain, gate of attention, then of the MLP

template <class T>
AlignedBuffer<T> zeroed(int64_t count) {
  auto buffer = aligned_buffer<T>(count);
  std::memset(buffer.get(), 0, static_cast<size_t>(count) * sizeof(T));
  return buffer;
}

// Modulation and biases of every block, padded and folded with the norms.
class FoldedVectors {
 public:
  FoldedVectors(const LoopedBlocksProblem& p, const BlockShape& s)
      : modulation_rows_(p.modulation_rows),
        hidden_(s.hidden_padded),
        width_(s.width_padded),
        modulation_(zeroed<float>(p.num_blocks * p.modulation_rows * kVectorsPerBlock * hidden_)),
        biases_(zeroed<float>(p.num_blocks * (hidden_ + width_))) {
    for (int64_t block = 0; block < p.num_blocks; ++block) {
      const BlockPointers& weights = p.blocks[block];
      float* bias = biases_.get() + block * (hidden_ + width_);
      std::copy_n(weights.mlp_in_bias, p.width, bias);
      std::copy_n(weights.mlp_out_bias, p.hidden, bias + width_);
      for (int64_t row = 0; row < p.modulation_rows; ++row) {
        const int64_t index = block * p.modulation_rows + row;
        const float* from = p.modulation + index * kVectorsPerBlock * p.hidden;
        float* to = modulation_.get() + index * kVectorsPerBlock * hidden_;
        for (int vector = 0; vector < kVectorsPerBlock; ++vector) {
          const float* norm = vector == 1 ? weights.norm1 : vector == 4 ? weights.norm2 : nullptr;
          for (int64_t i = 0; i < p.hidden; ++i) {
            const float value = from[vector * p.hidden + i];
            to[vector * hidden_ + i] = norm ? norm[i] * (1.0f + value) : value;
          }
        }
      }
    }
  }

  BlockVectors of(int64_t block, int64_t sequence) const {
    const int64_t row = modulation_rows_ == 1 ? 0 : sequence;
    const float* m = modulation_.get() + (block * modulation_rows_ + row) * kVectorsPerBlock * hidden_;
    const float* bias = biases_.get() + block * (hidden_ + width_);
    return {m,    m + hidden_,  m + 2 * hidden_, m + 3 * hidden_, m + 4 * hidden_, m + 5 * hidden_,
            bias, bias + width_};
  }

 private:
  int64_t modulation_rows_, hidden_, width_;
  AlignedBuffer<float> modulation_, biases_;
};

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
        vectors_(p, shape_),
        exits_(p.exit_threshold >= 0) {}

  void go(int num_threads) {
    const double work = static_cast<double>(p_.batch * p_.length) * static_cast<double>(p_.hidden) *
                        static_cast<double>(4 * p_.hidden + 2 * p_.width);
    const int wanted =
        static_cast<int>(std::clamp(work / kThreadWork, 1.0, static_cast<double>(num_threads)));
    const int64_t bytes = round_up(kernel_.scratch_bytes(shape_), 64);
    const auto scratch = aligned_buffer<char>(bytes * wanted);
    const bool some_alone = p_.batch >= wanted, some_shared = p_.batch % wanted != 0 || wanted == 1;
    std::vector<SequenceMemory> own;
    (void)some_shared;
    own.reserve(static_cast<size_t>(wanted));
    for (int i = 0; i < (some_alone ? wanted : 1); ++i) own.emplace_back(shape_, exits_);
    parallel(wanted, [&](Worker& worker) {
      void* mine = scratch.get() + worker.index * bytes;
      kernel_.clear_scratch(shape_, mine);
      const int64_t alone = p_.batch / worker.count * worker.count;
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
    const auto project = [&](int64_t block, int parity, int64_t first, int64_t rows_here) {
      kernel_.project(shape_, p_.narrow, p_.blocks[block], vectors_.of(block, sequence), state, parity, first,
                      rows_here, scratch);
    };
    int64_t loop = 0;
    for (bool going = true; going;) {
      if (loop == 0 || exits_)
        for_row_blocks([&](int64_t r, int64_t rows_here) { project(0, parity_of(loop * n), r, rows_here); });
      if (exits_) keep(memory, rows);
      for (int64_t block = 0; block < n; ++block) {
        const int64_t application = loop * n + block;
        const bool last = block + 1 == n && (exits_ || loop + 1 == loops);
        sync();
        const Dropout dropout = dropout_of(application);
        for_row_blocks([&](int64_t r, int64_t rows_here) {
          kernel_.finish(shape_, p_.narrow, p_.blocks[block], vectors_.of(block, sequence), state,
                         parity_of(application), dropout, r, rows_here, scratch);
          if (!last) project((block + 1) % n, parity_of(application + 1), r, rows_here);
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
    float* out = out_.x + sequence * p_.length * p_.hidden;
    for (int64_t r = rows.first; r < rows.last; ++r)
      std::copy_n(state.x + r * shape_.hidden_padded, p_.hidden, out + r * p_.hidden);
    if (index == 0) out_.loops_used[sequence] = loop;
  }

  static int parity_of(int64_t application) { return static_cast<int>(application % 2); }

  void start(int64_t sequence, SequenceMemory& memory) const {
    SequenceState& state = memory.state;
    state.cos = p_.cos;
    state.sin = p_.sin;
    state.first_element = sequence * p_.length * p_.hidden;
    state.key_bias = nullptr;
    if (p_.key_mask == nullptr && shape_.keys == p_.length) return;
    for (int64_t key = 0; key < shape_.keys; ++key) {
      const bool counts = key < p_.length && (!p_.key_mask || p_.key_mask[sequence * p_.length + key]);
      memory.bias[key] = counts ? 0.0f : kMaskedKey;
    }
    state.key_bias = memory.bias;
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

  Dropout dropout_of(int64_t application) const {
    const double threshold = std::nearbyint(static_cast<double>(p_.dropout) * 4294967296.0);
    return {static_cast<uint32_t>(std::min(threshold, 4294967295.0)),
            static_cast<float>(1 / (1 - p_.dropout)), p_.dropout_seed, static_cast<uint32_t>(application)};
  }

  const LoopedBlocksProblem& p_;
  const LoopedBlocksOutput& out_;
  const LoopedBlocksKernel& kernel_;
  const BlockShape shape_;
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

void looped_blocks(const LoopedBlocksProblem& problem, const LoopedBlocksOutput& out, Isa isa,
                   int num_threads) {
  Run(problem, out, isa).go(num_threads);
}

}  // namespace loopmdm::cpu
