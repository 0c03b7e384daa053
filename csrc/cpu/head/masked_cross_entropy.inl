// The entries of the table, for either kind of operands.
#pragma once

#include "cpu/head/masked_cross_entropy_gradients.inl"
#include "cpu/head/masked_cross_entropy_statistics.inl"

CrossEntropySizes sizes(const MaskedCrossEntropyProblem& p, int64_t rows) {
  return p.bf16 ? sizes_of<Bf16>(p, rows) : sizes_of<Fp32>(p, rows);
}

void prepare(const MaskedCrossEntropyProblem& p, const RowGroup& g, int64_t block, void* scratch) {
  float* rows = static_cast<float*>(scratch);
  p.bf16 ? prepare_block<Bf16>(p, g, block, rows) : prepare_block<Fp32>(p, g, block, rows);
}

void statistics(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range, void* scratch,
                const ChunkStatistics& out, const KeptTiles& kept) {
  const TileScope scope;
  p.bf16 ? chunk_statistics<Bf16, uint16_t>(p, g, range, scratch, out, kept)
         : chunk_statistics<Fp32, float>(p, g, range, scratch, out, kept);
}

void gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
               const KeptTiles& kept, void* scratch, const MaskedCrossEntropyGradients& out,
               float* grad_rows) {
  const TileScope scope;
  p.bf16 ? chunk_gradients<Bf16, uint16_t>(p, g, range, kept, scratch, out, grad_rows)
         : chunk_gradients<Fp32, float>(p, g, range, kept, scratch, out, grad_rows);
}

void products(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
              const LogitGradients& given, void* scratch, const MaskedCrossEntropyGradients& out,
              float* grad_rows) {
  const TileScope scope;
  p.bf16 ? chunk_of_given<Bf16, uint16_t>(p, g, range, given, scratch, out, grad_rows)
         : chunk_of_given<Fp32, float>(p, g, range, given, scratch, out, grad_rows);
}

constexpr MaskedCrossEntropyKernel table = {sizes,    prepare,   statistics,    gradients,
                                            products, norm_sums, norm_gradients};
