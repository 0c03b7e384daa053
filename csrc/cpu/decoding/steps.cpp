#include "cpu/decoding/steps.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>
#include <numeric>
#include <vector>

namespace loopmdm::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// Draws of the candidates of a step.
struct Drawn {
  std::vector<int64_t> token, top1_token;
  std::vector<float> log_prob, top1_prob, top2_prob, entropy;

  void resize(size_t rows) {
    token.resize(rows);
    top1_token.resize(rows);
    for (std::vector<float>* field : {&log_prob, &top1_prob, &top2_prob, &entropy}) field->resize(rows);
  }

  SampleRowsOutput from(int64_t row) {
    return {token.data() + row,     log_prob.data() + row,  top1_token.data() + row,
            top1_prob.data() + row, top2_prob.data() + row, entropy.data() + row};
  }
};

class Steps {
 public:
  Steps(const DecodingProblem& p, const DecodingState& state, Isa isa, int num_threads)
      : p_(p),
        state_(state),
        isa_(isa),
        num_threads_(num_threads),
        first_slot_(static_cast<size_t>(p.batch + 1)),
        due_(static_cast<size_t>(p.batch)),
        used_(static_cast<size_t>(p.batch)) {
    for (int64_t slot = 0; slot < p.slots.size; ++slot) ++first_slot_[at(p.slots.sequence[slot]) + 1];
    std::partial_sum(first_slot_.begin(), first_slot_.end(), first_slot_.begin());
    open_ = std::count(state.masked, state.masked + p.slots.size, true);
  }

  DecodingProgress take(int64_t first, int64_t most, int64_t revealed, double milliseconds) {
    const auto end = Clock::now() + std::chrono::duration<double, std::milli>(milliseconds);
    progress_ = {};
    revealed_ = revealed;
    most = std::min(most, p_.num_steps - first);
    while (progress_.steps < most && open_ > 0) {
      one_step(first + progress_.steps);
      ++progress_.steps;
      if (progress_.not_finite >= 0 || Clock::now() >= end) break;
    }
    progress_.revealed = revealed_ - revealed;
    return progress_;
  }

 private:
  static size_t at(int64_t index) { return static_cast<size_t>(index); }

  void one_step(int64_t step) {
    candidates_.clear();
    if (p_.pace.by_step != nullptr && p_.pace.rating == Rating::none) {
      const auto [begin, end] = scheduled(step);
      std::copy_if(begin, end, std::back_inserter(candidates_),
                   [this](int64_t slot) { return state_.masked[slot]; });
    } else {
      for (int64_t sequence = 0; sequence < p_.batch; ++sequence) due_[at(sequence)] = 0;
      if (p_.pace.by_step != nullptr) {
        const auto [begin, end] = scheduled(step);
        for (const int64_t* slot = begin; slot < end; ++slot) ++due_[at(p_.slots.sequence[*slot])];
      }
      for (int64_t sequence = 0; sequence < p_.batch; ++sequence) add_candidates(sequence);
    }
    if (candidates_.empty() || !predict(step)) return;
    const bool all =
        p_.pace.by_step != nullptr && (p_.pace.rating == Rating::none || p_.pace.rating == Rating::place);
    chosen_.assign(candidates_.size(), all);
    if (!all) for_each_sequence([&](size_t begin, size_t end) { choose(begin, end); });
    for (size_t i = 0; i < candidates_.size(); ++i)
      if (chosen_[i]) reveal(step, i);
  }

  std::pair<const int64_t*, const int64_t*> scheduled(int64_t step) const {
    const int64_t begin = step == 0 ? 0 : p_.pace.ends[step - 1];
    return {p_.pace.by_step + begin, p_.pace.by_step + p_.pace.ends[step]};
  }

  // Open slots of the block that comes first, of a window the leftmost ones.
  void add_candidates(int64_t sequence) {
    const bool has_schedule = p_.pace.by_step != nullptr;
    if (has_schedule && due_[at(sequence)] == 0) return;
    const size_t before = candidates_.size();
    int64_t block = -1;
    for (int64_t slot = first_slot_[at(sequence)]; slot < first_slot_[at(sequence) + 1]; ++slot) {
      if (!state_.masked[slot]) continue;
      if (block < 0) block = p_.slots.block[slot];
      if (p_.slots.block[slot] != block ||
          static_cast<int64_t>(candidates_.size() - before) == p_.pace.window)
        break;
      candidates_.push_back(slot);
    }
    if (!has_schedule || p_.pace.rating != Rating::place) return;
    // Known without a prediction: only what is revealed is predicted.
    const auto begin = candidates_.begin() + static_cast<std::ptrdiff_t>(before);
    std::stable_sort(begin, candidates_.end(),
                     [this](int64_t a, int64_t b) { return p_.pace.place[a] < p_.pace.place[b]; });
    candidates_.resize(std::min(candidates_.size(), before + at(due_[at(sequence)])));
    std::sort(candidates_.begin() + static_cast<std::ptrdiff_t>(before), candidates_.end());
  }

  // job(begin, end) of the candidates of each sequence.
  template <class Job>
  void for_each_sequence(Job&& job) const {
    for (size_t begin = 0, end; begin < candidates_.size(); begin = end) {
      const int64_t sequence = p_.slots.sequence[candidates_[begin]];
      for (end = begin; end < candidates_.size() && p_.slots.sequence[candidates_[end]] == sequence;) ++end;
      job(begin, end);
    }
  }

  // Draws a token for every candidate; false where one is not finite.
  bool predict(int64_t step) {
    drawn_.resize(candidates_.size());
    names_.clear();
    std::vector<std::pair<size_t, size_t>> ranges;
    for_each_sequence([&](size_t begin, size_t end) { ranges.emplace_back(begin, end); });
    for (size_t first = 0; first < ranges.size(); first += at(p_.max_batch)) {
      const size_t last = std::min(ranges.size(), first + at(p_.max_batch));
      if (!call(step, ranges.data() + first, ranges.data() + last)) return false;
    }
    return true;
  }

  bool call(int64_t step, const std::pair<size_t, size_t>* first, const std::pair<size_t, size_t>* last) {
    const size_t begin = first->first, end = last[-1].second, rows = end - begin;
    const int64_t batch = last - first;
    tokens_.clear();
    names_.resize(4 * rows);
    int64_t* const row = names_.data();
    int64_t *const sequence_id = row + rows, *const steps = sequence_id + rows,
                   *const position = steps + rows;
    size_t i = 0;
    for (int64_t number = 0; number < batch; ++number) {
      const int64_t sequence = p_.slots.sequence[candidates_[first[number].first]];
      const int64_t* tokens = state_.tokens + sequence * p_.length;
      tokens_.insert(tokens_.end(), tokens, tokens + p_.length);
      for (size_t candidate = first[number].first; candidate < first[number].second; ++candidate, ++i) {
        const int64_t slot = candidates_[candidate];
        row[i] = number * p_.length + p_.slots.position[slot];
        sequence_id[i] = p_.slots.sequence_id[slot];
        steps[i] = step;
        position[i] = p_.slots.position[slot];
      }
    }
    run_network(*p_.network,
                {.tokens = tokens_.data(),
                 .batch = batch,
                 .length = p_.length,
                 .num_loops = p_.computes.num_loops[step],
                 .min_loops = p_.computes.min_loops[step],
                 .exit_threshold = p_.computes.exit_threshold[step],
                 .rows = row,
                 .sequence = sequence_id,
                 .step = steps,
                 .position = position,
                 .num_rows = static_cast<int64_t>(rows),
                 .seed = p_.seed,
                 .temperature = p_.temperature},
                used_of_call(batch), drawn_.from(static_cast<int64_t>(begin)), isa_, num_threads_);
    for (int64_t number = 0; number < batch; ++number) {
      const size_t sequence = at(p_.slots.sequence[candidates_[first[number].first]]);
      used_[sequence] = call_loops_[at(number)];
      state_.loops[sequence] += used_[sequence];
      progress_.loops += used_[sequence];
      ++state_.network_calls[sequence];
    }
    ++progress_.calls;
    progress_.sequence_calls += batch;
    progress_.rows += static_cast<int64_t>(rows);
    for (size_t candidate = begin; candidate < end; ++candidate)
      if (!std::isfinite(drawn_.log_prob[candidate])) {
        progress_.not_finite = candidates_[candidate];
        return false;
      }
    return true;
  }

  int64_t* used_of_call(int64_t batch) {
    call_loops_.resize(at(batch));
    return call_loops_.data();
  }

  // Of the candidates of one sequence.
  void choose(size_t begin, size_t end) {
    ranked_.resize(end - begin);
    std::iota(ranked_.begin(), ranked_.end(), begin);
    std::stable_sort(ranked_.begin(), ranked_.end(), [this](size_t a, size_t b) {
      return p_.pace.rating == Rating::place ? p_.pace.place[candidates_[a]] < p_.pace.place[candidates_[b]]
                                             : value(p_.pace.rating, a) > value(p_.pace.rating, b);
    });
    if (p_.pace.by_step != nullptr) {
      const size_t due = at(due_[at(p_.slots.sequence[candidates_[begin]])]);
      for (size_t i = 0; i < std::min(due, ranked_.size()); ++i) chosen_[ranked_[i]] = true;
      return;
    }
    double sum = 0, largest = -std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < ranked_.size(); ++i) {
      bool passed;
      if (std::isnan(p_.pace.threshold)) {
        const double entropy = drawn_.entropy[ranked_[i]];
        sum += entropy;
        largest = std::max(largest, entropy);
        passed = sum - largest <= p_.pace.entropy_bound;
      } else {
        passed = value(p_.pace.score, ranked_[i]) >= p_.pace.threshold;
      }
      if (!passed && i > 0) break;
      chosen_[ranked_[i]] = true;
      if (!passed) break;
    }
  }

  float value(Rating rating, size_t candidate) const {
    switch (rating) {
      case Rating::margin:
        return drawn_.top1_prob[candidate] - drawn_.top2_prob[candidate];
      case Rating::certainty:
        return -drawn_.entropy[candidate];
      default:
        return drawn_.top1_prob[candidate];
    }
  }

  void reveal(int64_t step, size_t candidate) {
    const int64_t slot = candidates_[candidate], sequence = p_.slots.sequence[slot];
    const int64_t token = drawn_.token[candidate];
    state_.tokens[sequence * p_.length + p_.slots.position[slot]] = token;
    state_.masked[slot] = token == p_.mask_token;
    open_ -= !state_.masked[slot];
    state_.revealed[revealed_] = slot;
    state_.revealed_step[revealed_] = step;
    state_.revealed_loops[revealed_] = used_[at(sequence)];
    state_.log_prob[revealed_] = drawn_.log_prob[candidate];
    ++revealed_;
  }

  const DecodingProblem& p_;
  const DecodingState& state_;
  const Isa isa_;
  const int num_threads_;
  std::vector<int64_t> first_slot_;  // [B + 1] of each sequence
  std::vector<int64_t> due_;         // [B] slots to reveal in the step
  std::vector<int64_t> used_;        // [B] loops of the step
  std::vector<int64_t> candidates_, tokens_, names_, call_loops_;
  std::vector<size_t> ranked_;
  std::vector<char> chosen_;
  Drawn drawn_;
  int64_t open_, revealed_ = 0;
  DecodingProgress progress_;
};

}  // namespace

DecodingProgress take_steps(const DecodingProblem& problem, const DecodingState& state, int64_t first,
                            int64_t most, int64_t revealed, double milliseconds, Isa isa, int num_threads) {
  return Steps(problem, state, isa, num_threads).take(first, most, revealed, milliseconds);
}

}  // namespace loopmdm::cpu
