// Gradients of a stack of blocks applied S times, from the records of the forward pass.
//
// Applications are visited from the last to the first, for some sequences at a time. The gradient of the
// residual stream stays in one fp32 buffer; weight gradients are products summed over those sequences' rows
// and are added to fp32 accumulators, in a fixed order whatever the number of threads.
#pragma once

#include "cpu/looped_blocks/looped_blocks.h"

namespace loopmdm::cpu {

// Weights packed for products with gradients: panels of the transposed matrices.
struct TransposedPointers {
  const uint32_t *qkv, *attn_out, *mlp_in, *mlp_out;
};

// Accumulators of one block: [out, padded in] for weights, sums over modulation rows for vectors, which are
// added to.
struct BlockGradients {
  float *qkv, *attn_out, *mlp_in, *mlp_out;
  float* mlp_in_bias;   // [F]
  float* mlp_out_bias;  // [D]
  float* modulation;    // [M, 6, D]: of shift, gain, gate; twice. Gains include the norm's scale.
};

struct LoopedBlocksBackwardProblem {
  LoopedBlocksProblem forward;  // x is not read
  const TransposedPointers* transposed;
  char* records;
  float* grad_x;                    // [B, L, D]: in of the output, out of the input
  const BlockGradients* gradients;  // [n]
  bool add;                         // to the gradients of the weights; else the first sums overwrite them
  int64_t* nanoseconds;             // [kBackwardPhases], added to, or null
};

// What follows one another in an application: MLP and output projection, attention, projections and first
// norm, weight gradients.
constexpr int kBackwardPhases = 4;

// An operand of a product summed over rows: panels of at most kPanel columns, [row words][columns].
struct RowPanels {
  uint32_t* at;
  int64_t columns;  // padded
  int64_t words;    // rows / operands per word
};

struct PanelRange {
  int64_t first, last;
};

// The operands of the weight gradients of one application: left of the outputs, right of the inputs.
struct ApplicationPanels {
  RowPanels grad_branch2, activated, grad_mlp_in, act2, grad_branch1, mixed, grad_qkv, act1;
};

// Sums over some rows of one sequence.
struct VectorSums {
  float* modulation;  // [6, padded D]
  float* mlp_in_bias;
  float* mlp_out_bias;
};

// Rows of one sequence inside the working set of an application.
struct GradientRows {
  int64_t first, count;  // in the sequence; first is even
  int64_t panel_row;     // where they start in the panels
  float* grad_x;         // [count, padded D] residual stream
  float* grad_mixed;     // [count, padded D] gradient of the attention output
  uint32_t* grad_qkv;    // [count, words of 3D] gradient of q, k, v
};

struct GradientSpan : GradientRows {
  BlockVectors vectors;
  BlockRecord record;
  int64_t first_element;  // of the sequence in [B, L, D], names the random numbers
  VectorSums sums;
};

// Spans whose rows go through each product together. Their rows of `grad_mixed` and of `grad_qkv` lie one
// after the other.
struct GradientSpans {
  const GradientSpan* at;
  int64_t size, rows;
};

struct LoopedBlocksBackwardKernel {
  int64_t (*scratch_bytes)(const BlockShape&);
  // The MLP, then the output projection of attention.
  void (*finish)(const BlockShape&, bool bf16, const TransposedPointers&, const Dropout&,
                 const GradientSpans&, const ApplicationPanels&, void* scratch);
  // One head of one sequence; rows are all of the sequence's.
  void (*head)(const BlockShape&, bool bf16, const BlockRecord&, const SequenceState&, int64_t head,
               const GradientRows&, void* scratch);
  // The projections of q, k, v and the norm before them.
  void (*project)(const BlockShape&, bool bf16, const TransposedPointers&, const GradientSpans&,
                  const ApplicationPanels&, void* scratch);
  // gradient[out, padded in] = or += left^T right for some panels of both.
  void (*weight)(bool bf16, const RowPanels& left, int64_t out, const PanelRange& left_range,
                 const RowPanels& right, const PanelRange& right_range, float* gradient, bool add);
};

LOOPMDM_KERNEL(LoopedBlocksBackwardKernel, looped_blocks_backward_kernel)

void looped_blocks_backward(const LoopedBlocksBackwardProblem& problem, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
