#include "cpu/linear/linear.h"

#include <algorithm>

#include "cpu/machine/buffer.h"
#include "cpu/machine/threads.h"

namespace loopmdm::cpu {

namespace {
constexpr int64_t kThreadWords = 1 << 16;  // words that pay for waking a thread
}  // namespace

LinearLayout linear_layout(const LinearKernel& kernel, int64_t columns, int64_t depth, int64_t head_dim,
                           bool bf16) {
  const int64_t unit = head_dim ? head_dim : columns;
  // A plain matrix is padded to whole pairs of vectors, which elementwise passes read at a time.
  const int64_t unit_width = round_up(unit, head_dim ? kernel.lanes : 2 * kernel.lanes);
  return {unit,
          unit_width,
          columns / unit,
          std::max<int64_t>(1, kernel.panel / unit_width),
          bf16 ? (depth + 1) / 2 : depth,
          kernel.panel};
}

void pack_linear(const LinearSource& source, const LinearLayout& layout, bool bf16, uint32_t* packed,
                 bool fresh, Isa isa, int num_threads) {
  const LinearKernel& kernel = linear_kernel(isa);
  if (fresh) prefer_large_pages(packed, layout.size() * 4, true);
  const int64_t panels = layout.panels_per_group();
  const int workers = static_cast<int>(std::min<int64_t>(num_threads, 1 + layout.size() / kThreadWords));
  for_each_task(layout.num_groups() * panels, workers, [&](int64_t task, int) {
    kernel.pack_panel(source, layout, bf16, task / panels, task % panels, packed);
  });
}

}  // namespace loopmdm::cpu
