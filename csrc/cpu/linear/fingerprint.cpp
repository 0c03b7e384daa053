#include "cpu/linear/fingerprint.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/machine/threads.h"

namespace loopmdm::cpu {
namespace {

constexpr int64_t kLine = 64, kBlock = 1024, kWhole = 1 << 20, kAhead = 24;  // bytes, and blocks to prefetch
// A vocabulary: a line of each 4 KB would take a quarter of the time of sampling one row, as every line is on
// a page of its own, of which none is in the cache.
constexpr int64_t kLarge = 16 << 20, kLargeBlock = 16384;
constexpr int64_t kPartBlocks = 2048, kPartBytes = 256 << 10;  // of a thread's task
constexpr int kWords = kLine / 8;
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio

// One to one in `word` and in `hash`: no single change is lost.
inline uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * kOdd;
  return hash ^ (hash >> 29);
}

class Hash {
 public:
  // `bytes` <= kLine; what is missing counts as zero.
  void add(const char* line, int64_t bytes = kLine) {
    uint64_t words[kWords] = {};
    std::memcpy(words, line, static_cast<size_t>(bytes));
    for (int i = 0; i < kWords; ++i) lanes_[i] = mix(lanes_[i], words[i]);
  }

  uint64_t finish(int64_t bytes) const {
    uint64_t hash = static_cast<uint64_t>(bytes);
    for (const uint64_t lane : lanes_) hash = mix(hash, lane);
    return hash;
  }

 private:
  uint64_t lanes_[kWords] = {};
};

inline int64_t line_of(int64_t block, int64_t size) {
  return block * size + static_cast<int64_t>((static_cast<uint64_t>(block) * kOdd) >> 60) * kLine;
}

uint64_t hash_blocks(const char* at, int64_t size, int64_t first, int64_t last) {
  Hash hash;
  for (int64_t i = first; i < last; ++i) {
    __builtin_prefetch(at + line_of(std::min(i + kAhead, last - 1), size));
    hash.add(at + line_of(i, size));
  }
  return hash.finish(last - first);
}

uint64_t hash_whole(const char* at, int64_t bytes) {
  Hash hash;
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) hash.add(at + i);
  if (i < bytes) hash.add(at + i, bytes - i);
  return hash.finish(bytes);
}

// The hashes of all parts in order, each by whichever thread is free.
template <class HashPart>
uint64_t hash_parts(int64_t parts, int num_threads, uint64_t all, const HashPart& hash_part) {
  std::vector<uint64_t> hashes(static_cast<size_t>(parts));
  for_each_task(parts, static_cast<int>(std::min<int64_t>(num_threads, parts)),
                [&](int64_t part, int) { hashes[static_cast<size_t>(part)] = hash_part(part); });
  for (const uint64_t hash : hashes) all = mix(all, hash);
  return all;
}

}  // namespace

uint64_t fingerprint(const void* data, int64_t bytes, int num_threads) {
  const char* at = static_cast<const char*>(data);
  if (bytes <= kPartBytes) return hash_whole(at, bytes);
  if (bytes <= kWhole) {
    const int64_t parts = (bytes + kPartBytes - 1) / kPartBytes;
    return hash_parts(parts, num_threads, static_cast<uint64_t>(bytes), [&](int64_t part) {
      return hash_whole(at + part * kPartBytes, std::min(kPartBytes, bytes - part * kPartBytes));
    });
  }
  const int64_t size = bytes < kLarge ? kBlock : kLargeBlock;
  const int64_t blocks = bytes / size, parts = (blocks + kPartBlocks - 1) / kPartBlocks;
  Hash last;
  last.add(at + bytes - kLine);
  return hash_parts(parts, num_threads, last.finish(bytes), [&](int64_t part) {
    return hash_blocks(at, size, part * kPartBlocks, std::min(blocks, (part + 1) * kPartBlocks));
  });
}

}  // namespace loopmdm::cpu
