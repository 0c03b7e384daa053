#include "cpu/head/restricted_draw.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/head/sample_rows.h"
#include "cpu/linear/linear.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {

constexpr int kDigit = 11;  // bits
constexpr int64_t kDigits = 1 << kDigit;
constexpr int64_t kFewValues = 512;  // sorted by comparison, and not counted first
constexpr int64_t kPartOfFew = 8;    // a heap finds up to 1 / kPartOfFew of few values faster than sorting
constexpr double kRounding = 1e-5;   // far more than rounding moves a sum of probabilities
constexpr double kRowWork = 1e4;     // tokens that pay for a thread

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Unsigned words in the opposite order of the values; both zeros are one, NaN comes last.
uint32_t descending(float value) {
  if (value != value) return 0xffffffffu;
  const uint32_t bits = bits_of(value + 0.0f);
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

float value_of(uint32_t word) { return float_of(word & 0x80000000u ? word : ~word & 0x7fffffffu); }

// The largest values of a row in order, each with its probability.
class Selection {
 public:
  explicit Selection(int64_t vocab_size)
      : sorted_(aligned_buffer<uint64_t>(vocab_size)), spare_(aligned_buffer<uint64_t>(vocab_size)) {}

  // In order, at least the `most` largest, or as many as reach the probability `mass` if these are fewer.
  void select(const float* values, const float* probs, int64_t vocab_size, int64_t most, double mass) {
    const uint32_t last =
        vocab_size <= kFewValues ? kDigits - 1 : last_digit(values, probs, vocab_size, most, mass);
    uint64_t* out = sorted_.get();
    for (int64_t t = 0; t < vocab_size; ++t) {
      const uint32_t word = descending(values[t]);
      *out = static_cast<uint64_t>(word) << 32 | (probs ? bits_of(probs[t]) : 0);
      out += word >> (32 - kDigit) <= last;
    }
    size_ = out - sorted_.get();
    if (size_ > kFewValues)
      sort_by_digits();
    else if (most * kPartOfFew <= size_ && !probs)
      std::partial_sort(sorted_.get(), sorted_.get() + most, out);
    else
      std::sort(sorted_.get(), out);
  }

  int64_t size() const { return size_; }
  float value(int64_t i) const { return value_of(static_cast<uint32_t>(sorted_[i] >> 32)); }
  float prob(int64_t i) const { return float_of(static_cast<uint32_t>(sorted_[i])); }

 private:
  // The leading digit up to which values have to be looked at.
  static uint32_t last_digit(const float* values, const float* probs, int64_t vocab_size, int64_t most,
                             double mass) {
    std::array<int64_t, kDigits> count{};
    std::array<double, kDigits> sum{};
    for (int64_t t = 0; t < vocab_size; ++t) {
      const uint32_t digit = descending(values[t]) >> (32 - kDigit);
      ++count[digit];
      if (probs) sum[digit] += probs[t];
    }
    int64_t counted = 0;
    double reached = 0;
    for (uint32_t digit = 0; digit < kDigits; ++digit) {
      counted += count[digit];
      reached += sum[digit];
      if (counted >= most || (probs && reached > mass + kRounding)) return digit;
    }
    return kDigits - 1;
  }

  void sort_by_digits() {
    constexpr int kPasses = 3;
    std::array<std::array<int64_t, kDigits>, kPasses> place{};
    const auto digit_of = [](uint64_t word, int pass) {
      return word >> (32 + pass * kDigit) & (kDigits - 1);
    };
    for (int64_t i = 0; i < size_; ++i)
      for (int pass = 0; pass < kPasses; ++pass) ++place[pass][digit_of(sorted_[i], pass)];
    for (int pass = 0; pass < kPasses; ++pass) {
      int64_t at = 0;
      for (int64_t& here : place[pass]) at += std::exchange(here, at);
      for (int64_t i = 0; i < size_; ++i) spare_[place[pass][digit_of(sorted_[i], pass)]++] = sorted_[i];
      sorted_.swap(spare_);
    }
  }

  AlignedBuffer<uint64_t> sorted_, spare_;
  int64_t size_ = 0;
};

// How many of the sorted tokens it takes to reach top_p, as in _nucleus_size: sums are rounded to float.
int64_t nucleus_size(const Selection& best, int64_t most, float top_p) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < std::min(best.size(), most); ++i) {
    const float prob = best.prob(i);
    sum += prob;
    const float before = static_cast<float>(sum) - prob;
    if (before < top_p)
      ++count;
    else if (before > top_p + static_cast<float>(kRounding))
      break;
  }
  return std::max<int64_t>(count, 1);
}

// Log-probabilities of the tokens to draw from, -inf for the others: the `count` largest, the lowest ids of
// those that are equal.
void keep_largest(const RestrictedDrawProblem& p, int64_t row, const Selection& best, int64_t count,
                  float* out) {
  const float* values = p.tempered + row * p.vocab_size;
  const float* log_probs = p.log_probs + row * p.vocab_size;
  const float least = best.value(count - 1);
  int64_t above = count - 1;
  while (above > 0 && best.value(above - 1) == least) --above;
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < p.vocab_size; ++t) out[t] = values[t] > least ? log_probs[t] : kNever;
  int64_t left = count - above;
  for (int64_t t = 0; t < p.vocab_size && left > 0; ++t)
    if (values[t] == least) {
      out[t] = log_probs[t];
      --left;
    }
}

int threads_for(int64_t num_rows, int64_t vocab_size, int num_threads) {
  const double useful = static_cast<double>(num_rows * vocab_size) / kRowWork;
  return static_cast<int>(std::min<double>(std::clamp(useful, 1.0, static_cast<double>(num_threads)),
                                           static_cast<double>(std::max<int64_t>(num_rows, 1))));
}

}  // namespace

void draw_restricted(const RestrictedDrawProblem& p, int64_t* token, Isa isa, int num_threads) {
  const SampleRowsKernel& kernel = sample_rows_kernel(isa);
  const int64_t padded = round_up(p.vocab_size, kTileTokens);
  parallel(threads_for(p.num_rows, p.vocab_size, num_threads), [&](Worker& worker) {
    Selection best(p.vocab_size);
    const auto kept = aligned_buffer<float>(padded);
    std::fill_n(kept.get() + p.vocab_size, padded - p.vocab_size, -std::numeric_limits<float>::infinity());
    worker.share(p.num_rows, [&](int64_t row) {
      const float* values = p.tempered + row * p.vocab_size;
      // log_softmax leaves a row without NaN or of nothing else; then no token wins.
      int64_t winner = -1;
      if (values[0] == values[0]) {
        const float* probs = p.probs ? p.probs + row * p.vocab_size : nullptr;
        if (!probs && p.most == p.vocab_size) {
          std::copy_n(p.log_probs + row * p.vocab_size, p.vocab_size, kept.get());
        } else {
          best.select(values, probs, p.vocab_size, p.most, static_cast<double>(p.top_p));
          keep_largest(p, row, best, probs ? nucleus_size(best, p.most, p.top_p) : p.most, kept.get());
        }
        winner = kernel.race_among(p, row, kept.get());
      }
      token[row] = winner < 0 ? p.vocab_size - 1 : winner;
    });
  });
}

void largest_values(const float* values, int64_t num_rows, int64_t vocab_size, int64_t count, float* out,
                    int num_threads) {
  parallel(threads_for(num_rows, vocab_size, num_threads), [&](Worker& worker) {
    Selection best(vocab_size);
    worker.share(num_rows, [&](int64_t row) {
      best.select(values + row * vocab_size, nullptr, vocab_size, count, 0);
      for (int64_t i = 0; i < count; ++i) out[row * count + i] = best.value(i);
    });
  });
}

}  // namespace loopmdm::cpu
