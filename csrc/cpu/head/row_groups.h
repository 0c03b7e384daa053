// Groups of rows, chunks of the vocabulary, and the way from the logits' gradients back through both.
#pragma once

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/head/masked_cross_entropy.h"
#include "cpu/linear/linear.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

constexpr double kThreadWork = 1e6;    // multiply-adds that pay for another thread
constexpr int64_t kSliceColumns = 64;  // columns of the layer norm's gradients that are one task

struct Chunks {
  int64_t vocab_size, tokens, count, tile, tiles;  // tiles: of a chunk

  explicit Chunks(int64_t vocab_size) : vocab_size(vocab_size) {
    const int64_t wanted = std::clamp<int64_t>(vocab_size / kMinChunkTokens, 1, kMaxChunks);
    tokens = round_up((vocab_size + wanted - 1) / wanted, 2);
    count = (vocab_size + tokens - 1) / tokens;
    const int64_t needed = (tokens + kTileTokens - 1) / kTileTokens;
    tile = round_up((tokens + needed - 1) / needed, 12);  // whole register tiles
    tiles = (tokens + tile - 1) / tile;
  }
  static_assert(kTileTokens % 12 == 0);

  TokenRange operator[](int64_t chunk) const {
    return {chunk * tokens, std::min((chunk + 1) * tokens, vocab_size), tile, chunk * tiles};
  }
};

// Adds up one buffer of each chunk in the shape of a binary tree: in an order that does not depend on which
// chunk is ready first, without waiting, and with few buffers alive at a time.
class TreeSum {
 public:
  TreeSum(int64_t leaves, int64_t size) : size_(size) {
    for (int64_t count = leaves; count > 1; count = (count + 1) / 2)
      levels_.push_back({count, std::vector<float*>(static_cast<size_t>((count + 1) / 2))});
  }

  float* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      buffers_.push_back(aligned_buffer<float>(size_));
      return buffers_.back().get();
    }
    float* buffer = free_.back();
    free_.pop_back();
    return buffer;
  }

  void give(int64_t leaf, float* values) {
    for (Level& level : levels_) {
      const int64_t index = leaf;
      leaf /= 2;
      if ((index ^ 1) >= level.count) continue;  // the last one, alone
      float* sibling;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        sibling = std::exchange(level.waiting[static_cast<size_t>(leaf)], values);
      }
      if (sibling == nullptr) return;
      for (int64_t i = 0; i < size_; ++i) values[i] += sibling[i];
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(sibling);
    }
    total_ = values;
  }

  const float* total() const { return total_; }

 private:
  struct Level {
    int64_t count;
    std::vector<float*> waiting;  // of each pair, the one that was ready first
  };

  const int64_t size_;
  std::vector<Level> levels_;
  std::mutex mutex_;
  std::vector<AlignedBuffer<float>> buffers_;
  std::vector<float*> free_;
  float* total_ = nullptr;
};

// Memory of one group of rows at a time.
class GroupBuffers {
 public:
  GroupBuffers(const CrossEntropySizes& sizes, bool with_pairs)
      : columns_(aligned_buffer<uint32_t>(sizes.columns)),
        targets_(aligned_buffer<int32_t>(sizes.padded_rows)),
        numbers_(aligned_buffer<float>(kNumbers * sizes.padded_rows)) {
    if (with_pairs) pairs_ = aligned_buffer<uint32_t>(sizes.pairs);
  }

  RowGroup group(const MaskedCrossEntropyProblem& p, int64_t first, int64_t count, int64_t padded) const {
    float* n = numbers_.get();
    std::fill(targets_.get(), targets_.get() + padded, -1);
    if (p.targets != nullptr)
      for (int64_t r = 0; r < count; ++r) targets_[r] = static_cast<int32_t>(p.targets[first + r]);
    return {first,      count,          padded,         columns_.get(), pairs_.get(),   targets_.get(), n,
            n + padded, n + 2 * padded, n + 3 * padded, n + 4 * padded, n + 5 * padded, n + 6 * padded};
  }

 private:
  static constexpr int64_t kNumbers = 7;
  AlignedBuffer<uint32_t> columns_, pairs_;
  AlignedBuffer<int32_t> targets_;
  AlignedBuffer<float> numbers_;
};

inline int useful_workers(const MaskedCrossEntropyProblem& p, int64_t chunks, int num_threads) {
  const double work = static_cast<double>(std::min(p.num_rows, kGroupRows)) *
                      static_cast<double>(p.vocab_size) * static_cast<double>(p.width);
  const double useful = std::max(1.0, work / kThreadWork);
  return static_cast<int>(
      std::min<double>(useful, static_cast<double>(std::min<int64_t>(num_threads, chunks))));
}

// Calls body(group, sizes) for the groups of rows in order.
template <class Body>
void for_each_group(const MaskedCrossEntropyProblem& p, const MaskedCrossEntropyKernel& kernel,
                    bool with_pairs, Body&& body) {
  const GroupBuffers buffers(kernel.sizes(p, std::min(p.num_rows, kGroupRows)), with_pairs);
  for (int64_t first = 0; first < p.num_rows; first += kGroupRows) {
    const int64_t count = std::min(kGroupRows, p.num_rows - first);
    const CrossEntropySizes sizes = kernel.sizes(p, count);
    body(buffers.group(p, first, count, sizes.padded_rows), sizes);
  }
}

// Gradients of all but the logits, group by group. `ready(group)` completes a group before its work begins;
// `of_chunk(group, tokens, scratch, grad_rows)` makes the logits' gradients of a chunk of the vocabulary and
// multiplies them, see MaskedCrossEntropyKernel::gradients.
template <class Ready, class OfChunk>
void gradients_of_groups(const MaskedCrossEntropyProblem& p, const MaskedCrossEntropyKernel& kernel,
                         const MaskedCrossEntropyGradients& out, int num_threads, Ready&& ready,
                         OfChunk&& of_chunk) {
  const Chunks chunks(p.vocab_size);
  const int workers = useful_workers(p, chunks.count, num_threads);
  const CrossEntropySizes most = kernel.sizes(p, std::min(p.num_rows, kGroupRows));
  const auto scratch = aligned_buffer<char>(workers * most.backward_scratch);
  if (out.weight != nullptr)
    prefer_large_pages(out.weight, p.vocab_size * p.width * (out.weight_is_bf16 ? 2 : 4));
  const bool with_rows = out.hidden != nullptr || out.norm != nullptr || out.shift != nullptr;

  for_each_group(
      p, kernel, out.weight != nullptr, [&](const RowGroup& group, const CrossEntropySizes& sizes) {
        ready(group);
        TreeSum grad_rows(chunks.count, group.count * sizes.padded_width);
        const int64_t blocks = (group.count + sizes.block - 1) / sizes.block;
        parallel(workers, [&](Worker& worker) {
          char* memory = scratch.get() + worker.index * most.backward_scratch;
          worker.share(blocks, [&](int64_t block) { kernel.prepare(p, group, block, memory); });
          worker.share(chunks.count, [&](int64_t chunk) {
            float* partial = with_rows ? grad_rows.take() : nullptr;
            of_chunk(group, chunks[chunk], memory, partial);
            if (with_rows) grad_rows.give(chunk, partial);
          });
          if (!with_rows) return;
          worker.share(blocks, [&](int64_t block) { kernel.norm_sums(p, group, block, grad_rows.total()); });
          worker.share((p.width + kSliceColumns - 1) / kSliceColumns, [&](int64_t slice) {
            const int64_t first = slice * kSliceColumns;
            kernel.norm_gradients(p, group, first, std::min(first + kSliceColumns, p.width),
                                  grad_rows.total(), out);
          });
        });
      });
}

}  // namespace loopmdm::cpu
