// The kernel of sample_rows, in terms of vec.h.
//
// A dot product runs over D in vector lanes, so weights are read in the layout they have in memory, [V, D],
// and no transposed copy exists. kBlockRows x kBlockTokens dot products share their operands in registers.

#if defined(__AVX512F__)
constexpr int kBlockRows = 4, kBlockTokens = 6;
#elif defined(__AVX2__)
constexpr int kBlockRows = 3, kBlockTokens = 4;
#else
constexpr int kBlockRows = 2, kBlockTokens = 4;
#endif

static_assert(kTileTokens % kBlockTokens == 0 && kTileTokens % (2 * kLanes) == 0);

// Rounds to nearest, ties to even.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- activations ----------------------------------------------------------------------------------------

inline float mean_of(const float* x, int64_t width) {
  Floats sum = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) sum += load(x + i);
  float total = sum_lanes(sum);
  for (; i < width; ++i) total += x[i];
  return total / static_cast<float>(width);
}

inline float variance_of(const float* x, int64_t width, float mean) {
  Floats sum = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Floats d = load(x + i) - mean;
    sum = fused_multiply_add(d, d, sum);
  }
  float total = sum_lanes(sum);
  for (; i < width; ++i) total += (x[i] - mean) * (x[i] - mean);
  return total / static_cast<float>(width);
}

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

void prepare(const SampleRowsProblem& p, int64_t begin, int64_t end, void* activations) {
  const int64_t stride = round_up(p.width, kActivationAlign);
  for (int64_t r = begin; r < end; ++r) {
    const float* x = p.hidden + p.rows[r] * p.width;
    const int64_t group = p.rows[r] / p.rows_per_group;
    const float* shift = p.shift + group * p.width;
    const float* gain = p.gain + group * p.width;
    const float mean = mean_of(x, p.width);
    const float scale = 1.0f / __builtin_sqrtf(variance_of(x, p.width, mean) + kLayerNormEps);
    // bf16 activations are stored as bf16 where an instruction multiplies them, else as rounded floats.
    float* floats = static_cast<float*>(activations) + (r - begin) * stride;
    uint16_t* halves = static_cast<uint16_t*>(activations) + (r - begin) * stride;
    for (int64_t i = 0; i < stride; ++i) {
      const float h = i < p.width ? (x[i] - mean) * scale * p.norm[i] * gain[i] + shift[i] : 0.0f;
      if (!p.compute_in_bf16)
        floats[i] = h;
      else if (kHasBf16Dot)
        halves[i] = to_bf16(h);
      else
        floats[i] = from_bf16(to_bf16(h));
    }
  }
}

// ---- logits of a tile -----------------------------------------------------------------------------------

// Dot products of `Rows` activation rows with kBlockTokens weight rows. Each is summed in the same order
// whatever `Rows` is.
template <int Rows, class Weight>
inline void dot_block(const float* h, const Weight* w, int64_t stride, float* out) {
  Floats sum[Rows][kBlockTokens] = {};
  for (int64_t k = 0; k < stride; k += kLanes) {
    Floats a[Rows];
    for (int r = 0; r < Rows; ++r) a[r] = load(h + r * stride + k);
    for (int t = 0; t < kBlockTokens; ++t) {
      const Floats b = load(w + t * stride + k);
      for (int r = 0; r < Rows; ++r) sum[r][t] = fused_multiply_add(a[r], b, sum[r][t]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < kBlockTokens; ++t) out[r * kTileTokens + t] = sum_lanes(sum[r][t]);
}

#if defined(__AVX512BF16__)
template <int Rows>
inline void dot_block(const uint16_t* h, const uint16_t* w, int64_t stride, float* out) {
  Floats sum[Rows][kBlockTokens] = {};
  for (int64_t k = 0; k < stride; k += 2 * kLanes) {
    __m512bh a[Rows];
    for (int r = 0; r < Rows; ++r) __builtin_memcpy(&a[r], h + r * stride + k, sizeof a[r]);
    for (int t = 0; t < kBlockTokens; ++t) {
      __m512bh b;
      __builtin_memcpy(&b, w + t * stride + k, sizeof b);
      for (int r = 0; r < Rows; ++r) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], a[r], b);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < kBlockTokens; ++t) out[r * kTileTokens + t] = sum_lanes(sum[r][t]);
}
#endif

template <class Activation, class Weight>
void project_tile(const Activation* h, int64_t num_rows, const Weight* w, int64_t count, int64_t stride,
                  float* logits) {
  for (int64_t t = 0; t < count; t += kBlockTokens) {
    const Weight* block = w + t * stride;
    int64_t r = 0;
    for (; r + kBlockRows <= num_rows; r += kBlockRows)
      dot_block<kBlockRows>(h + r * stride, block, stride, logits + r * kTileTokens + t);
    for (; r < num_rows; ++r) dot_block<1>(h + r * stride, block, stride, logits + r * kTileTokens + t);
  }
}

inline void copy_row(const float* x, int64_t width, float* out) {
  __builtin_memcpy(out, x, width * sizeof *x);
}

inline void copy_row(const uint16_t* x, int64_t width, uint16_t* out) {
  __builtin_memcpy(out, x, width * sizeof *x);
}

inline void copy_row(const float* x, int64_t width, uint16_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store_bf16(out + i, load(x + i));
  for (; i < width; ++i) out[i] = to_bf16(x[i]);
}

// Copies `count` weight rows into the tile, padding with zeros to whole blocks and to the stride.
template <class Source, class Target>
void pack_tile(const Source* weight, int64_t width, int64_t count, int64_t stride, Target* tile) {
  for (int64_t t = 0; t < round_up(count, kBlockTokens); ++t) {
    Target* row = tile + t * stride;
    const int64_t filled = t < count ? width : 0;
    if (filled) copy_row(weight + t * width, width, row);
    for (int64_t i = filled; i < stride; ++i) row[i] = 0;
  }
}

void project(const SampleRowsProblem& p, const void* activations, int64_t num_rows, int64_t first_token,
             int64_t count, const SampleRowsScratch& scratch) {
  const int64_t stride = round_up(p.width, kActivationAlign);
  const bool in_place = stride == p.width && count == kTileTokens;
  const float* wide = static_cast<const float*>(p.weight) + first_token * p.width;
  const uint16_t* narrow = static_cast<const uint16_t*>(p.weight) + first_token * p.width;
  uint16_t* narrow_tile = static_cast<uint16_t*>(scratch.weight_tile);
  float* wide_tile = static_cast<float*>(scratch.weight_tile);

  if (p.weight_is_bf16) {
    if (!in_place) {
      pack_tile(narrow, p.width, count, stride, narrow_tile);
      narrow = narrow_tile;
    }
  } else if (p.compute_in_bf16) {
    pack_tile(wide, p.width, count, stride, narrow_tile);
    narrow = narrow_tile;
  } else {
    if (!in_place) {
      pack_tile(wide, p.width, count, stride, wide_tile);
      wide = wide_tile;
    }
    project_tile(static_cast<const float*>(activations), num_rows, wide, count, stride, scratch.logits);
    return;
  }
#if defined(__AVX512BF16__)
  if (p.compute_in_bf16) {
    project_tile(static_cast<const uint16_t*>(activations), num_rows, narrow, count, stride, scratch.logits);
    return;
  }
#endif
  project_tile(static_cast<const float*>(activations), num_rows, narrow, count, stride, scratch.logits);
}

// ---- statistics and race of a tile ----------------------------------------------------------------------

// exp(x) for x <= 0 to about 1 ulp; 0 where the result would be denormal; NaN stays NaN.
inline Floats exp_nonpositive(Floats x) {
  const Floats lowest = broadcast(-87.0f);
  const Floats clamped = x < lowest ? lowest : x;
  const float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  const Floats n = (clamped * 1.44269504f + round_magic) - round_magic;
  Floats r = fused_multiply_add(n, broadcast(-0.693359375f), clamped);  // ln 2 in two parts
  r = fused_multiply_add(n, broadcast(2.12194440e-4f), r);
  // Taylor coefficients up to r^7; |r| <= ln(2) / 2 leaves an error of 5e-9.
  Floats y = broadcast(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = fused_multiply_add(y, r, broadcast(c));
  const Words power = reinterpret_cast<Words>((__builtin_convertvector(n, Ints) + 127) << 23);
  return x < lowest ? Floats{} : y * reinterpret_cast<Floats>(power);
}

void add_statistics(const float* logits, int64_t count, int32_t first_token, RowStatistics& stats) {
  Floats top = broadcast(-__builtin_inff());  // a NaN never gets in
  for (int64_t t = 0; t < count; t += kLanes) top = larger(load(logits + t), top);
  if (largest_lane(top) > stats.top2_logit) {
    const float before = stats.top1_logit;
    for (int64_t t = 0; t < count; t += kLanes)
      if (lanes_not_at_most(load(logits + t), broadcast(stats.top2_logit)))
        for (int64_t i = t; i < t + kLanes; ++i)
          observe_logit(stats, logits[i], first_token + static_cast<int32_t>(i));
    rebase(stats.sum, stats.weighted, before, stats.top1_logit);
  }
  Floats sum = {}, weighted = {};
  const Floats lowest = broadcast(-87.0f);
  for (int64_t t = 0; t < count; t += kLanes) {
    const Floats x = load(logits + t) - stats.top1_logit;
    const Floats e = exp_nonpositive(x);
    sum += e;
    weighted = fused_multiply_add(e, x < lowest ? lowest : x, weighted);
  }
  stats.sum += sum_lanes(sum);
  stats.weighted += sum_lanes(weighted);
}

struct RowCounter {
  PhiloxKey key;
  uint32_t position, step, sequence;
};

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

void run_race(const float* logits, int64_t count, const RowCounter& row, float temperature,
              int32_t first_token, RowStatistics& stats) {
  // Most tokens cannot win and need no logarithm. E >= u, and log2(u) >= bits(u) * 2^-23 - 127 for the bit
  // pattern of a float, so score <= logit / temperature + ln 2 * (127 + 32 - bits(word) * 2^-23). The margin
  // covers the rounding of both sides.
  constexpr float kLn2 = 0.693147181f;
  const float inverse = 1.0f / temperature;
  uint32_t words[2 * kLanes];
  for (int base = 0; base < count; base += 2 * kLanes) {
    race_words(row, static_cast<uint32_t>(first_token + base), words);
    for (int half = 0; half < 2 * kLanes; half += kLanes) {
      Words word;
      __builtin_memcpy(&word, words + half, sizeof word);
      const Floats pattern =
          __builtin_convertvector(reinterpret_cast<Ints>(__builtin_convertvector(word, Floats)), Floats);
      const Floats scaled =
          fused_multiply_add(load(logits + base + half), broadcast(inverse), broadcast((127 + 32) * kLn2));
      const Floats bound = fused_multiply_add(pattern, broadcast(-kLn2 * 0x1p-23f), scaled);
      const float margin = 1e-3f + 1e-5f * __builtin_fabsf(stats.race_score);
      uint32_t candidates =
          lanes_not_at_most(bound, broadcast(stats.race_score - margin)) | lanes_below(word, kRefineBelow);
      for (; candidates != 0; candidates &= candidates - 1) {
        const int i = base + half + __builtin_ctz(candidates);
        const uint32_t token = static_cast<uint32_t>(first_token + i);
        const float score = race_score(row, token, words[i - base], logits[i], temperature);
        if (score > stats.race_score) {
          stats.race_score = score;
          stats.race_logit = logits[i];
          stats.race_token = first_token + i;
        }
      }
    }
  }
}

void scan(const SampleRowsProblem& p, int64_t begin, int64_t end, const void* activations, int64_t chunk,
          const SampleRowsScratch& scratch, RowStatistics* out) {
  const int64_t num_rows = end - begin;
  for (int64_t r = 0; r < num_rows; ++r) out[r] = RowStatistics{};
  const int64_t first = chunk * kChunkTokens;
  const int64_t last = first + kChunkTokens < p.vocab_size ? first + kChunkTokens : p.vocab_size;
  for (int64_t token = first; token < last; token += kTileTokens) {
    const int64_t count = last - token < kTileTokens ? last - token : kTileTokens;
    const int64_t visited = round_up(count, 2 * kLanes);  // whole vectors, filled up with impossible tokens
    project(p, activations, num_rows, token, count, scratch);
    for (int64_t r = 0; r < num_rows; ++r) {
      float* logits = scratch.logits + r * kTileTokens;
      for (int64_t t = 0; t < count; ++t) logits[t] += p.bias[token + t];
      for (int64_t t = count; t < visited; ++t) logits[t] = -__builtin_inff();
      const int64_t excluded = p.excluded_token - token;
      if (excluded >= 0 && excluded < count) logits[excluded] = -__builtin_inff();
      add_statistics(logits, visited, static_cast<int32_t>(token), out[r]);
      if (p.temperature > 0) {
        const RowCounter counter = {philox_key(p.seed), static_cast<uint32_t>(p.position[begin + r]),
                                    static_cast<uint32_t>(p.step[begin + r]),
                                    static_cast<uint32_t>(p.sequence[begin + r])};
        run_race(logits, visited, counter, p.temperature, static_cast<int32_t>(token), out[r]);
      }
    }
  }
}
