// masked_cross_entropy on the CPU, forward and backward.
//
// Logits exist only as tiles of some tokens by one panel of rows, tokens down and rows across: a row is a
// vector lane, so its maximum and its sum need no shuffles, and the weights are the left operand of the
// product, which is read as it lies in memory. The forward pass keeps the maximum and the sum of each row,
// and exp(logit - maximum so far) of a tile in the memory where the backward pass will put the gradient of
// the tile's weights, as far as it fits. The backward pass reads these exponentials, or computes the same
// ones again, turns them into the gradient of the logits, and multiplies that by the normalised rows
// (gradient of the weights) and by the weights (gradient of the rows) while it is in the cache.
#pragma once

#include <cstdint>

#include "cpu/machine/isa.h"

namespace loopmdm::cpu {

// The arithmetic depends on the sizes and on these numbers, never on the threads. A chunk of the vocabulary
// is the work of one thread; results of chunks are combined in a fixed order.
constexpr int64_t kTileTokens = 192;  // at most: weights and logits' gradients of a tile share the L2
constexpr int64_t kMinChunkTokens = 768;
constexpr int64_t kMaxChunks = 32;
constexpr int64_t kGroupRows = 512;  // rows that share one passage of the weights

struct MaskedCrossEntropyProblem {
  const float* hidden;      // [B*L, D]
  const int64_t* rows;      // [R] indices into hidden
  const int64_t* targets;   // [R], null: none
  const float* norm;        // [D]
  const float* shift;       // [M, D]
  const float* gain;        // [M, D], 1 + scale
  const void* weight;       // [V, D] float or bf16
  const float* bias;        // [V]
  int64_t num_rows;         // R
  int64_t rows_per_group;   // rows of hidden that share a row of shift and gain: L, or B*L if M = 1
  int64_t num_modulations;  // M
  int64_t width;            // D
  int64_t vocab_size;       // V
  int64_t excluded_token;   // -1: none
  bool weight_is_bf16;
  bool bf16;        // bf16 operands
  bool normalized;  // rows go through the layer norm; else they are taken as they are, and norm is 1
};

// Of each row: the largest logit, the sum of exp(logit - largest), and the loss.
struct RowLosses {
  float* largest;  // [R]
  float* sum;      // [R]
  float* nll;      // [R]
};

// What the forward pass leaves of each tile. Exponentials are bf16 for bf16 operands, float otherwise, and
// are those of the first group of rows only: the gradients of this group overwrite them.
struct KeptTiles {
  float* largest;      // [tiles, R] the largest logit of a row up to this tile of its chunk; null: not wanted
  char* exponentials;  // [V, token_bytes], null: none; may be the gradient of the weights
  int64_t token_bytes;
};

struct MaskedCrossEntropyGradients {
  const float* nll;  // [R] gradient of each row's loss, null: the logits' gradients are given
  float* hidden;     // [B*L, D] zero at first, or null: not wanted; so are all the others
  float* norm;       // [D]
  float* shift;      // [M, D]
  float* scale;      // [M, D]
  void* weight;      // [V, D] float or bf16; float only where R > kGroupRows
  float* bias;       // [V]
  bool weight_is_bf16;
};

struct LogitGradients {
  const void* values;  // [B*L, V] bf16 for bf16 operands, else float
};

// At most kGroupRows rows, normalised, as operands; padded with zero rows to whole pairs of vectors.
struct RowGroup {
  int64_t first, count, padded;
  uint32_t* columns;    // panels of rows, [words of D][rows of the panel]: right operand of the logits
  uint32_t* pairs;      // panels of D, [words of rows][columns of the panel]: right operand of dweight
  int32_t* targets;     // [padded], -1 where there is no row
  float* mean;          // [padded] of hidden
  float* scale;         // [padded] 1 / standard deviation
  float* largest;       // [padded] the largest logit
  float* factor;        // [padded] gradient of a logit, over exp(logit - largest), except that
  float* target_slope;  // [padded] of the target's
  float* slope_mean;    // [padded] mean of the gradient of a normalised row, and of its product with the row
  float* slope_row;
};

struct CrossEntropySizes {
  int64_t columns, pairs;                     // words of a group of kGroupRows rows, or of fewer
  int64_t padded_rows;                        // rows of the group, padded
  int64_t padded_width;                       // D, padded
  int64_t forward_scratch, backward_scratch;  // bytes of one thread
  int64_t block;                              // rows that one call of `prepare` handles
};

// Partial sums of a chunk of the vocabulary, each [padded rows].
struct ChunkStatistics {
  float* largest;
  float* sum;
  float* target;  // the logit of the target, written where it is in the chunk
};

struct TokenRange {
  int64_t first, last, tile;
  int64_t first_tile;  // its number in the vocabulary
};

// The functions of one instruction set.
struct MaskedCrossEntropyKernel {
  CrossEntropySizes (*sizes)(const MaskedCrossEntropyProblem&, int64_t rows);
  // Operands and moments of block `block` of the group's rows; pairs may be null.
  void (*prepare)(const MaskedCrossEntropyProblem&, const RowGroup&, int64_t block, void* scratch);
  void (*statistics)(const MaskedCrossEntropyProblem&, const RowGroup&, const TokenRange&, void* scratch,
                     const ChunkStatistics& out, const KeptTiles& kept);
  // Gradients of weight and bias of the tokens, and of the normalised rows [count, padded width] (null: not
  // wanted), which is overwritten.
  void (*gradients)(const MaskedCrossEntropyProblem&, const RowGroup&, const TokenRange&,
                    const KeptTiles& kept, void* scratch, const MaskedCrossEntropyGradients& out,
                    float* grad_rows);
  // The same from given gradients of the logits.
  void (*products)(const MaskedCrossEntropyProblem&, const RowGroup&, const TokenRange&,
                   const LogitGradients& given, void* scratch, const MaskedCrossEntropyGradients& out,
                   float* grad_rows);
  // The sums over D that the gradient of a row's layer norm needs, of block `block`.
  void (*norm_sums)(const MaskedCrossEntropyProblem&, const RowGroup&, int64_t block, const float* grad_rows);
  // Gradients of hidden, norm and modulation in columns [first, last) of all rows of the group, added.
  void (*norm_gradients)(const MaskedCrossEntropyProblem&, const RowGroup&, int64_t first, int64_t last,
                         const float* grad_rows, const MaskedCrossEntropyGradients& out);
};

LOOPMDM_KERNEL(MaskedCrossEntropyKernel, masked_cross_entropy_kernel)

// Tiles of a vocabulary.
int64_t cross_entropy_tiles(int64_t vocab_size);

// Writes each row's loss, and the sum of the losses times `row_weights`.
void masked_cross_entropy(const MaskedCrossEntropyProblem& problem, const float* row_weights, float* total,
                          const RowLosses& out, const KeptTiles& kept, Isa isa, int num_threads);

// The result does not depend on whether exponentials were kept.
void masked_cross_entropy_backward(const MaskedCrossEntropyProblem& problem, const RowLosses& rows,
                                   const KeptTiles& kept, const MaskedCrossEntropyGradients& out, Isa isa,
                                   int num_threads);

}  // namespace loopmdm::cpu
