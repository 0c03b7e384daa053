// Bidirectional attention of heads that lie anywhere in memory, and its gradients.
//
// Keys and values of a head are packed once into the panels that attend() reads. A thread takes whole heads,
// so that they stay in its cache; heads left over are packed by all threads together, then each block of
// queries is a task.
#pragma once

#include <cstdint>

#include "cpu/machine/isa.h"

namespace loopmdm::cpu {

// [B, H, L, K], unit stride along K; strides in elements.
struct HeadsView {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionProblem {
  HeadsView q, k, v;
  const float* cos;  // [L, K/2] or null
  const float* sin;
  const bool* key_mask;  // [B, L] or null
  int64_t batch, heads, length, head_dim;
  bool is_bf16;  // all views; products are then of bf16 too. Otherwise float
};

struct AttentionOutput {
  HeadsView out;
  float* log_sum_exp;  // [B, H, L], base 2, of the scaled scores; attention() does without if it is null
};

struct AttentionGradients {
  HeadsView grad_out;
  HeadsView grad_q, grad_k, grad_v;  // written
};

// A head is named by b * H + h.
struct AttentionKernel {
  int64_t key_rows, query_rows;                      // of a task; key_rows is whole panels
  int64_t single_heads;                              // of a call of single, at most
  int64_t (*packed_bytes)(const AttentionProblem&);  // keys, values and bias of one head
  int64_t (*scratch_bytes)(const AttentionProblem&);
  int64_t (*backward_scratch_bytes)(const AttentionProblem&);
  // Keys [first, first + key_rows) and what pads the last ones.
  void (*pack)(const AttentionProblem&, int64_t head, int64_t first, void* packed, void* scratch);
  // Heads [first, first + count) of sequences of one token; false if it left them to pack and attend.
  bool (*single)(const AttentionProblem&, const AttentionOutput&, int64_t first, int64_t count,
                 void* scratch);
  // Queries [first, first + query_rows).
  void (*attend)(const AttentionProblem&, const AttentionOutput&, int64_t head, int64_t first,
                 const void* packed, void* scratch);
  void (*backward)(const AttentionProblem&, const AttentionOutput&, const AttentionGradients&, int64_t head,
                   void* scratch);
};

LOOPMDM_KERNEL(AttentionKernel, attention_kernel)

void attention(const AttentionProblem& problem, const AttentionOutput& out, Isa isa, int num_threads);

// `forward` holds what attention() wrote.
void attention_backward(const AttentionProblem& problem, const AttentionOutput& forward,
                        const AttentionGradients& gradients, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
