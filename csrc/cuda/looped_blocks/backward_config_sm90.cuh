// What the backward kernel gets at launch, and how it divides its shared memory.
#pragma once

#include "cuda/tile/config_sm90.cuh"

namespace loopmdm {

namespace backward {

constexpr int kColumns = Config::kQkvColumns;  // of every product's tile
constexpr int kPart = 16;                      // rows of a block that go through a norm together
constexpr uint32_t kPanelBytes = 64 * 128;     // of 64 rows by 64 columns in bf16: the box of every map
constexpr int kWarps = Config::kComputeThreads / 32;
constexpr int kLoadRegisters = 56;  // of a thread that loads: sums of 256 columns take what there is

static_assert(Config::kRows == 128 && Config::kColumnGroups == 1, "a warp group has half of the rows");
static_assert(Config::kNormRows == Config::kBlocks * kPart, "of an instruction");
static_assert(Config::kHeadDim == 64 || Config::kHeadDim == 128, "head size");
static_assert(Config::kKeyBlock == 128 && Config::kMlpOutParts == 1, "as loaded");
static_assert(kColumns == Config::kAttnOutColumns && kColumns == Config::kMlpInColumns &&
                  kColumns == Config::kMlpOutColumns,
              "all products have tiles of one width");
static_assert(kColumns % Config::kHeadDim == 0 && Config::kHidden % kColumns == 0 &&
                  Config::kMlp % kColumns == 0,
              "whole tiles of whole heads");
static_assert((2 + kColumns / 64) * kPanelBytes <= Config::kStageBytes &&
                  2 * kHeadPanels * kPanelBytes <= Config::kStageBytes,
              "a stage holds a step of a product, a block of keys or values of 128, or both of 64");

// Everything of a layer and sequence lies together: [n, B, L, ...].
struct Parameters {
  // bf16, in boxes of 64 by 64: operands [n B, L, ...], weights [n, out, in].
  TensorMap rows1, qkv, mixed, rows2, gelu, grad_branch2, grad_mlp_in, grad_branch1, grad_mixed, grad_qkv;
  TensorMap qkv_weight, attn_out_weight, mlp_in_weight, mlp_out_weight;
  const float* loop_inputs;  // [S or more, B, L, D]: inputs of the loops
  float* grad;               // [B, L, D]: of the stream; that of the result before, that of x after
  // Record of a loop.
  float* middle;       // the stream between attention and MLP
  float* state;        // the stream before each layer; of the first layer it is the loop's input
  float* log_sum_exp;  // [n, B, H, rows of all tiles]: to base 2
  uint16_t* rows1_values;
  uint16_t* qkv_values;
  uint16_t* mixed_values;
  uint16_t* branch1_values;
  uint16_t* rows2_values;
  uint16_t* mlp_in_values;
  uint16_t* gelu_values;
  uint16_t* branch2_values;
  // Gradients.
  float* grad_rows;  // [B, L, D]: of modulated rows
  float* inner;      // like `log_sum_exp`: product of attention's output and its gradient
  uint16_t* grad_branch2_values;
  uint16_t* grad_mlp_in_values;
  uint16_t* grad_branch1_values;
  uint16_t* grad_mixed_values;
  uint16_t* grad_qkv_values;
  // Sums over all loops. Parts are of kPart rows; of the bias those of a warp.
  float* norms;             // [n, 2, 2, B, parts, D]
  float* gates;             // [n, 2, B, parts, D]
  float* grad_branch;       // [n, B, parts, D]
  float* grad_mlp_in_bias;  // [n, B, parts, F]
  float* grad_qkv_weight;
  float* grad_attn_out_weight;
  float* grad_mlp_in_weight;
  float* grad_mlp_out_weight;
  // As in the forward kernel.
  const float4* affine;
  const float* gate;
  const float* mlp_in_bias;
  const float* mlp_out_bias;
  const float* cosines;
  const float* sines;
  const uint8_t* key_mask;
  const Instruction* table;
  int32_t* counters;
  const int32_t* stop;       // [B] loops of each sequence
  const int32_t* max_loops;  // the largest
  int32_t instructions, batch, length, row_tiles, modulated_sequences;

  __device__ int64_t token(int sequence, int row) const {
    return static_cast<int64_t>(sequence) * length + row;
  }
  __device__ int place(int layer, int sequence) const { return layer * batch + sequence; }
  __device__ int64_t first_token(const Instruction& item) const {
    return token(place(item.layer, item.sequence), 0);
  }
  // Of a head's numbers for each row.
  __device__ int64_t head_rows(const Instruction& item, int head) const {
    const int64_t heads = static_cast<int64_t>(place(item.layer, item.sequence)) * Config::kHeads + head;
    return heads * row_tiles * Config::kTileRows;
  }
  // `number`: of the part in its row tile.
  __device__ int64_t part(int vectors, int sequence, int row, int number) const {
    constexpr int kParts = Config::kTileRows / kPart;
    return (static_cast<int64_t>(vectors) * batch + sequence) * row_tiles * kParts + row * kParts + number;
  }
  // The stream before a layer, of one sequence.
  __device__ const float* before_layer(const Instruction& item, int32_t loop) const {
    const float* const first = item.layer == 0 ? loop_inputs + token(loop * batch, 0) * Config::kHidden
                                               : state + token(place(item.layer, 0), 0) * Config::kHidden;
    return first + token(item.sequence, 0) * Config::kHidden;
  }
};
static_assert(kWarps == Config::kRows / kPart, "parts of the bias are those of the rows");

}  // namespace backward

}  // namespace loopmdm
