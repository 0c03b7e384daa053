// Times the steps from a naive product to the present one, and the pieces of a block, on one thread: the
// program of cpu_ladder.py, compiled for one instruction set. Prints a line "name FLOPs seconds" for each.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "common/philox.h"
#include "common/row_math.h"
#include "cpu/looped_blocks/looped_blocks.h"
#include "cpu/machine/buffer.h"
#include "cpu/machine/intrinsics.h"
#include "cpu/vector/peak.h"

namespace loopmdm::cpu {
namespace {

#include "cpu/looped_blocks/looped_blocks.inl"
#include "ladder.inl"

template <class Operand>
void three_loops(const uint32_t* a, int64_t rows, const uint32_t* b, int64_t columns, int64_t words,
                 float* c) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t column = 0; column < columns; ++column) {
      Floats sum = {};  // one lane of it counts
      for (int64_t k = 0; k < words; ++k)
        sum = Operand::multiply_add(Words{a[r * words + k]}, Words{b[k * columns + column]}, sum);
      c[r * columns + column] = sum[0];
    }
}

// Tiles of `Rows` rows of a right operand [words][columns] that nobody packed.
template <class Operand, int Rows>
void unpacked_tiles(const uint32_t* a, int64_t rows, const uint32_t* b, int64_t columns, int64_t words,
                    float* c) {
  for (int64_t column = 0; column < columns; column += kPanel)
    for (int64_t first = 0; first < rows; first += Rows) {
      Floats sum[Rows][kTileVecs] = {};
      for (int64_t k = 0; k < words; ++k)
        for (int r = 0; r < Rows; ++r)
          for (int v = 0; v < kTileVecs; ++v)
            sum[r][v] = Operand::multiply_add(Words{} + a[(first + r) * words + k],
                                              load_words(b + k * columns + column + v * kLanes), sum[r][v]);
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVecs; ++v) store(c + (first + r) * columns + column + v * kLanes, sum[r][v]);
    }
}

template <class Operand>
void packed_tiles(const uint32_t* a, int64_t rows, const uint32_t* b, int64_t columns, int64_t words,
                  float* c) {
  constexpr int kRows = tile_rows<kTileVecs>();
  for (int64_t column = 0; column < columns; column += kPanel)
    for (int64_t first = 0; first < rows; first += kRows)
      tile<Operand, kRows, kTileVecs, false>({a + first * words, words, 1}, b + column * words, words,
                                             c + first * columns + column, columns);
}

template <class Operand>
void add_products(std::vector<Step>& steps, int64_t rows, int64_t hidden) {
  constexpr int kRows = tile_rows<kTileVecs>();
  const int64_t words = hidden / Operand::kPerWord, few = std::min<int64_t>(words, 128);
  rows = rows / kRows * kRows;
  const double flops = 2.0 * static_cast<double>(rows * hidden * hidden);
  const uint32_t* a = operands<Operand>(rows * words);
  const uint32_t* b = operands<Operand>(hidden * words);
  float* c = floats(rows * hidden);
  steps.push_back({"product: three loops, one row of it", flops / static_cast<double>(rows),
                   [=] { three_loops<Operand>(a, 1, b, hidden, words, c); }});
  steps.push_back({"product: vectors of columns", flops,
                   [=] { unpacked_tiles<Operand, 1>(a, rows, b, hidden, words, c); }});
  steps.push_back({"product: tiles of rows in registers", flops,
                   [=] { unpacked_tiles<Operand, kRows>(a, rows, b, hidden, words, c); }});
  steps.push_back(
      {"product: packed panels", flops, [=] { packed_tiles<Operand>(a, rows, b, hidden, words, c); }});
  steps.push_back({"product: as it is", flops, [=] {
                     for (int64_t column = 0; column < hidden; column += kPanel)
                       multiply<Operand>({a, words, 1}, rows, b + column * words, kPanel, words, c + column,
                                         hidden, false, true);
                   }});
  const double tile_flops = 2.0 * static_cast<double>(kRows * kPanel * few * Operand::kPerWord);
  steps.push_back({"one tile of few words, first-level cache", tile_flops,
                   [=] { multiply<Operand>({a, words, 1}, kRows, b, kPanel, few, c, hidden); }});
  steps.push_back({"one panel, second-level cache", flops / static_cast<double>(hidden) * kPanel,
                   [=] { multiply<Operand>({a, words, 1}, rows, b, kPanel, words, c, hidden); }});
}

// A block of one sequence, of which a thread has `rows` rows.
template <class Operand>
struct Block {
  BlockShape s;
  RowSpan span;
  RowSpans spans;
  BlockScratch t;
  SequenceState state = {};
  void* memory;
  std::vector<BlockPointers> weights;

  Block(int64_t hidden, int64_t heads, int64_t length, int64_t rows, int64_t blocks, bool large_pages) {
    constexpr int kPer = Operand::kPerWord;
    const int64_t head_dim = hidden / heads, unit = 2 * kLanes;
    s = {length,
         hidden,
         4 * hidden,
         heads,
         head_dim,
         round_up(hidden, unit),
         round_up(4 * hidden, unit),
         round_up(head_dim, kLanes),
         round_up(length, unit),
         kPer};
    memory = operands<Fp32>(block_scratch_bytes(s) / 4);
    clear_block_scratch(s, memory);
    t = block_scratch(s, memory);
    state.x = floats(length * s.hidden_padded);
    state.queries = operands<Operand>(length * s.hidden_words());
    for (int parity = 0; parity < 2; ++parity) {
      state.keys[parity] = operands<Operand>(s.key_size());
      state.values[parity] = operands<Operand>(s.value_size());
    }
    state.cos = floats(length * head_dim / 2);
    state.sin = floats(length * head_dim / 2);
    if (s.keys != length) {
      float* bias = floats(s.keys);
      for (int64_t key = 0; key < s.keys; ++key) bias[key] = key < length ? 0.0f : kMaskedScore;
      state.key_bias = bias;
    }
    const float* vector = floats(s.width_padded);
    span = {&state, {vector, vector, vector, vector, vector, vector, vector, vector}, {}, {}, 0, rows};
    spans = {&span, 1, rows};
    using Weights = typename Operand::Weights;
    const int64_t square = hidden * right_words<Weights>(s.hidden_words());
    const auto packed = [=](int64_t words) { return operands<Weights>(words, large_pages); };
    for (int64_t i = 0; i < blocks; ++i)
      weights.push_back({packed(3 * square), packed(square), packed(4 * square), packed(4 * square), vector,
                         vector, vector, vector});
  }

  const BlockPointers& next() {
    std::rotate(weights.begin(), weights.begin() + 1, weights.end());
    return weights.front();
  }
};

template <class Operand>
void add_block(std::vector<Step>& steps, int64_t hidden, int64_t heads, int64_t length, int64_t rows) {
  auto* b = new Block<Operand>(hidden, heads, length, rows, 4, true);
  const BlockShape& s = b->s;
  const double square = 2.0 * static_cast<double>(rows * hidden * hidden);
  const double attention = 4.0 * static_cast<double>(rows * length * hidden);
  const int64_t words = s.hidden_words(), depth = s.width_words();
  using Weights = typename Operand::Weights;
  const auto product = [b, rows](const uint32_t* a, int64_t row, const uint32_t* packed, int width, int64_t k,
                                 bool accumulate) {
    multiply_packed<Operand>({a, row, 1}, rows, packed, width, k, b->t.sums, b->t.sums_row, accumulate, true,
                             b->t.wide);
  };
  const auto panels = [product, b](int64_t k, const uint32_t* packed, int64_t columns) {
    for (int64_t column = 0; column < columns; column += kPanel)
      product(b->t.act, k, packed + column * right_words<Weights>(k), panel_width(columns, column), k, false);
  };
  const auto whole = [](Block<Operand>* block) {
    const BlockPointers& w = block->next();
    project_rows<Operand>(block->s, w, block->spans, 0, block->t);
    finish_rows<Operand>(block->s, w, block->spans, 0, block->t);
  };
  auto* small = new Block<Operand>(hidden, heads, length, rows, 4, false);
  steps.push_back({"block", 12 * square + attention, [=] { whole(b); }});
  steps.push_back({"block: its weights on pages of 4 KB", 12 * square + attention, [=] { whole(small); }});
  steps.push_back({"block: norm, q k v, rotary", 3 * square,
                   [b] { project_rows<Operand>(b->s, b->next(), b->spans, 0, b->t); }});
  steps.push_back(
      {"block: the product in that", 3 * square, [=] { panels(words, b->next().qkv, 3 * s.hidden); }});
  steps.push_back(
      {"block: attention", attention, [b] { attend_span<Operand>(b->s, b->span, 0, b->t.act, b->t); }});
  steps.push_back({"block: attention, scores", attention / 2, [=] {
                     for (int64_t head = 0; head < s.heads; ++head)
                       for (int64_t first = 0; first < rows; first += kRowsAtOnce)
                         for (int64_t key = 0; key < s.length; key += kPanel)
                           multiply<Operand>({head_of(s, b->state.queries, first, head), words, 1},
                                             std::min<int64_t>(kRowsAtOnce, rows - first),
                                             b->state.keys[0] + (head * s.keys + key) * s.head_words(),
                                             key_panel_width(s.length, key), s.head_words(),
                                             b->t.attention->scores + key % kKeyBlock, kKeyBlock);
                   }});
  steps.push_back({"block: attention, exponentials", 0, [=] {
                     for (int64_t i = 0; i < s.heads * rows; ++i)
                       for (int64_t key = 0; key < s.keys; key += kKeyBlock) {
                         const int64_t count = std::min<int64_t>(kKeyBlock, s.keys - key);
                         const float most =
                             largest_attended(b->t.attention->scores, b->state.key_bias, count);
                         b->t.sums[0] =
                             b->state.key_bias
                                 ? soften_row<Operand, true>(b->t.attention->scores, b->state.key_bias, count,
                                                             1, most, b->t.attention->probs)
                                 : soften_row<Operand, false>(b->t.attention->scores, nullptr, count, 1, most,
                                                              b->t.attention->probs);
                       }
                   }});
  steps.push_back(
      {"block: attention's output", square, [=] { panels(words, b->next().attn_out, s.hidden); }});
  steps.push_back({"block: into the MLP", 4 * square, [=] { panels(words, b->next().mlp_in, s.width); }});
  steps.push_back({"block: out of the MLP", 4 * square, [=] {
                     const uint32_t* packed = b->next().mlp_out;
                     const int64_t slice = kSliceDepth / Operand::kPerWord;
                     for (int64_t column = 0; column < hidden; column += kPanel)
                       for (int64_t k = 0; k < depth; k += slice)
                         product(
                             b->t.activated + k, depth,
                             packed + column * right_words<Weights>(depth) + right_words<Weights>(k) * kPanel,
                             kPanel, std::min(slice, depth - k), k > 0);
                   }});
  steps.push_back({"block: gelu", 0, [=] {
                     for (int64_t column = 0; column < s.width_padded; column += kPanel)
                       activate<Operand>(b->s, b->span, 0, column, panel_width(s.width_padded, column), b->t);
                   }});
  steps.push_back({"block: gate and residual, both", 0, [=] {
                     for (uint32_t branch = 0; branch < 2; ++branch)
                       for (int64_t column = 0; column < s.hidden_padded; column += kPanel)
                         add_branches<Operand>(b->s, b->spans, branch, column,
                                               panel_width(s.hidden_padded, column), b->t);
                   }});
  steps.push_back({"block: norms, both", 0, [=] {
                     for (int64_t r = 0; r < 2 * rows; ++r)
                       norm_modulate_row<Operand>(b->state.x + r % rows * s.hidden_padded, s.hidden,
                                                  s.hidden_padded, b->span.vectors.gain1,
                                                  b->span.vectors.shift1, b->t.act + r % rows * words,
                                                  nullptr, nullptr);
                   }});
}

template <class Operand>
void run(int64_t hidden, int64_t heads, int64_t length, int64_t rows, double seconds) {
  std::vector<Step> steps;
  steps.push_back(peak_step(Operand::kPerWord == 2));
  add_products<Operand>(steps, rows, hidden);
  add_block<Operand>(steps, hidden, heads, length, rows);
  measure(steps, seconds, 9);
}

}  // namespace
}  // namespace loopmdm::cpu

int main(int, char** argv) {
  using namespace loopmdm::cpu;
  const auto number = [argv](int i) { return std::atoll(argv[i]); };
  const bool bf16 = std::strcmp(argv[1], "bf16") == 0;
  (bf16 ? run<Bf16> : run<Fp32>)(number(2), number(3), number(4), number(5), std::atof(argv[6]));
}
