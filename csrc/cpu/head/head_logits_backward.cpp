#include "cpu/head/head_logits_backward.h"

#include <cstring>
#include <vector>

#include "cpu/head/row_groups.h"

namespace loopmdm::cpu {

namespace {

constexpr int64_t kBlockWords = 512;  // looked through between two looks at what was found

// Whether all values of a row are zero, of either sign. `magnitude`: the bits of a word without the signs.
bool is_zero(const char* row, int64_t bytes, uint64_t magnitude) {
  constexpr int64_t kWord = sizeof magnitude;
  for (int64_t first = 0; first < bytes; first += kBlockWords * kWord) {
    const int64_t left = std::min(bytes - first, kBlockWords * kWord);
    uint64_t found = 0, word;
    for (int64_t at = 0; at + kWord <= left; at += kWord) {
      std::memcpy(&word, row + first + at, kWord);
      found |= word;
    }
    word = 0;
    std::memcpy(&word, row + first + left / kWord * kWord, static_cast<size_t>(left % kWord));
    if ((found | word) & magnitude) return false;
  }
  return true;
}

// The rows whose logits have a gradient, in order.
std::vector<int64_t> rows_with_gradients(const MaskedCrossEntropyProblem& p, const LogitGradients& given,
                                         int num_threads) {
  const int64_t bytes = p.vocab_size * (p.bf16 ? 2 : 4);
  const uint64_t magnitude = p.bf16 ? 0x7fff7fff7fff7fff : 0x7fffffff7fffffff;
  const char* values = static_cast<const char*>(given.values);
  std::vector<char> wanted(static_cast<size_t>(p.num_rows));
  const double work = static_cast<double>(p.num_rows) * static_cast<double>(bytes);
  const int workers = static_cast<int>(std::min<double>(num_threads, std::max(1.0, work / kThreadWork)));
  for_each_task(p.num_rows, workers, [&](int64_t row, int) {
    wanted[static_cast<size_t>(row)] = !is_zero(values + p.rows[row] * bytes, bytes, magnitude);
  });
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < p.num_rows; ++row)
    if (wanted[static_cast<size_t>(row)]) rows.push_back(p.rows[row]);
  return rows;
}

void clear(const MaskedCrossEntropyProblem& p, const MaskedCrossEntropyGradients& out) {
  const size_t tokens = static_cast<size_t>(p.vocab_size);
  const size_t weight_bytes = out.weight_is_bf16 ? 2 : 4;
  if (out.weight != nullptr) std::memset(out.weight, 0, tokens * static_cast<size_t>(p.width) * weight_bytes);
  if (out.bias != nullptr) std::memset(out.bias, 0, tokens * sizeof(float));
}

}  // namespace

void head_logits_backward(const MaskedCrossEntropyProblem& problem, const LogitGradients& given,
                          const MaskedCrossEntropyGradients& out, Isa isa, int num_threads) {
  if (problem.num_rows == 0) return;
  const std::vector<int64_t> rows = rows_with_gradients(problem, given, num_threads);
  if (rows.empty()) return clear(problem, out);
  MaskedCrossEntropyProblem p = problem;
  p.rows = rows.data();
  p.num_rows = static_cast<int64_t>(rows.size());
  const MaskedCrossEntropyKernel& kernel = masked_cross_entropy_kernel(isa);
  gradients_of_groups(
      p, kernel, out, num_threads, [](const RowGroup&) {},
      [&](const RowGroup& group, const TokenRange& tokens, char* scratch, float* grad_rows) {
        kernel.products(p, group, tokens, given, scratch, out, grad_rows);
      });
}

}  // namespace loopmdm::cpu
