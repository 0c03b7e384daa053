#include "cpu/decoding/network.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/machine/buffer.h"

namespace loopmdm::cpu {
namespace {

float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To nearest, ties to even.
float rounded_to_bf16(float value) {
  if (value != value) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits += 0x7fff + (bits >> 16 & 1);
  return widen(static_cast<uint16_t>(bits >> 16));
}

void embed_row(const float* token, const float* position, int64_t hidden, float* to) {
  for (int64_t i = 0; i < hidden; ++i) to[i] = position ? token[i] + position[i] : token[i];
}

// The sum is one of bf16 tensors: rounded like them.
void embed_row(const uint16_t* token, const uint16_t* position, int64_t hidden, float* to) {
  for (int64_t i = 0; i < hidden; ++i)
    to[i] = position ? rounded_to_bf16(widen(token[i]) + widen(position[i])) : widen(token[i]);
}

template <class T>
void embed(const Network& n, const NetworkCall& c, float* to) {
  const T* positions = static_cast<const T*>(n.positions);
  for (int64_t row = 0; row < c.batch * c.length; ++row, to += n.hidden)
    embed_row(static_cast<const T*>(n.embedding) + c.tokens[row] * n.hidden,
              positions ? positions + row % c.length * n.hidden : nullptr, n.hidden, to);
}

}  // namespace

void run_network(const Network& network, const NetworkCall& call, int64_t* loops_used,
                 const SampleRowsOutput& drawn, Isa isa, int num_threads) {
  const auto x = aligned_buffer<float>(call.batch * call.length * network.hidden);
  network.embedding_is_bf16 ? embed<uint16_t>(network, call, x.get()) : embed<float>(network, call, x.get());

  const std::vector<int64_t> loops(static_cast<size_t>(call.batch), call.num_loops);
  const LoopedBlocksProblem problem = {
      .x = x.get(),
      .blocks = network.blocks.data(),
      .modulation = network.modulation,
      .cos = network.cos,
      .sin = network.sin,
      .key_mask = nullptr,
      .num_loops = loops.data(),
      .batch = call.batch,
      .length = call.length,
      .hidden = network.hidden,
      .width = network.width,
      .heads = network.heads,
      .num_blocks = static_cast<int64_t>(network.blocks.size()) - network.num_before - network.num_after,
      .modulation_rows = 1,
      .first_loop = 0,
      .exit_threshold = call.exit_threshold,
      .dropout = 0,
      .dropout_seed = 0,
      .bf16 = network.bf16,
      .num_before = network.num_before,
      .num_after = network.num_after,
      .free_loops = call.min_loops - 1,
  };
  looped_blocks(problem, {x.get(), loops_used, nullptr, nullptr}, isa, num_threads);

  HeadProblem head = network.head;
  head.hidden = x.get();
  head.rows = call.rows;
  head.num_rows = call.num_rows;
  head.rows_per_group = call.batch * call.length;
  const SampleRowsProblem rows = {
      .head = head,
      .sequence = call.sequence,
      .step = call.step,
      .position = call.position,
      .excluded_token = network.excluded_token,
      .seed = call.seed,
      .temperature = call.temperature,
  };
  if (!network.race) return sample_rows(rows, drawn, isa, num_threads);
  TokenRaceProblem race = *network.race;
  race.rows = &rows;
  const auto finite = aligned_buffer<bool>(call.num_rows);
  sample_tokens(race, drawn.token, finite.get(), isa, num_threads);
  for (int64_t row = 0; row < call.num_rows; ++row)
    drawn.log_prob[row] = finite[row] ? 0.0f : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace loopmdm::cpu
