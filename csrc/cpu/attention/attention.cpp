#include "cpu/attention/attention.h"

#include <algorithm>

#include "cpu/machine/buffer.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {

constexpr double kThreadWork = 5e5;  // multiply-adds that pay for a thread

int workers_for(const AttentionProblem& p, double products, int num_threads) {
  const double work = products * static_cast<double>(p.batch * p.heads) * static_cast<double>(p.length) *
                      static_cast<double>(p.length * p.head_dim);
  return static_cast<int>(std::clamp(work / kThreadWork, 1.0, static_cast<double>(num_threads)));
}

int64_t blocks_of(int64_t length, int64_t rows) { return (length + rows - 1) / rows; }

}  // namespace

void attention(const AttentionProblem& p, const AttentionOutput& out, Isa isa, int num_threads) {
  const AttentionKernel& kernel = attention_kernel(isa);
  const int64_t heads = p.batch * p.heads;
  const int64_t key_blocks = blocks_of(p.length, kernel.key_rows);
  const int64_t query_blocks = blocks_of(p.length, kernel.query_rows);
  const int wanted = workers_for(p, 2, num_threads);
  const int64_t scratch_bytes = kernel.scratch_bytes(p), packed_bytes = kernel.packed_bytes(p);
  const auto scratch = aligned_buffer<char>(scratch_bytes * wanted);
  // One head a worker: its own while there are enough, one of those left over afterwards.
  const auto packed = aligned_buffer<char>(packed_bytes * wanted);
  parallel(wanted, [&](Worker& worker) {
    char* const mine = scratch.get() + worker.index * scratch_bytes;
    char* const own = packed.get() + worker.index * packed_bytes;
    const auto attend_alone = [&](int64_t head) {
      for (int64_t block = 0; block < key_blocks; ++block)
        kernel.pack(p, head, block * kernel.key_rows, own, mine);
      for (int64_t block = 0; block < query_blocks; ++block)
        kernel.attend(p, out, head, block * kernel.query_rows, own, mine);
    };
    if (p.length == 1 && p.key_mask == nullptr)
      return worker.share(blocks_of(heads, kernel.single_heads), [&](int64_t group) {
        const int64_t first = group * kernel.single_heads;
        const int64_t count = std::min(kernel.single_heads, heads - first);
        if (kernel.single(p, out, first, count, mine)) return;
        for (int64_t head = first; head < first + count; ++head) attend_alone(head);
      });
    const int64_t alone = heads / worker.count * worker.count, rest = heads - alone;
    worker.share(alone, attend_alone);
    worker.share(rest * key_blocks, [&](int64_t task) {
      const int64_t index = task / key_blocks;
      kernel.pack(p, alone + index, task % key_blocks * kernel.key_rows, packed.get() + index * packed_bytes,
                  mine);
    });
    worker.share(rest * query_blocks, [&](int64_t task) {
      const int64_t index = task / query_blocks;
      kernel.attend(p, out, alone + index, task % query_blocks * kernel.query_rows,
                    packed.get() + index * packed_bytes, mine);
    });
  });
}

void attention_backward(const AttentionProblem& p, const AttentionOutput& forward,
                        const AttentionGradients& gradients, Isa isa, int num_threads) {
  const AttentionKernel& kernel = attention_kernel(isa);
  const int wanted = workers_for(p, 5, num_threads);
  const int64_t bytes = kernel.backward_scratch_bytes(p);
  const auto scratch = aligned_buffer<char>(bytes * wanted);
  for_each_task(p.batch * p.heads, wanted, [&](int64_t head, int worker) {
    kernel.backward(p, forward, gradients, head, scratch.get() + worker * bytes);
  });
}

}  // namespace loopmdm::cpu
