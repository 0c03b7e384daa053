// Times the steps from a loss of three loops to the present one, and its pieces, on one thread: the program
// of cross_entropy_ladder.py, compiled for one instruction set. Prints a line "name FLOPs seconds" for each.
//
// A call is of one chunk of the vocabulary, forward and backward. The next call is of the next chunk, so that
// weights and their gradients come from memory and go there.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "common/philox.h"
#include "common/row_math.h"
#include "cpu/head/row_groups.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/intrinsics.h"
#include "cpu/vector/peak.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/head/masked_cross_entropy.inl"
#include "ladder.inl"

// One row as it would be written down.
template <class Source>
void three_loops(const Source* weight, int64_t tokens, int64_t width, const float* row, float* logits,
                 float* grad_row, float* grad_weight) {
  for (int64_t t = 0; t < tokens; ++t) {
    logits[t] = 0;
    for (int64_t i = 0; i < width; ++i) logits[t] += value_of(weight + t * width + i) * row[i];
  }
  const float largest = *std::max_element(logits, logits + tokens);
  float sum = 0;
  for (int64_t t = 0; t < tokens; ++t) sum += logits[t] = std::exp(logits[t] - largest);
  for (int64_t t = 0; t < tokens; ++t) {
    const float slope = logits[t] / sum;
    for (int64_t i = 0; i < width; ++i) {
      grad_row[i] += slope * value_of(weight + t * width + i);
      grad_weight[t * width + i] += slope * row[i];
    }
  }
}

// The loss of R rows whose weight has the dtype of its products.
template <class Operand, class Source>
struct Loss {
  using Kept = std::conditional_t<Operand::kPerWord == 2, uint16_t, float>;

  MaskedCrossEntropyProblem p = {};
  MaskedCrossEntropyGradients out = {};
  RowGroup g = {};
  Chunks chunks;
  KeptTiles none, kept;
  ChunkStatistics statistics;
  void* memory;
  float* grad_rows;
  float* logits;                     // of a chunk: [tile][panel of rows][tokens of the tile][its rows]
  std::vector<TileScratch> scratch;  // of each tile of a chunk
  int64_t chunk = 0;

  Loss(int64_t rows, int64_t width, int64_t vocab_size) : chunks(vocab_size) {
    std::vector<int64_t>* numbers = new std::vector<int64_t>(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) (*numbers)[static_cast<size_t>(r)] = r;
    const bool halves = sizeof(Source) == sizeof(uint16_t);
    const int64_t words = vocab_size * width / (halves ? 2 : 1);
    float* zeros = floats(vocab_size);
    std::fill_n(zeros, vocab_size, 0.0f);
    float* ones = floats(width);
    std::fill_n(ones, width, 1.0f);
    p.hidden = floats(rows * width);
    p.rows = numbers->data();
    p.norm = p.gain = ones;
    p.shift = p.bias = zeros;
    p.weight = halves ? operands<Bf16::Weights>(words) : operands<Fp32>(words);
    p.num_rows = p.rows_per_group = rows;
    p.num_modulations = 1;
    p.width = width;
    p.vocab_size = vocab_size;
    p.excluded_token = -1;
    p.weight_is_bf16 = halves;
    p.bf16 = Operand::kPerWord == 2;
    p.normalized = true;
    out.weight = operands<Fp32>(words);
    out.bias = floats(vocab_size);
    out.weight_is_bf16 = halves;

    const CrossEntropySizes s = sizes_of<Operand>(p, rows);
    float* numbers_of_rows = floats(12 * s.padded_rows);
    const auto number = [&](int i) { return numbers_of_rows + i * s.padded_rows; };
    auto* targets = reinterpret_cast<int32_t*>(number(0));
    std::fill_n(targets, s.padded_rows, 7);
    g = {0,
         rows,
         s.padded_rows,
         operands<Fp32>(s.columns),
         operands<Fp32>(s.pairs),
         targets,
         number(1),
         number(2),
         number(3),
         number(4),
         number(5),
         number(6),
         number(7)};
    statistics = {number(8), number(9), number(10)};
    memory = floats(s.backward_scratch / 4);
    grad_rows = floats(rows * s.padded_width);
    logits = floats(chunks.tokens * s.padded_rows);
    none = {floats(chunks.count * chunks.tiles * rows), nullptr, 0};
    kept = {none.largest, static_cast<char*>(out.weight), width * static_cast<int64_t>(sizeof(Source))};
    const HeadLayout<Operand> l(p, g.padded);
    for (int64_t tile = 0; tile < chunks.tiles; ++tile) {
      scratch.emplace_back();
      tile_scratch(l, true, floats(s.backward_scratch / 4), scratch.back());
    }
    for (int64_t block = 0; block * s.block < rows; ++block)
      prepare_block<Operand>(p, g, block, static_cast<float*>(memory));
    std::fill_n(g.largest, s.padded_rows, 8.0f);
    std::fill_n(g.factor, s.padded_rows, 1.0f / 32);  // what is kept is overwritten by numbers of its size
    std::fill_n(g.target_slope, s.padded_rows, -0.5f);
    for (int64_t i = 0; i < chunks.count; ++i) forward(chunks[i], kept);
    backward(chunks[0], kept);
  }

  TokenRange next() {
    chunk = (chunk + 1) % (chunks.count - 1);  // the last one is shorter
    return chunks[chunk];
  }
  TokenRange long_ago() { return chunks[(chunk + chunks.count / 2) % (chunks.count - 1)]; }

  void forward(const TokenRange& range, const KeptTiles& keep) {
    chunk_statistics<Operand, Kept>(p, g, range, memory, statistics, keep);
  }
  void backward(const TokenRange& range, const KeptTiles& keep) {
    chunk_gradients<Operand, Kept>(p, g, range, keep, memory, out, grad_rows);
  }

  // body(tile of the chunk, first token, tokens) for each tile.
  template <class Body>
  void each_tile(const TokenRange& range, Body&& body) {
    int64_t tile = 0;
    for (int64_t token = range.first; token < range.last; token += range.tile, ++tile)
      body(tile, token, std::min(range.tile, range.last - token));
  }

  // body(first row, rows of the panel) for each panel of rows.
  template <class Body>
  void each_panel(Body&& body) {
    for (int64_t row = 0; row < g.padded; row += kPanel) body(row, panel_width(g.padded, row));
  }

  void multiply_forward(const TokenRange& range, bool in_cache) {
    const HeadLayout<Operand> l(p, g.padded);
    each_tile(range, [&](int64_t tile, int64_t token, int64_t count) {
      TileScratch here = scratch[in_cache ? 0 : static_cast<size_t>(tile)];
      const Left weights = weight_rows<Operand>(p, l, token, count, here.weights);
      each_panel([&](int64_t row, int width) {
        if (!in_cache) here.logits = logits + tile * range.tile * g.padded + row * count;
        tile_products<Operand>(p, g, l, weights, token, count, row, width, here);
      });
    });
  }

  void add_up(const TokenRange& range, bool in_cache) {
    each_tile(range, [&](int64_t tile, int64_t token, int64_t count) {
      each_panel([&](int64_t row, int width) {
        float* at = in_cache ? scratch[0].logits : logits + tile * range.tile * g.padded + row * count;
        Kept* keep = in_cache ? kept_panel<Kept>(kept, token, count, row, width) : nullptr;
        (width == kPanel ? add_statistics<kTileVecs, kPanel, Kept>
                         : add_statistics<2, 2 * kLanes, Kept>)(p, at, token, count, statistics.largest + row,
                                                                statistics.sum + row, keep);
      });
    });
  }

  void differentiate(const TokenRange& range, const KeptTiles& keep) {
    const HeadLayout<Operand> l(p, g.padded);
    each_tile(range, [&](int64_t tile, int64_t token, int64_t count) {
      tile_gradients<Operand, Kept>(p, g, l, scratch[0], keep, range.first_tile + tile, token, count);
    });
  }

  // Of logits in memory, which become the exponentials.
  void differentiate_stored(const TokenRange& range) {
    const HeadLayout<Operand> l(p, g.padded);
    each_tile(range, [&](int64_t tile, int64_t token, int64_t count) {
      each_panel([&](int64_t row, int width) {
        float* at = logits + tile * range.tile * g.padded + row * count;
        const Kept* e = again_exponentials<Kept>(p, at, token, count, width, g.largest + row);
        (width == kPanel ? logit_gradients<Operand, kTileVecs, Kept>
                         : logit_gradients<Operand, 2, Kept>)(g, l, scratch[static_cast<size_t>(tile)], e,
                                                              g.largest + row, token, count, row);
      });
    });
  }

  void multiply_backward(const TokenRange& range, bool for_rows, bool for_weight, bool in_cache) {
    MaskedCrossEntropyGradients wanted = out;
    if (!for_weight) wanted.weight = nullptr;
    chunk_products<Operand>(
        p, g, range, memory, wanted, for_rows ? grad_rows : nullptr,
        [&](const HeadLayout<Operand>&, TileScratch& here, int64_t tile, int64_t, int64_t) {
          const TileScratch& made = scratch[static_cast<size_t>(tile - range.first_tile)];
          if (in_cache) return;
          here.row_pairs = made.row_pairs;
          here.token_rows = made.token_rows;
          here.bias_sums = made.bias_sums;
        });
  }

  void pack_pairs(const TokenRange& range) {
    const HeadLayout<Operand> l(p, g.padded);
    each_tile(range, [&](int64_t, int64_t token, int64_t count) {
      pack_weight_pairs<Operand, Source>(p, l, token, count, scratch[0].weight_pairs);
    });
  }
};

template <class Operand, class Source>
void run(int64_t rows, int64_t width, int64_t vocab_size, double seconds) {
  auto* loss = new Loss<Operand, Source>(rows, width, vocab_size);
  const double product = 2.0 * static_cast<double>(rows * width * loss->chunks.tokens);
  float* row = floats(width);
  float* grad_row = floats(width);
  std::vector<Step> steps = {
      peak_step(Operand::kPerWord == 2),
      {"ladder: three loops, one row of it", 3 * product / static_cast<double>(rows),
       [=] {
         const TokenRange range = loss->next();
         three_loops(static_cast<const Source*>(loss->p.weight) + range.first * width,
                     range.last - range.first, width, row, loss->logits, grad_row,
                     static_cast<float*>(loss->out.weight));
       }},
      {"ladder: products in tiles, one step after the other", 3 * product,
       [=] {
         const TokenRange range = loss->next();
         loss->multiply_forward(range, false);
         loss->add_up(range, false);
         loss->differentiate_stored(range);
         loss->multiply_backward(range, true, false, false);
         loss->multiply_backward(range, false, true, false);
       }},
      {"ladder: a tile at a time, its logits made twice", 3 * product,
       [=] {
         loss->forward(loss->next(), loss->none);
         loss->backward(loss->long_ago(), loss->none);
       }},
      {"loss", 3 * product,
       [=] {
         loss->forward(loss->next(), loss->kept);
         loss->backward(loss->long_ago(), loss->kept);
       }},
      {"loss: forward", product, [=] { loss->forward(loss->next(), loss->kept); }},
      {"loss: the product in that", product, [=] { loss->multiply_forward(loss->next(), true); }},
      {"loss: exponentials and their sums", 0, [=] { loss->add_up(loss->next(), true); }},
      {"loss: backward", 2 * product, [=] { loss->backward(loss->next(), loss->kept); }},
      {"loss: gradients of the logits", 0, [=] { loss->differentiate(loss->next(), loss->kept); }},
      {"loss: weights as pairs", 0, [=] { loss->pack_pairs(loss->next()); }},
      {"loss: the product for the rows, with these", product,
       [=] { loss->multiply_backward(loss->next(), true, false, true); }},
      {"loss: the product for the weight", product,
       [=] { loss->multiply_backward(loss->next(), false, true, true); }},
  };
  measure(steps, seconds, 9);
}

}  // namespace
}  // namespace loopmdm::cpu

int main(int, char** argv) {
  using namespace loopmdm::cpu;
  const auto number = [argv](int i) { return std::atoll(argv[i]); };
  const bool bf16 = std::strcmp(argv[1], "bf16") == 0;
  (bf16 ? run<Bf16, uint16_t> : run<Fp32, float>)(number(2), number(3), number(4), std::atof(argv[5]));
}
