// The AMX level of the products and of attention as a library for test_amx.py, on emulated instructions.
#include "cpu/attention/attention.h"

#include "common/row_math.h"
#include "cpu/machine/intrinsics.h"

namespace loopmdm::cpu {
namespace {
#include "cpu/attention/attention.inl"
}  // namespace
}  // namespace loopmdm::cpu

namespace cpu = loopmdm::cpu;

extern "C" {

void multiply(const uint32_t* a, int64_t a_row, int64_t a_step, int64_t rows, const uint32_t* b, int width,
              int64_t words, float* c, int64_t c_row, bool accumulate) {
  cpu::multiply<cpu::Bf16>({a, a_row, a_step}, rows, b, width, words, c, c_row, accumulate);
}

// bf16 [H, L, K] each; tensors: q, k, v, out, grad_out, grad_q, grad_k, grad_v. The memory is as large as
// memory_bytes() says.
void attention(uint16_t* const* tensors, const bool* key_mask, int64_t heads, int64_t length,
               int64_t head_dim, float* log_sum_exp, void* packed, void* scratch) {
  const auto view = [&](int i) {
    return cpu::HeadsView{tensors[i], heads * length * head_dim, length * head_dim, head_dim};
  };
  const cpu::AttentionProblem problem = {view(0), view(1), view(2), nullptr,  nullptr, key_mask,
                                         1,       heads,   length,  head_dim, true};
  const cpu::AttentionOutput out = {view(3), log_sum_exp};
  const cpu::AttentionGradients gradients = {view(4), view(5), view(6), view(7)};
  const cpu::AttentionKernel& kernel = cpu::table;
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t first = 0; first < length; first += kernel.key_rows)
      kernel.pack(problem, head, first, packed, scratch);
    for (int64_t first = 0; first < length; first += kernel.query_rows)
      kernel.attend(problem, out, head, first, packed, scratch);
    kernel.backward(problem, out, gradients, head, scratch);
  }
}

int64_t memory_bytes(int64_t length, int64_t head_dim) {
  cpu::AttentionProblem problem = {};
  problem.batch = problem.heads = 1;
  problem.length = length;
  problem.head_dim = head_dim;
  problem.is_bf16 = true;
  const cpu::AttentionKernel& kernel = cpu::table;
  return kernel.packed_bytes(problem) + kernel.scratch_bytes(problem) +
         kernel.backward_scratch_bytes(problem);
}

// Since the last call: faults, configurations loaded, tile products, whether tiles are still configured.
void take_counts(int64_t* counts) {
  emulated::TileUnit& unit = emulated::unit;
  counts[0] = unit.faults;
  counts[1] = unit.configurations;
  counts[2] = unit.products;
  counts[3] = unit.configured;
  unit.faults = unit.configurations = unit.products = 0;
}

}  // extern "C"
