// What the kernel for Hopper has beside the common configuration.
#pragma once

#include "cuda/ptx/tma.cuh"
#include "cuda/tile/config.cuh"

namespace loopmdm {

constexpr int kThreads = Config::kComputeThreads + 128;        // and the group of the warp that loads
constexpr int kLoadRegisters = Config::kBlocks > 1 ? 72 : 56;  // of a thread that loads: for two takes more
constexpr int kInstructions = 4;                               // how many the loader may be ahead
// Of a tile of 64 rows, and so few columns, one group of warps has all: for its half each would read, and
// normalise, the same rows.
constexpr int kAloneColumns = 128;

// A head in shared memory: panels of 128 bytes, or one as narrow as the head.
constexpr int kHeadPanelBytes = Config::kHeadDim < 64 ? 2 * Config::kHeadDim : 128;
constexpr int kHeadPanels = 2 * Config::kHeadDim / kHeadPanelBytes;

static_assert(Config::kHeadDim == 16 || Config::kHeadDim == 32 || Config::kHeadDim == 64 ||
                  Config::kHeadDim == 128,
              "head size");

struct KernelParameters : Parameters {
  // Boxes: 32 columns of fp32 or 64 of bf16, kRows rows, or half of them where there are two sides; of
  // weights 64 by the block's columns. Where blocks share a tile q, k and v by 64 rows, weights by half of
  // the columns. [2 B, L, D] fp32; [2 B, L, 3 D], [B, L, D], [B, L, F], [B, L, D] bf16. `rows` for products
  // of normalised rows, `stream` for others.
  TensorMap stream, qkv, mixed, gelu, rows;
  TensorMap qkv_weight, attn_out_weight, mlp_in_weight, mlp_out_weight;  // [n, out, in] bf16
};

}  // namespace loopmdm
