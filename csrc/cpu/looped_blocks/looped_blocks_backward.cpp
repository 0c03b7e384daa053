#include "cpu/looped_blocks/looped_blocks_backward.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/looped_blocks/folded.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {

// Fixed numbers: sums over rows are grouped by them, so they may not depend on the machine.
constexpr int64_t kTaskRows = 64;       // of one sequence
constexpr int64_t kWorkingRows = 1024;  // of whole sequences, at least one
constexpr int64_t kTaskColumns = 256;   // of either side of a weight gradient in one task
constexpr int kVectors = 6;

// What is summed over the rows of one task.
struct Sums {
  int64_t hidden, width;
  int64_t size() const { return (kVectors + 1) * hidden + width; }
  VectorSums at(float* memory) const {
    return {memory, memory + (kVectors + 1) * hidden, memory + kVectors * hidden};
  }
};

// Adds up how long each phase takes, where that is wanted.
class Laps {
 public:
  explicit Laps(int64_t* nanoseconds) : nanoseconds_(nanoseconds) {
    if (nanoseconds_) last_ = Clock::now();
  }

  void end(int phase) {
    if (nanoseconds_ == nullptr) return;
    const Clock::time_point now = Clock::now();
    nanoseconds_[phase] += std::chrono::nanoseconds(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  int64_t* nanoseconds_;
  Clock::time_point last_;
};

class Backward {
 public:
  Backward(const LoopedBlocksBackwardProblem& p, Isa isa)
      : p_(p),
        f_(p.forward),
        kernel_(looped_blocks_backward_kernel(isa)),
        panel_(linear_kernel(isa).panel),
        task_panels_(std::max<int64_t>(kTaskColumns / panel_, 1)),
        shape_(block_shape(f_, isa)),
        vectors_(f_, shape_),
        sums_{shape_.hidden_padded, shape_.width_padded},
        record_bytes_(shape_.record_bytes()),
        chunk_(std::clamp<int64_t>(kWorkingRows / f_.length, 1, f_.batch)),
        tasks_per_sequence_((f_.length + kTaskRows - 1) / kTaskRows),
        task_rows_(round_up((f_.length + tasks_per_sequence_ - 1) / tasks_per_sequence_, 2)),
        panel_rows_(round_up(f_.length, shape_.per_word)),
        qkv_padded_(round_up(3 * f_.hidden, 2 * linear_kernel(isa).lanes)),
        grad_x_(aligned_buffer<float>(chunk_ * f_.length * shape_.hidden_padded)),
        grad_mixed_(aligned_buffer<float>(chunk_ * f_.length * shape_.hidden_padded)),
        grad_qkv_(zeroed<uint32_t>(chunk_ * f_.length * qkv_padded_ / shape_.per_word)),
        partial_(aligned_buffer<float>(chunk_ * tasks_per_sequence_ * sums_.size())),
        panels_(
            aligned_buffer<uint32_t>(chunk_ * panel_rows_ / shape_.per_word *
                                         (6 * shape_.hidden_padded + 2 * shape_.width_padded + qkv_padded_) +
                                     64 * 8)),
        bias_(aligned_buffer<float>(f_.batch * shape_.keys)) {
    if (needs_key_bias(f_, shape_))
      for (int64_t sequence = 0; sequence < f_.batch; ++sequence)
        fill_key_bias(f_, shape_, sequence, bias_.get() + sequence * shape_.keys);
  }

  void go(int num_threads) {
    const int64_t bytes = round_up(kernel_.scratch_bytes(shape_), 64);
    const auto scratch = zeroed<char>(bytes * num_threads);
    const int64_t most = *std::max_element(f_.num_loops, f_.num_loops + f_.batch);
    parallel(num_threads, [&](Worker& worker) {
      void* mine = scratch.get() + worker.index * bytes;
      std::vector<bool> add(static_cast<size_t>(f_.num_blocks), p_.add);
      for (int64_t first = 0; first < f_.batch; first += chunk_) {
        const int64_t count = std::min(chunk_, f_.batch - first);
        worker.share(count, [&](int64_t slot) { read(first + slot, slot); });
        for (int64_t loop = most - 1; loop >= 0; --loop) {
          // Every worker keeps its own copy of the list: no one waits for another to write it.
          std::vector<int64_t> active;
          for (int64_t slot = 0; slot < count; ++slot)
            if (f_.num_loops[first + slot] > loop) active.push_back(slot);
          if (active.empty()) continue;
          for (int64_t block = f_.num_blocks - 1; block >= 0; --block) {
            application(worker, first, active, loop * f_.num_blocks + block, add[static_cast<size_t>(block)],
                        mine);
            add[static_cast<size_t>(block)] = true;
          }
        }
        worker.share(count, [&](int64_t slot) { write(first + slot, slot); });
      }
    });
  }

 private:
  struct Product {  // one weight gradient
    RowPanels left, right;
    int64_t out;
    float* gradient;
  };

  void application(Worker& worker, int64_t first, const std::vector<int64_t>& active, int64_t application,
                   bool add, void* scratch) {
    const int64_t block = application % f_.num_blocks, count = static_cast<int64_t>(active.size());
    const ApplicationPanels panels = panels_for(count);
    const Dropout dropout = dropout_of(f_, application);
    const auto sequence_of = [&](int64_t index) { return first + active[static_cast<size_t>(index)]; };
    const auto record_of = [&](int64_t index) {
      return shape_.record_at(p_.records + (application * f_.batch + sequence_of(index)) * record_bytes_);
    };
    // The rows of a task: a part of one sequence, or some short ones.
    const int64_t together = std::min(shape_.sequences_together(), ceil_divide(count, worker.count));
    const int64_t tasks = ceil_divide(count * tasks_per_sequence_, together);
    const auto for_rows = [&](auto&& job) {
      worker.share(tasks, [&](int64_t task) {
        std::vector<GradientSpan> spans;
        int64_t rows = 0;
        for (int64_t part = task * together;
             part < std::min(count * tasks_per_sequence_, (task + 1) * together); ++part) {
          const int64_t index = part / tasks_per_sequence_;
          const GradientRows at = rows_of(part, active);
          float* sums = partial_.get() + part * sums_.size();
          if (at.count <= 0)
            std::fill_n(sums, sums_.size(), 0.0f);
          else
            spans.push_back({at, vectors_.of(block, sequence_of(index)), record_of(index),
                             sequence_of(index) * f_.length * f_.hidden, sums_.at(sums)});
          rows += at.count;
        }
        if (!spans.empty()) job(GradientSpans{spans.data(), static_cast<int64_t>(spans.size()), rows});
      });
    };

    Laps laps(worker.index == 0 ? p_.nanoseconds : nullptr);
    for_rows([&](const GradientSpans& spans) {
      for (int64_t i = 0; i < spans.size; ++i) std::fill_n(spans.at[i].sums.modulation, sums_.size(), 0.0f);
      kernel_.finish(shape_, f_.bf16, p_.transposed[block], dropout, spans, panels, scratch);
    });
    laps.end(0);
    worker.share(count * f_.heads, [&](int64_t task) {
      const int64_t index = task / f_.heads;
      SequenceState state{};
      state.cos = f_.cos;
      state.sin = f_.sin;
      state.key_bias = needs_key_bias(f_, shape_) ? bias_.get() + sequence_of(index) * shape_.keys : nullptr;
      kernel_.head(shape_, f_.bf16, record_of(index), state, task % f_.heads,
                   rows_at(active[static_cast<size_t>(index)], index, 0, f_.length), scratch);
    });
    laps.end(1);
    for_rows([&](const GradientSpans& spans) {
      kernel_.project(shape_, f_.bf16, p_.transposed[block], spans, panels, scratch);
    });
    laps.end(2);

    const BlockGradients& out = p_.gradients[block];
    const Product products[] = {
        {panels.grad_branch2, panels.activated, f_.hidden, out.mlp_out},
        {panels.grad_mlp_in, panels.act2, f_.width, out.mlp_in},
        {panels.grad_branch1, panels.mixed, f_.hidden, out.attn_out},
        {panels.grad_qkv, panels.act1, 3 * f_.hidden, out.qkv},
    };
    int64_t weight_tasks = 0;
    for (const Product& product : products) weight_tasks += tasks_of(product);
    worker.share(weight_tasks + 1, [&](int64_t task) {
      if (task == weight_tasks) return add_vectors(first, active, out);
      for (const Product& product : products) {
        if (task < tasks_of(product)) {
          const int64_t out_panels = ceil_divide(product.out, panel_);
          const int64_t groups = ceil_divide(out_panels, task_panels_);
          kernel_.weight(f_.bf16, product.left, product.out, range(task % groups, out_panels), product.right,
                         range(task / groups, panel_count(product.right)), product.gradient, add);
          return;
        }
        task -= tasks_of(product);
      }
    });
    laps.end(3);
  }

  static int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
  int64_t panel_count(const RowPanels& panels) const { return ceil_divide(panels.columns, panel_); }
  int64_t tasks_of(const Product& product) const {
    return ceil_divide(panel_count(product.right), task_panels_) *
           ceil_divide(ceil_divide(product.out, panel_), task_panels_);
  }
  PanelRange range(int64_t group, int64_t end) const {
    return {group * task_panels_, std::min(end, (group + 1) * task_panels_)};
  }

  // Operands of the weight gradients over `count` sequences.
  ApplicationPanels panels_for(int64_t count) const {
    const int64_t words = count * panel_rows_ / shape_.per_word;
    uint32_t* at = panels_.get();
    const auto take = [&](int64_t columns) {
      const RowPanels panels = {at, columns, words};
      at += columns * words;
      return panels;
    };
    const int64_t d = shape_.hidden_padded, f = shape_.width_padded;
    ApplicationPanels p;
    p.grad_branch2 = take(d);
    p.activated = take(f);
    p.grad_mlp_in = take(f);
    p.act2 = take(d);
    p.grad_branch1 = take(d);
    p.mixed = take(d);
    p.grad_qkv = take(qkv_padded_);
    p.act1 = take(d);
    return p;
  }

  GradientRows rows_at(int64_t slot, int64_t index, int64_t first, int64_t count) const {
    const int64_t row = index * f_.length + first;
    return {.first = first,
            .count = count,
            .panel_row = index * panel_rows_ + first,
            .grad_x = grad_x_.get() + (slot * f_.length + first) * shape_.hidden_padded,
            .grad_mixed = grad_mixed_.get() + row * shape_.hidden_padded,
            .grad_qkv = grad_qkv_.get() + row * qkv_padded_ / shape_.per_word};
  }

  GradientRows rows_of(int64_t task, const std::vector<int64_t>& active) const {
    const int64_t index = task / tasks_per_sequence_;
    const int64_t first = task % tasks_per_sequence_ * task_rows_;
    return rows_at(active[static_cast<size_t>(index)], index, first, std::min(task_rows_, f_.length - first));
  }

  // Adds the sums of the tasks, in order: first among themselves, in double precision.
  void add_vectors(int64_t first, const std::vector<int64_t>& active, const BlockGradients& out) const {
    std::vector<double> total(static_cast<size_t>(sums_.size()));
    const auto add = [&](int64_t from, int64_t count, float* to) {
      for (int64_t i = 0; i < count; ++i) to[i] += static_cast<float>(total[static_cast<size_t>(from + i)]);
    };
    const int64_t count = static_cast<int64_t>(active.size());
    for (int64_t index = 0; index < count; ++index) {
      const float* sums = partial_.get() + index * tasks_per_sequence_ * sums_.size();
      for (int64_t task = 0; task < tasks_per_sequence_; ++task)
        for (int64_t i = 0; i < sums_.size(); ++i)
          total[static_cast<size_t>(i)] += sums[task * sums_.size() + i];
      const bool last_of_row = f_.modulation_rows > 1 || index + 1 == count;
      if (!last_of_row) continue;
      const int64_t row = f_.modulation_rows == 1 ? 0 : first + active[static_cast<size_t>(index)];
      for (int vector = 0; vector < kVectors; ++vector)
        add(vector * shape_.hidden_padded, f_.hidden, out.modulation + (row * kVectors + vector) * f_.hidden);
      add(kVectors * shape_.hidden_padded, f_.hidden, out.mlp_out_bias);
      add((kVectors + 1) * shape_.hidden_padded, f_.width, out.mlp_in_bias);
      std::fill(total.begin(), total.end(), 0.0);
    }
  }

  void read(int64_t sequence, int64_t slot) const {
    const float* from = p_.grad_x + sequence * f_.length * f_.hidden;
    float* to = grad_x_.get() + slot * f_.length * shape_.hidden_padded;
    for (int64_t r = 0; r < f_.length; ++r) {
      std::copy_n(from + r * f_.hidden, f_.hidden, to + r * shape_.hidden_padded);
      std::fill(to + r * shape_.hidden_padded + f_.hidden, to + (r + 1) * shape_.hidden_padded, 0.0f);
    }
  }

  void write(int64_t sequence, int64_t slot) const {
    const float* from = grad_x_.get() + slot * f_.length * shape_.hidden_padded;
    float* to = p_.grad_x + sequence * f_.length * f_.hidden;
    for (int64_t r = 0; r < f_.length; ++r)
      std::copy_n(from + r * shape_.hidden_padded, f_.hidden, to + r * f_.hidden);
  }

  const LoopedBlocksBackwardProblem& p_;
  const LoopedBlocksProblem& f_;
  const LoopedBlocksBackwardKernel& kernel_;
  const int64_t panel_, task_panels_;
  const BlockShape shape_;
  const FoldedVectors vectors_;
  const Sums sums_;
  const int64_t record_bytes_, chunk_, tasks_per_sequence_, task_rows_, panel_rows_, qkv_padded_;
  const AlignedBuffer<float> grad_x_, grad_mixed_;
  const AlignedBuffer<uint32_t> grad_qkv_;
  const AlignedBuffer<float> partial_;
  const AlignedBuffer<uint32_t> panels_;
  const AlignedBuffer<float> bias_;
};

}  // namespace

void looped_blocks_backward(const LoopedBlocksBackwardProblem& problem, Isa isa, int num_threads) {
  Backward(problem, isa).go(num_threads);
}

}  // namespace loopmdm::cpu
