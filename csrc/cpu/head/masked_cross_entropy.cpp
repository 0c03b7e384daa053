#include "cpu/head/masked_cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "cpu/head/row_groups.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {

constexpr float kNoRow = 1e30f;  // the maximum of a padding row: its probabilities are 0

KeptTiles kept_of_group(const KeptTiles& kept, const RowGroup& group) {
  return {kept.largest, group.first == 0 ? kept.exponentials : nullptr, kept.token_bytes};
}

}  // namespace

int64_t cross_entropy_tiles(int64_t vocab_size) {
  const Chunks chunks(vocab_size);
  return chunks.count * chunks.tiles;
}

void masked_cross_entropy(const MaskedCrossEntropyProblem& p, const float* row_weights, float* total,
                          const RowLosses& out, const KeptTiles& kept, Isa isa, int num_threads) {
  *total = 0;
  if (p.num_rows == 0) return;
  const MaskedCrossEntropyKernel& kernel = masked_cross_entropy_kernel(isa);
  const Chunks chunks(p.vocab_size);
  const int workers = useful_workers(p, chunks.count, num_threads);
  const CrossEntropySizes most = kernel.sizes(p, std::min(p.num_rows, kGroupRows));
  const auto scratch = aligned_buffer<char>(workers * most.forward_scratch);
  const auto partial = aligned_buffer<float>((2 * chunks.count + 1) * most.padded_rows);
  if (kept.exponentials != nullptr) prefer_large_pages(kept.exponentials, p.vocab_size * kept.token_bytes);

  for_each_group(p, kernel, false, [&](const RowGroup& group, const CrossEntropySizes& sizes) {
    float* targets = partial.get() + 2 * chunks.count * sizes.padded_rows;
    const auto statistics_of = [&](int64_t chunk) -> ChunkStatistics {
      float* largest = partial.get() + 2 * chunk * sizes.padded_rows;
      return {largest, largest + sizes.padded_rows, targets};
    };
    const int64_t blocks = (group.count + sizes.block - 1) / sizes.block;
    parallel(workers, [&](Worker& worker) {
      char* memory = scratch.get() + worker.index * most.forward_scratch;
      worker.share(blocks, [&](int64_t block) { kernel.prepare(p, group, block, memory); });
      worker.share(chunks.count, [&](int64_t chunk) {
        kernel.statistics(p, group, chunks[chunk], memory, statistics_of(chunk), kept_of_group(kept, group));
      });
    });
    for (int64_t r = 0; r < group.count; ++r) {
      float largest = statistics_of(0).largest[r];
      for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
        largest = std::max(largest, statistics_of(chunk).largest[r]);
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        const ChunkStatistics s = statistics_of(chunk);
        sum += s.sum[r] * std::exp(static_cast<double>(s.largest[r]) - largest);
      }
      out.largest[group.first + r] = largest;
      out.sum[group.first + r] = static_cast<float>(sum);
      out.nll[group.first + r] =
          static_cast<float>(std::log(sum) + (static_cast<double>(largest) - targets[r]));
    }
  });
  double sum = 0;
  for (int64_t r = 0; r < p.num_rows; ++r) sum += static_cast<double>(row_weights[r]) * out.nll[r];
  *total = static_cast<float>(sum);
}

void masked_cross_entropy_backward(const MaskedCrossEntropyProblem& p, const RowLosses& rows,
                                   const KeptTiles& kept, const MaskedCrossEntropyGradients& out, Isa isa,
                                   int num_threads) {
  if (p.num_rows == 0) return;
  const MaskedCrossEntropyKernel& kernel = masked_cross_entropy_kernel(isa);
  gradients_of_groups(
      p, kernel, out, num_threads,
      [&](const RowGroup& group) {
        std::copy_n(rows.largest + group.first, group.count, group.largest);
        std::fill(group.largest + group.count, group.largest + group.padded, kNoRow);
        std::fill(group.factor, group.factor + group.padded, 0.0f);
        std::fill(group.target_slope, group.target_slope + group.padded, 0.0f);
        for (int64_t r = 0; r < group.count; ++r) {
          const double slope = out.nll[group.first + r];
          group.factor[r] = static_cast<float>(slope / rows.sum[group.first + r]);
          // p - 1 without cancellation
          group.target_slope[r] =
              static_cast<float>(slope * std::expm1(-static_cast<double>(rows.nll[group.first + r])));
        }
      },
      [&](const RowGroup& group, const TokenRange& tokens, char* scratch, float* grad_rows) {
        kernel.gradients(p, group, tokens, kept_of_group(kept, group), scratch, out, grad_rows);
      });
}

}  // namespace loopmdm::cpu
