// The entries of the table, for either kind of operands.

CrossEntropySizes sizes(const MaskedCrossEntropyProblem& p, int64_t rows) {
  return p.narrow ? sizes_of<Narrow>(p, rows) : sizes_of<Wide>(p, rows);
}

void prepare(const MaskedCrossEntropyProblem& p, const RowGroup& g, int64_t block, void* scratch) {
  float* rows = static_cast<float*>(scratch);
  p.narrow ? prepare_block<Narrow>(p, g, block, rows) : prepare_block<Wide>(p, g, block, rows);
}

void statistics(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range, void* scratch,
                const ChunkStatistics& out, const KeptTiles& kept) {
  const TileScope scope;
  p.narrow ? chunk_statistics<Narrow, uint16_t>(p, g, range, scratch, out, kept)
           : chunk_statistics<Wide, float>(p, g, range, scratch, out, kept);
}

void gradients(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
               const KeptTiles& kept, void* scratch, const MaskedCrossEntropyGradients& out,
               float* rows_grad) {
  const TileScope scope;
  p.narrow ? chunk_gradients<Narrow, uint16_t>(p, g, range, kept, scratch, out, rows_grad)
           : chunk_gradients<Wide, float>(p, g, range, kept, scratch, out, rows_grad);
}

void products(const MaskedCrossEntropyProblem& p, const RowGroup& g, const TokenRange& range,
              const LogitGradients& given, void* scratch, const MaskedCrossEntropyGradients& out,
              float* rows_grad) {
  const TileScope scope;
  p.narrow ? chunk_of_given<Narrow, uint16_t>(p, g, range, given, scratch, out, rows_grad)
           : chunk_of_given<Wide, float>(p, g, range, given, scratch, out, rows_grad);
}
