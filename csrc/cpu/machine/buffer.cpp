#include "cpu/machine/buffer.h"

#include <new>

namespace loopmdm::cpu {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr int64_t kPage = 4096;
constexpr int kMostBlocks = 16;
constexpr int64_t kMostKept = 4 << 20;  // bytes of a thread, of all its blocks
constexpr int64_t kLoose = 4;           // a block may be so many times as large as what it is taken for

// What a thread keeps for its next call.
class Spare {
 public:
  ~Spare() {
    while (count_ > 0) ::operator delete(blocks_[--count_].memory, kAlign);
  }

  void* take(int64_t& bytes) {
    int best = -1;
    for (int i = 0; i < count_; ++i)
      if (blocks_[i].bytes >= bytes && blocks_[i].bytes <= kLoose * bytes &&
          (best < 0 || blocks_[i].bytes < blocks_[best].bytes))
        best = i;
    if (best < 0) return nullptr;
    const Block found = blocks_[best];
    blocks_[best] = blocks_[--count_];
    kept_ -= found.bytes;
    bytes = found.bytes;
    return found.memory;
  }

  bool give(void* memory, int64_t bytes) {
    if (count_ == kMostBlocks || kept_ + bytes > kMostKept) return false;
    blocks_[count_++] = {memory, bytes};
    kept_ += bytes;
    return true;
  }

 private:
  struct Block {
    void* memory;
    int64_t bytes;
  };
  Block blocks_[kMostBlocks];
  int count_ = 0;
  int64_t kept_ = 0;
};

thread_local Spare spare;

}  // namespace

void* take_memory(int64_t& bytes) {
  if (bytes >= kPage) {
    if (void* memory = spare.take(bytes)) return memory;
    bytes = (bytes + kPage - 1) / kPage * kPage;
  }
  void* memory = ::operator new(static_cast<size_t>(bytes), kAlign);
  prefer_large_pages(memory, bytes);
  return memory;
}

void give_memory(void* memory, int64_t bytes) {
  if (bytes < kPage || !spare.give(memory, bytes)) ::operator delete(memory, kAlign);
}

}  // namespace loopmdm::cpu
