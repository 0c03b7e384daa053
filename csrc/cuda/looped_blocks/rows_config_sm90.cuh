// What `looped_rows_sm90` is compiled for and gets at launch, and how its blocks divide their shared memory.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/tile/stage_ring_sm90.cuh"
#include "cuda/tile/widths.cuh"

namespace loopmdm {

namespace looped_rows {

constexpr int kRows = 8;  // tokens of a block: the fewest that WGMMA multiplies
constexpr int kBlocks = LOOPMDM_BLOCKS, kHidden = Widths::kHidden, kMlp = Widths::kMlp;
constexpr int kGroups = kHidden % 128 == 0 ? 2 : 1;  // of four warps that compute, and one more warp loads
constexpr int kComputeThreads = 128 * kGroups, kThreads = kComputeThreads + 32;
constexpr int kWarps = kComputeThreads / 32;
constexpr int kFeatures = 64 * kGroups, kStep = 64;  // of a stage of weights; each group has 64 features
constexpr int kTiles = kHidden / kFeatures;          // of a product with D results
constexpr int kStageBytes = 2 * kFeatures * kStep;
// Operands lie in panels of 64 columns: whole heads, whose products with their values are made together.
constexpr int kPanels = kHidden / kStep, kHeadDim = Widths::kHeadDim, kHeads = kStep / kHeadDim;
// Features i and i + K/2 of a head are rotated together. A product takes every kTurnApart-th eight of a
// stage's features, so that a thread has both: where a stage has as many.
constexpr int kHalf = kHeadDim / 2;
constexpr bool kTurnsInThread = 8 * kHalf <= kFeatures;
constexpr int kTurnApart = kTurnsInThread ? kHalf / 8 : 1;
constexpr int kKeys = (kRows * kBlocks + 15) / 16 * 16, kKeyTiles = (kKeys + 63) / 64;
constexpr int kSumGroups = 8 * kKeyTiles;  // of eight keys

static_assert(kBlocks <= 16 && kKeyTiles <= 2, "a cluster, and keys that are met at once");
static_assert(kHidden % kFeatures == 0 && kMlp % kFeatures == 0, "all groups of warps have features");
static_assert(kHeadDim == 16 || kHeadDim == 32 || kHeadDim == 64, "whole heads in a panel");
static_assert(kMlp % (Widths::kMlpOutParts * kStep) == 0, "parts of whole stages");
static_assert(32 % (4 * Widths::kParts) == 0, "a warp normalises whole rows");

struct KernelParameters {
  const float* input;         // [B, L, D]
  float* output;              // [B, L, D]
  float* stream_values;       // [S + 1, B, L, D], the inputs of all loops; null if they are not kept
  uint16_t* qkv_values;       // [B, L, 2 D]: keys and values of one layer
  float2* change;             // squared norms, [B, kBlocks]
  const float4* affine;       // [n, modulated sequences, 2, D / 2]: gain, gain, shift, shift of two columns
  const float* gate;          // [n, modulated sequences, 2, D]
  const float* mlp_in_bias;   // [n, F]
  const float* mlp_out_bias;  // [n, D]
  const float* cosines;       // [L, K / 2] or null
  const float* sines;
  const uint8_t* key_mask;  // [B, L] or null
  int32_t* counters;        // [B]: how many blocks have told how much a loop has changed
  int32_t* stop;            // [B] loops of each sequence
  int32_t batch, length, modulated_sequences, adaptive;
  float exit_threshold;
  TensorMap qkv;  // [B, L, 2 D] by boxes of 8 rows and 64 columns
  // [n, out, in], boxes of kFeatures rows and 64 columns
  TensorMap qkv_weight, attn_out_weight, mlp_in_weight, mlp_out_weight;
};

// Floats of a row of what is kept by tokens: threads of a warp, at eight features of four pairs of tokens,
// meet in no bank. Nor do they in the stream where each quad has a part.
constexpr int kPartPitch = Widths::kPart + 8, kPitch = Widths::kParts * kPartPitch + 4;
constexpr int kTurnPitch = kHidden + 4;
constexpr int kSumPitch = kSumGroups + 1;
constexpr int kOperandBytes = kPanels * kRows * 128;
constexpr int kWeightBytes =
    kKeyTiles * kHeads * kRows * 128;  // weights of a panel's heads, as right operand

__device__ constexpr int atoms(int bytes) { return (bytes + 1023) / 1024 * 1024; }
__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// In bytes, from the end of the ring's stages.
struct Places {
  static constexpr int kKeyBytes = kPanels * kKeys * 128;
  // Scores are made of whole tiles of keys, also of what lies behind the last one: nobody may write it then.
  static constexpr int values = 0, keys = values + kKeyBytes;
  static constexpr int queries = keys + kKeyBytes;  // right operand
  static constexpr int stream = queries + kOperandBytes;
  static constexpr int input = stream + 4 * kRows * kPitch;  // of the loop
  static constexpr int statistics = input + 4 * kRows * kPitch;
  static constexpr int statistics_end = statistics + kRows * Widths::kParts * sizeof(PartStatistics);
  static_assert(keys + 128 * ((kPanels - 1) * kKeys + 64 * kKeyTiles) <= statistics_end,
                "not what is written");
  static constexpr int rows = atoms(statistics_end);  // right operand, normalised; mixed values
  static constexpr int wide = rows + kOperandBytes;   // weights of attention; activations of the MLP
  static constexpr int wide_bytes = larger(kGroups * kWeightBytes, kMlp / kStep * kRows * 128);
  static constexpr int sums = wide + wide_bytes;  // of exponentials; what threads rotate together, by tokens
  static constexpr int turn_bytes = kTurnsInThread ? 0 : 4 * kRows * kTurnPitch;
  static constexpr int sum_bytes = larger(turn_bytes, 4 * kGroups * kHeads * 32 * kSumPitch);
  static constexpr int largest = sums + sum_bytes;
  static constexpr int shares = largest + kGroups * 4 * kHeads * kRows * 4;
  static constexpr int changes = shares + kGroups * kHeads * kRows * 4;
  static constexpr int end = changes + kWarps * 8;
};

static_assert(atoms(Places::end) == LOOPMDM_BESIDE_BYTES, "as loopmdm_kernels/schedule/rows.py has it");
using Ring = StageRing<LOOPMDM_STAGES, kStageBytes, kWarps, 1, LOOPMDM_BESIDE_BYTES>;

struct Barriers {
  uint64_t arrived[2];  // keys of all blocks; values
  uint64_t free;        // all blocks have read theirs
  uint64_t decided;     // `goes_on` says whether there is one more loop
  uint32_t goes_on;
};

static_assert(16 * LOOPMDM_STAGES + sizeof(Barriers) <= 1024, "what a block has for barriers");

__device__ inline int rank() { return static_cast<int>(blockIdx.x) % kBlocks; }
__device__ inline int first_token() { return kRows * rank(); }

// The block's shared memory.
struct Memory {
  Ring ring;
  uint32_t base;
  Barriers* barriers;

  __device__ explicit Memory(uint8_t* memory)
      : ring(memory), base(ring.beside()), barriers(reinterpret_cast<Barriers*>(ring.behind())) {}

  __device__ uint32_t arrived(int kind) const { return shared_address(&barriers->arrived[kind]); }
  __device__ uint32_t free() const { return shared_address(&barriers->free); }
  __device__ uint32_t decided() const { return shared_address(&barriers->decided); }
  __device__ uint32_t goes_on() const { return shared_address(&barriers->goes_on); }
};

// Of the sequences those that the block's cluster has.
template <class Work>
__device__ void for_each_sequence(const KernelParameters& p, const Work& work) {
  const int clusters = static_cast<int>(gridDim.x) / kBlocks;
#pragma unroll 1
  for (int sequence = static_cast<int>(blockIdx.x) / kBlocks; sequence < p.batch; sequence += clusters) {
    work(sequence);
  }
}

}  // namespace looped_rows

}  // namespace loopmdm
