// Statistics and race of the rows' logits, tile by tile, in terms of vec.h and head.inl.
#pragma once

#include "cpu/head/head.inl"
#include "cpu/vector/philox.inl"

static_assert(kTileTokens % kPanel == 0 && kTileTokens % (2 * kLanes) == 0);

void add_statistics(const float* logits, int64_t count, int32_t first_token, RowStatistics& stats) {
  Floats largest = broadcast(-__builtin_inff());  // a NaN never gets in
  for (int64_t t = 0; t < count; t += kLanes) largest = larger(load(logits + t), largest);
  if (largest_lane(largest) > stats.top2_logit) {
    const float before = stats.top1_logit;
    for (int64_t t = 0; t < count; t += kLanes) {
      uint32_t above = lanes_not_at_most(load(logits + t), broadcast(stats.top2_logit));
      for (; above != 0; above &= above - 1) {
        const int64_t i = t + __builtin_ctz(above);
        observe_logit(stats, logits[i], first_token + static_cast<int32_t>(i));
      }
    }
    rebase(stats.sum, stats.weighted, before, stats.top1_logit);
  }
  // Exponents in base 2. What lies below the range of a float counts as its smallest power: nothing.
  constexpr float kLog2E = 1.44269504f;
  constexpr double kLn2 = 0.69314718055994531;
  const Floats lowest = broadcast(-126.0f);
  Floats sum = {}, weighted = {};
  for (int64_t t = 0; t < count; t += kLanes) {
    const Floats x = larger(lowest, (load(logits + t) - stats.top1_logit) * kLog2E);  // a NaN stays
    const Floats e = exp2_in_range(x, false);
    sum += e;
    weighted = fused_multiply_add(e, x, weighted);
  }
  const float tile_weighted = sum_lanes(weighted);
  stats.weighted += kLn2 * tile_weighted;
  stats.sum += tile_weighted == tile_weighted ? sum_lanes(sum) : tile_weighted;
}

struct RowCounter {
  PhiloxKey key;
  uint32_t position, step, sequence;
};

RowCounter row_counter(const SampleRowsProblem& p, int64_t row) {
  return {philox_key(p.seed), static_cast<uint32_t>(p.position[row]), static_cast<uint32_t>(p.step[row]),
          static_cast<uint32_t>(p.sequence[row])};
}

// First words of the race for the 2 * kLanes tokens from first_token, a multiple of 4.
inline void race_words(const RowCounter& row, uint32_t first_token, uint32_t* words) {
  philox_groups(row.key, first_token / 4, row.position, row.step, row.sequence, words);
}

// Score of one token: logit / temperature - log(E) with E = -log1p(-u) a standard exponential variate.
float race_score(const RowCounter& row, uint32_t token, uint32_t high, float logit, float temperature) {
  float u;
  if (high < kRefineBelow) {
    const PhiloxWords low =
        philox4x32(row.key, (token / 4) | kRefineBit, row.position, row.step, row.sequence);
    u = uniform_refined(high, low.word[token % 4]);
  } else {
    u = uniform_coarse(high);
  }
  return logit / temperature - __builtin_logf(-__builtin_log1pf(-u));
}

// Bit i: token i may reach `floor`, or has a refined uniform. Most tokens cannot win and need no logarithm:
// E >= u, and log2(u) >= bits(u) * 2^-23 - 127 for the bit pattern of a float, so
// score <= logit / temperature + ln 2 * (127 + 32 - bits(word) * 2^-23). The margin covers the rounding of
// both sides.
inline uint32_t may_win(const float* logits, const uint32_t* words, float inverse_temperature, float floor) {
  constexpr float kLn2 = 0.693147181f;
  Words word;
  __builtin_memcpy(&word, words, sizeof word);
  const Floats pattern =
      __builtin_convertvector(reinterpret_cast<Ints>(__builtin_convertvector(word, Floats)), Floats);
  const Floats scaled =
      fused_multiply_add(load(logits), broadcast(inverse_temperature), broadcast((127 + 32) * kLn2));
  const Floats bound = fused_multiply_add(pattern, broadcast(-kLn2 * 0x1p-23f), scaled);
  const float margin = 1e-3f + 1e-5f * __builtin_fabsf(floor);
  return lanes_not_at_most(bound, broadcast(floor - margin)) | lanes_below(word, kRefineBelow);
}

// `floor`: a score that one of the row's tokens reaches, here or in another chunk. It only saves work.
void run_race(const float* logits, int64_t count, const RowCounter& row, float temperature,
              int32_t first_token, float& floor, RowStatistics& stats) {
  const float inverse = 1.0f / temperature;
  uint32_t words[2 * kLanes];
  for (int base = 0; base < count; base += 2 * kLanes) {
    race_words(row, static_cast<uint32_t>(first_token + base), words);
    for (int half = 0; half < 2 * kLanes; half += kLanes) {
      uint32_t candidates = may_win(logits + base + half, words + half, inverse, floor);
      for (; candidates != 0; candidates &= candidates - 1) {
        const int i = base + half + __builtin_ctz(candidates);
        const uint32_t token = static_cast<uint32_t>(first_token + i);
        const float score = race_score(row, token, words[i - base], logits[i], temperature);
        if (score > stats.race_score) {
          stats.race_score = score;
          stats.race_logit = logits[i];
          stats.race_token = first_token + i;
          if (score > floor) floor = score;
        }
      }
    }
  }
}

// race_times_of of one token.
double race_time(const RowCounter& row, uint32_t token, uint32_t high) {
  double fraction = 0.5;
  if (high < kRefineBelow) {
    const PhiloxWords low =
        philox4x32(row.key, (token / 4) | kRefineBit, row.position, row.step, row.sequence);
    fraction = (static_cast<double>(low.word[token % 4]) + 0.5) * 0x1p-32;
  }
  return -__builtin_log1p(-(static_cast<double>(high) + fraction) * 0x1p-32);
}

int64_t race_among(const RestrictedDrawProblem& p, int64_t r, const float* kept) {
  constexpr double kColdest = 1e-30;  // below it the bound is out of the range of a float
  const RowCounter row = {philox_key(p.seed), static_cast<uint32_t>(p.position[r]),
                          static_cast<uint32_t>(p.step[r]), static_cast<uint32_t>(p.sequence[r])};
  const float inverse = static_cast<float>(1.0 / p.temperature);
  const bool bounded = p.temperature >= kColdest;
  double best = -__builtin_inf();
  float floor = -__builtin_inff();
  int64_t winner = -1;
  uint32_t words[2 * kLanes];
  for (int64_t base = 0; base < p.vocab_size; base += 2 * kLanes) {
    race_words(row, static_cast<uint32_t>(base), words);
    for (int half = 0; half < 2 * kLanes; half += kLanes) {
      uint32_t candidates =
          bounded ? may_win(kept + base + half, words + half, inverse, floor) : (1u << kLanes) - 1;
      for (; candidates != 0; candidates &= candidates - 1) {
        const int64_t token = base + half + __builtin_ctz(candidates);
        if (kept[token] == -__builtin_inff()) continue;
        const double time = race_time(row, static_cast<uint32_t>(token), words[token - base]);
        const double score = static_cast<double>(kept[token]) / p.temperature - __builtin_log(time);
        if (score > best) {
          best = score;
          floor = static_cast<float>(score);
          winner = token;
        }
      }
    }
  }
  return winner;
}

void scan(const SampleRowsProblem& p, int64_t begin, int64_t end, const uint32_t* operands, int64_t chunk,
          float* logits, float* floors, RowStatistics* out) {
  const TileScope scope;
  const int64_t num_rows = end - begin, vocab_size = p.head.vocab_size;
  for (int64_t r = 0; r < num_rows; ++r) out[r] = RowStatistics{};
  const int64_t first = chunk * kChunkTokens;
  const int64_t last = first + kChunkTokens < vocab_size ? first + kChunkTokens : vocab_size;
  for (int64_t token = first; token < last; token += kTileTokens) {
    const int64_t count = last - token < kTileTokens ? last - token : kTileTokens;
    const int64_t visited = round_up(count, 2 * kLanes);  // whole vectors, filled up with impossible tokens
    multiply_tile(p.head, operands, num_rows, token, count, logits, logits + num_rows * kTileTokens);
    for (int64_t r = 0; r < num_rows; ++r) {
      float* row = logits + r * kTileTokens;
      for (int64_t t = 0; t < count; ++t) row[t] += p.head.bias[token + t];
      for (int64_t t = count; t < visited; ++t) row[t] = -__builtin_inff();
      const int64_t excluded = p.excluded_token - token;
      if (excluded >= 0 && excluded < count) row[excluded] = -__builtin_inff();
      add_statistics(row, visited, static_cast<int32_t>(token), out[r]);
      if (p.temperature > 0)
        run_race(row, visited, row_counter(p, begin + r), p.temperature, static_cast<int32_t>(token),
                 floors[r], out[r]);
    }
  }
}

#include "cpu/head/token_race.inl"

constexpr SampleRowsKernel table = {logits_scratch,  prepare_rows,   scan,
                                    race_among,      quantize_panel, quantize_row,
                                    find_contenders, race_contenders};
