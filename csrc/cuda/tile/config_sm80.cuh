// What the kernel for the GPUs before Hopper has beside the common configuration.
#pragma once

#include "cuda/tile/config.cuh"

namespace loopmdm {

static_assert(Config::kHeadDim == 32 || Config::kHeadDim == 64 || Config::kHeadDim == 128, "head size");
static_assert(Config::kNormRows == 0 && Config::kBlocks == 1,
              "rows are normalised on their way into a product");
static_assert(Config::kStages >= 2, "one stage is filled while another is read");

constexpr int kAloneColumns = 0;  // every group of warps has a share of each tile

struct KernelParameters : Parameters {
  // [n, out, in]
  const uint16_t* qkv_weight;
  const uint16_t* attn_out_weight;
  const uint16_t* mlp_in_weight;
  const uint16_t* mlp_out_weight;
};

}  // namespace loopmdm
