#include "cpu/looped_blocks/looped_blocks.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/looped_blocks/folded.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {

constexpr double kThreadWork = 5e5;  // multiply-adds of one block that pay for a thread
constexpr int64_t kThreadRows = 6;   // rows of short sequences that pay for one

// What a loop of one sequence works on beside its keys and values.
struct Place {
  SequenceState state{};
  float *old, *change, *bias;
  int64_t sequence = -1, loop = 0;
};

Place lay_out(const BlockShape& s, bool keep_old, Layout& layout) {
  Place place;
  place.state.x = layout.take<float>(s.length * s.hidden_padded);
  place.state.queries = layout.take<uint32_t>(s.length * s.hidden_words());
  place.bias = layout.take<float>(s.keys);
  place.old = layout.take<float>(keep_old ? s.length * s.hidden_padded : 0);
  place.change = layout.take<float>(keep_old ? 2 * s.length : 0);
  return place;
}

// One sequence at a time: keys and values are panels, double-buffered.
class SequenceMemory {
 public:
  SequenceMemory(const BlockShape& s, bool keep_old) {
    Layout size(nullptr);
    arrange(s, keep_old, size);
    memory_ = zeroed<char>(size.bytes());
    Layout layout(memory_.get());
    arrange(s, keep_old, layout);
  }

  Place place;

 private:
  void arrange(const BlockShape& s, bool keep_old, Layout& layout) {
    place = lay_out(s, keep_old, layout);
    for (int parity = 0; parity < 2; ++parity) {
      place.state.keys[parity] = layout.take<uint32_t>(s.key_size());
      place.state.values[parity] = layout.take<uint32_t>(s.value_size());
    }
  }

  AlignedBuffer<char> memory_;
};

// Short sequences of one thread: keys and values are rows.
class SequenceRows {
 public:
  SequenceRows(const BlockShape& s, int64_t count, bool keep_old) {
    Layout size(nullptr);
    arrange(s, count, keep_old, size);
    memory_ = zeroed<char>(size.bytes());
    Layout layout(memory_.get());
    arrange(s, count, keep_old, layout);
  }

  std::vector<Place> places;

 private:
  void arrange(const BlockShape& s, int64_t count, bool keep_old, Layout& layout) {
    places.clear();
    for (int64_t i = 0; i < count; ++i) {
      places.push_back(lay_out(s, keep_old, layout));
      places.back().state.key_rows = layout.take<uint32_t>(s.length * s.hidden_words());
      places.back().state.value_rows = layout.take<uint32_t>(s.length * s.hidden_words());
    }
  }

  AlignedBuffer<char> memory_;
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
        kernel_(looped_blocks_kernel(isa)),
        shape_(block_shape(p, isa)),
        record_bytes_(shape_.record_bytes()),
        vectors_(p, shape_),
        exits_(p.exit_threshold >= 0) {}

  void go(int num_threads) {
    const double work = static_cast<double>(p_.batch * p_.length) * static_cast<double>(p_.hidden) *
                        static_cast<double>(4 * p_.hidden + 2 * p_.width);
    const int wanted =
        static_cast<int>(std::clamp(work / kThreadWork, 1.0, static_cast<double>(num_threads)));
    if (shape_.sequences_together() > 1) {
      // Every thread reads all weights, which does not pay for less than a tile of rows.
      const int threads = static_cast<int>(
          std::clamp<int64_t>(p_.batch * p_.length / kThreadRows, 1, static_cast<int64_t>(wanted)));
      if (p_.batch > threads) return together(threads);
    }
    apart(wanted);
  }

 private:
  // Each thread has some sequences; a place that one leaves is taken by the next.
  void together(int threads) {
    const int64_t places = std::min(shape_.sequences_together(), (p_.batch + threads - 1) / threads);
    const int64_t bytes = round_up(kernel_.scratch_bytes(shape_), 64);
    const auto scratch = aligned_buffer<char>(bytes * threads);
    const std::vector<int64_t> order = longest_first();
    std::vector<SequenceRows> own;
    own.reserve(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) own.emplace_back(shape_, places, exits_);
    parallel(threads, [&](Worker& worker) {
      void* mine = scratch.get() + worker.index * bytes;
      kernel_.clear_scratch(shape_, mine);
      std::vector<Place>& all = own[static_cast<size_t>(worker.index)].places;
      std::vector<Place*> active, some;
      std::vector<RowSpan> spans;
      for (bool more = true;;) {
        active.clear();
        some.clear();
        for (Place& place : all) {
          const bool was_free = place.sequence < 0;
          while (place.sequence < 0 && more) {
            const int64_t next = worker.take_task();
            more = next < p_.batch;
            if (more) enter(order[static_cast<size_t>(next)], place);
          }
          if (place.sequence < 0) continue;
          active.push_back(&place);
          if (was_free) some.push_back(&place);
        }
        if (active.empty()) break;
        apply(some, 0, p_.num_before, spans, mine);
        one_loop(active, some, spans, mine);
      }
      worker.barrier();
    });
  }

  std::vector<int64_t> longest_first() const {
    std::vector<int64_t> order(static_cast<size_t>(p_.batch));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [this](int64_t a, int64_t b) { return p_.num_loops[a] > p_.num_loops[b]; });
    return order;
  }

  // A sequence without loops is done at once and leaves the place free.
  void enter(int64_t sequence, Place& place) const {
    const int64_t size = p_.length * p_.hidden;
    if (p_.num_loops[sequence] == 0) {
      std::copy_n(p_.x + sequence * size, size, out_.x + sequence * size);
      out_.loops_used[sequence] = 0;
      return;
    }
    place.sequence = sequence;
    place.loop = 0;
    start(sequence, place);
    for (int64_t r = 0; r < p_.length; ++r)
      std::copy_n(p_.x + sequence * size + r * p_.hidden, p_.hidden,
                  place.state.x + r * shape_.hidden_padded);
  }

  // Blocks [first, first + count) on all rows of some sequences.
  void apply(const std::vector<Place*>& places, int64_t first, int64_t count, std::vector<RowSpan>& spans,
             void* scratch) const {
    if (places.empty()) return;
    for (int64_t block = first; block < first + count; ++block) {
      spans.clear();
      for (const Place* place : places)
        spans.push_back(span_of(place->sequence, block, place->loop * p_.num_blocks + block - p_.num_before,
                                place->state, 0, p_.length));
      const RowSpans all = {spans.data(), static_cast<int64_t>(spans.size()),
                            static_cast<int64_t>(spans.size()) * p_.length};
      kernel_.project(shape_, p_.bf16, p_.blocks[block], all, 0, scratch);
      kernel_.finish(shape_, p_.bf16, p_.blocks[block], all, 0, scratch);
    }
  }

  void one_loop(const std::vector<Place*>& active, std::vector<Place*>& leaving, std::vector<RowSpan>& spans,
                void* scratch) const {
    const Rows rows = {0, p_.length, p_.length};
    for (const Place* place : active) {
      if (exits_) keep(*place, rows);
      if (out_.loop_inputs)
        copy_rows(place->state, rows,
                  out_.loop_inputs + (place->loop * p_.batch + place->sequence) * p_.length * p_.hidden);
    }
    apply(active, p_.num_before, p_.num_blocks, spans, scratch);
    leaving.clear();
    for (Place* place : active) {
      ++place->loop;
      if (exits_) measure(*place, rows);
      if (place->loop == p_.num_loops[place->sequence] || leaves(*place, place->loop))
        leaving.push_back(place);
    }
    apply(leaving, p_.num_before + p_.num_blocks, p_.num_after, spans, scratch);
    for (Place* place : leaving) {
      copy_rows(place->state, rows, out_.x + place->sequence * p_.length * p_.hidden);
      out_.loops_used[place->sequence] = place->loop;
      place->sequence = -1;
    }
  }

  // Whether a sequence that was measured after this loop ends by an exit.
  bool leaves(const Place& place, int64_t loop) const {
    return exits_ && loop > p_.free_loops && relative_change(place) < p_.exit_threshold;
  }

  // application: counts those in the loop.
  RowSpan span_of(int64_t sequence, int64_t block, int64_t application, const SequenceState& state,
                  int64_t first, int64_t count) const {
    return {&state,
            vectors_.of(block, sequence),
            record_of(application, sequence),
            dropout_of(p_, application),
            first,
            count};
  }

  // A thread has a sequence to itself while there are enough; the last few are shared, row by row.
  void apart(int wanted) {
    const int64_t bytes = round_up(kernel_.scratch_bytes(shape_), 64);
    const auto scratch = aligned_buffer<char>(bytes * wanted);
    std::vector<SequenceMemory> own;
    own.reserve(static_cast<size_t>(wanted));
    for (int i = 0; i < (p_.batch >= wanted ? wanted : 1); ++i) own.emplace_back(shape_, exits_);
    parallel(wanted, [&](Worker& worker) {
      void* mine = scratch.get() + worker.index * bytes;
      kernel_.clear_scratch(shape_, mine);
      const bool enough = static_cast<int>(own.size()) >= worker.count;
      const int64_t alone = enough ? p_.batch / worker.count * worker.count : 0;
      worker.share(alone, [&](int64_t sequence) {
        one_sequence(sequence, own[static_cast<size_t>(worker.index)].place, 0, 1, mine, [] {});
      });
      for (int64_t sequence = alone; sequence < p_.batch; ++sequence) {
        one_sequence(sequence, own[0].place, worker.index, worker.count, mine, [&] { worker.barrier(); });
        worker.barrier();
      }
    });
  }

  template <class Sync>
  void one_sequence(int64_t sequence, Place& place, int index, int count, void* scratch, const Sync& sync) {
    const Rows rows = rows_of(p_.length, index, count);
    const int64_t loops = p_.num_loops[sequence], n = p_.num_blocks;
    if (index == 0) start(sequence, place);
    sync();
    const SequenceState& state = place.state;
    const float* x = p_.x + sequence * p_.length * p_.hidden;
    for (int64_t r = rows.first; r < rows.last; ++r)
      std::copy_n(x + r * p_.hidden, p_.hidden, state.x + r * shape_.hidden_padded);

    const auto for_row_blocks = [&](auto&& job) {
      for (int64_t r = rows.first; r < rows.last; r += rows.step) job(r, std::min(rows.step, rows.last - r));
    };
    // Applications count from the first block on, those in the loop from 0.
    const auto project = [&](int64_t block, int64_t application, int64_t first, int64_t rows_here) {
      const RowSpan span = span_of(sequence, block, application, state, first, rows_here);
      kernel_.project(shape_, p_.bf16, p_.blocks[block], {&span, 1, rows_here}, parity_of(application),
                      scratch);
    };
    const auto finish = [&](int64_t block, int64_t application, int64_t first, int64_t rows_here) {
      const RowSpan span = span_of(sequence, block, application, state, first, rows_here);
      kernel_.finish(shape_, p_.bf16, p_.blocks[block], {&span, 1, rows_here}, parity_of(application),
                     scratch);
    };
    int64_t application = -p_.num_before, loop = 0;
    // Blocks [first, first + count), so many times; the state before each time is copied to `inputs`.
    const auto apply = [&](int64_t first, int64_t count, int64_t times, float* inputs) {
      if (count * times == 0) return;
      for_row_blocks([&](int64_t r, int64_t rows_here) { project(first, application, r, rows_here); });
      for (int64_t i = 0; i < count * times; ++i, ++application) {
        if (inputs != nullptr && i % count == 0)
          copy_rows(state, rows, inputs + i / count * p_.batch * p_.length * p_.hidden);
        const bool last = i + 1 == count * times;
        sync();
        for_row_blocks([&](int64_t r, int64_t rows_here) {
          finish(first + i % count, application, r, rows_here);
          if (!last) project(first + (i + 1) % count, application + 1, r, rows_here);
        });
      }
    };
    const auto inputs = [&] {
      return out_.loop_inputs ? out_.loop_inputs + (loop * p_.batch + sequence) * p_.length * p_.hidden
                              : nullptr;
    };
    apply(0, p_.num_before, 1, nullptr);
    if (!exits_) {
      apply(p_.num_before, n, loops, inputs());
      loop = loops;
    }
    for (bool going = loop < loops; going;) {
      keep(place, rows);
      apply(p_.num_before, n, 1, inputs());
      ++loop;
      measure(place, rows);
      sync();
      going = loop < loops && !leaves(place, loop);
      sync();
    }
    apply(p_.num_before + n, p_.num_after, 1, nullptr);
    copy_rows(state, rows, out_.x + sequence * p_.length * p_.hidden);
    if (index == 0) out_.loops_used[sequence] = loop;
  }

  static int parity_of(int64_t application) { return static_cast<int>(application & 1); }

  void start(int64_t sequence, Place& place) const {
    SequenceState& state = place.state;
    state.cos = p_.cos;
    state.sin = p_.sin;
    state.first_element = sequence * p_.length * p_.hidden;
    state.key_bias = nullptr;
    if (needs_key_bias(p_, shape_)) {
      fill_key_bias(p_, shape_, sequence, place.bias);
      state.key_bias = place.bias;
    }
  }

  BlockRecord record_of(int64_t application, int64_t sequence) const {
    if (out_.records == nullptr) return {};
    return shape_.record_at(out_.records + (application * p_.batch + sequence) * record_bytes_);
  }

  void copy_rows(const SequenceState& state, const Rows& rows, float* to) const {
    for (int64_t r = rows.first; r < rows.last; ++r)
      std::copy_n(state.x + r * shape_.hidden_padded, p_.hidden, to + r * p_.hidden);
  }

  void keep(const Place& place, const Rows& rows) const {
    const int64_t width = shape_.hidden_padded;
    std::copy_n(place.state.x + rows.first * width, (rows.last - rows.first) * width,
                place.old + rows.first * width);
  }

  void measure(const Place& place, const Rows& rows) const {
    const int64_t width = shape_.hidden_padded;
    for (int64_t r = rows.first; r < rows.last; ++r)
      kernel_.row_change(place.state.x + r * width, place.old + r * width, width, place.change + 2 * r,
                         place.change + 2 * r + 1);
  }

  // ||H(k) - H(k-1)|| / ||H(k)||, rows added in order whoever computed them.
  double relative_change(const Place& place) const {
    double change = 0, size = 0;
    for (int64_t r = 0; r < p_.length; ++r) {
      change += place.change[2 * r];
      size += place.change[2 * r + 1];
    }
    return std::sqrt(change) / std::sqrt(size);
  }

  const LoopedBlocksProblem& p_;
  const LoopedBlocksOutput& out_;
  const LoopedBlocksKernel& kernel_;
  const BlockShape shape_;
  const int64_t record_bytes_;
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
          .keys = round_up(p.length, 2 * linear.lanes),
          .per_word = operands_per_word(linear, p.bf16)};
}

namespace {

BlockRecord lay_out(const BlockShape& s, Layout& layout) {
  const int64_t row = s.length * s.hidden_words();
  BlockRecord t;
  for (uint32_t** rows :
       {&t.normed1, &t.query, &t.key, &t.value, &t.mixed, &t.branch1, &t.normed2, &t.branch2})
    *rows = layout.take<uint32_t>(row);
  t.mlp_in = layout.take<uint32_t>(s.length * s.width_words());
  t.scale1 = layout.take<float>(s.length);
  t.scale2 = layout.take<float>(s.length);
  t.log_sum_exp = layout.take<float>(s.heads * s.length);
  return t;
}

}  // namespace

int64_t BlockShape::record_bytes() const {
  Layout layout(nullptr);
  lay_out(*this, layout);
  return layout.bytes();
}

BlockRecord BlockShape::record_at(char* memory) const {
  Layout layout(memory);
  return lay_out(*this, layout);
}

void looped_blocks(const LoopedBlocksProblem& problem, const LoopedBlocksOutput& out, Isa isa,
                   int num_threads) {
  if (out.records) {
    const int64_t loops = *std::max_element(problem.num_loops, problem.num_loops + problem.batch);
    prefer_large_pages(out.records,
                       loops * problem.num_blocks * problem.batch * block_shape(problem, isa).record_bytes());
  }
  Run(problem, out, isa).go(num_threads);
}

}  // namespace loopmdm::cpu
