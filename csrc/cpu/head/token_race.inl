// Bounds of logits from bytes, and the race of those that may win; see token_race.h.
#pragma once

#include "cpu/head/head.inl"

static_assert(kTileTokens % kPanel == 0);

constexpr float kAbove = 1.001f;  // more than rounding makes of a norm

template <class Source>
void quantize_columns(const Source* head, const LinearSource& source, bool bf16, int64_t panel,
                      const QuantizedHead& out) {
  constexpr int kByte = 127;
  constexpr float kRounded = 2e-5f;  // of a quotient up to kByte, at most
  typedef int8_t Small __attribute__((vector_size(kLanes)));
  const int64_t depth = source.depth, words = operand_words<Bytes>(depth);
  const float root = __builtin_sqrtf(static_cast<float>(depth));
  const auto values = [&](const Source* column, int64_t i) {
    const Floats v = load_some(column + i, depth - i);
    return bf16 ? round_to_bf16(v) : v;
  };
  for (int64_t token = panel * kPanel; token < (panel + 1) * kPanel; ++token) {
    uint32_t* to = out.bytes + panel * kPanel * words + token % kPanel;
    float scale = 0.0f, error = 0.0f, norm = 0.0f;
    int32_t total = 0;
    for (int64_t k = 0; k < words; ++k) to[k * kPanel] = 0;
    if (token < source.columns) {
      const Source* column = head + token * depth;
      Floats most = {}, all = {};
      for (int64_t i = 0; i < depth; i += kLanes) {
        const Floats v = values(column, i);
        most = larger(larger(v, -v), most);
        all += v * 0.0f;  // NaN where a value is not finite
      }
      const float largest = largest_lane(most), rest = sum_lanes(all);
      if (!(rest == rest)) {
        error = norm = __builtin_inff();
      } else if (largest < 1e-28f) {
        error = norm = kAbove * root * largest;
      } else {
        scale = largest / kByte;
        const float inverse = kByte / largest;
        const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer
        Floats errors = {}, squares = {};
        Ints sums = {};
        for (int64_t i = 0; i < depth; i += kLanes) {
          const Floats x = values(column, i) * inverse, shifted = x + magic, left = x - (shifted - magic);
          errors = fused_multiply_add(left, left, errors);
          squares = fused_multiply_add(x, x, squares);
          const Ints q = reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic);
          sums += q;
          const Small bytes = __builtin_convertvector(q, Small);
          uint32_t four[kLanes / 4];
          __builtin_memcpy(four, &bytes, sizeof four);
          for (int j = 0; j < kLanes / 4 && i / 4 + j < words; ++j) to[(i / 4 + j) * kPanel] = four[j];
        }
        for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
        error = kAbove * scale * (__builtin_sqrtf(sum_lanes(errors)) + kRounded * root);
        norm = kAbove * scale * (__builtin_sqrtf(sum_lanes(squares)) + kRounded * root);
      }
    }
    out.scale[token] = scale;
    out.error[token] = error;
    out.norm[token] = norm;
    out.offset[token] = Bytes::kOffset * total;
  }
}

void quantize_panel(const LinearSource& source, bool bf16, int64_t panel, const QuantizedHead& out) {
  if (source.is_bf16)
    quantize_columns(static_cast<const uint16_t*>(source.data), source, bf16, panel, out);
  else
    quantize_columns(static_cast<const float*>(source.data), source, bf16, panel, out);
}

// One row of operands as bytes, and how far its logits may be from theirs.
void quantize_row(const HeadProblem& p, const uint32_t* operands, uint32_t* bytes, RowBound& bound) {
  const bool pairs = p.bf16 && Bf16::kPerWord == 2;
  const auto value = [&](int64_t i) {
    return pairs ? value_of(reinterpret_cast<const uint16_t*>(operands) + i)
                 : value_of(reinterpret_cast<const float*>(operands) + i);
  };
  float largest = 0.0f;
  double square = 0.0;
  for (int64_t i = 0; i < p.width; ++i) {
    const float x = value(i), magnitude = x < 0 ? -x : x;
    if (magnitude > largest) largest = magnitude;
    square += static_cast<double>(x) * x;
  }
  const bool finite = square < 1e300;  // squares of floats are far below
  const float step = finite && largest > 1e-30f ? largest / Bytes::kLargest : 0.0f;
  double residue = 0.0, quantized = 0.0;
  uint8_t* out = reinterpret_cast<uint8_t*>(bytes);
  for (int64_t i = 0; i < operand_words<Bytes>(p.width) * 4; ++i) {
    const float x = i < p.width ? value(i) : 0.0f;
    int g = 0;
    if (step > 0) {
      const float ratio = x / step;
      g = static_cast<int>(ratio + (ratio < 0 ? -0.5f : 0.5f));
    }
    g = g > Bytes::kLargest ? Bytes::kLargest : g < -Bytes::kLargest ? -Bytes::kLargest : g;
    const double near = static_cast<double>(step) * g, left = x - near;
    residue += left * left;
    quantized += near * near;
    out[i] = static_cast<uint8_t>(g + Bytes::kOffset);
  }
  const auto root = [](double of) { return kAbove * static_cast<float>(__builtin_sqrt(of)); };
  const float least = 0x1p-110f * static_cast<float>(p.width);
  const float nothing = finite ? 0.0f : __builtin_nanf("");
  bound = {step, root(quantized) + nothing, root(residue) + least, 16 * root(square),
           least * (1 + root(square))};
}

// The logits of `count` tokens from bytes, whose sums of products are given: at most and at least.
void bound_logits(const TokenRaceProblem& p, const RowBound& bound, int64_t width, int64_t first_token,
                  int64_t count, const float* sums, const float* bias, float* upper, float* lower) {
  constexpr float kInfinity = __builtin_inff();
  const QuantizedHead& q = p.quantized;
  // Half of it for each of width additions and products, the rest for those below; of |h| |w|.
  const float rounding = static_cast<float>(width + 64) * 0x1p-23f / 16;
  for (int64_t t = 0; t < count; t += kLanes) {
    const int64_t token = first_token + t;
    Ints offset;
    __builtin_memcpy(&offset, q.offset + token, sizeof offset);
    const Ints dot = reinterpret_cast<Ints>(load(sums + t)) - offset;
    const Floats norm = load(q.norm + token), b = load(bias + t);
    const Floats logit = __builtin_convertvector(dot, Floats) * (load(q.scale + token) * bound.step) + b;
    Floats slack = fused_multiply_add(norm, broadcast(bound.residue), norm * bound.norm16 * rounding);
    slack = fused_multiply_add(load(q.error + token), broadcast(bound.quantized), slack) + bound.least;
    const Floats whole = fused_multiply_add(larger(b, -b), broadcast(0x1p-22f), slack);
    const auto impossible = (b == -kInfinity) & (slack < kInfinity);
    store(upper + t, impossible ? broadcast(-kInfinity) : logit + whole);
    store(lower + t, impossible ? broadcast(-kInfinity) : logit - whole);
  }
}

// Adds the tokens that may beat `floor`, and raises it to what one of them reaches at least. A comparison
// with NaN keeps the token.
int64_t add_contenders(const float* upper, const float* lower, int64_t count, const RowCounter& counter,
                       float temperature, int32_t row, int32_t first_token, float& floor, Contender* out) {
  int64_t found = 0;
  const auto add = [&](int64_t i, float most, float least) {
    if (most < floor || most == -__builtin_inff()) return;
    out[found++] = {row, first_token + static_cast<int32_t>(i), most};
    if (least > floor) floor = least;
  };
  if (temperature == 0) {
    Floats most = broadcast(-__builtin_inff());
    for (int64_t t = 0; t < count; t += kLanes) most = larger(load(lower + t), most);
    const float largest = largest_lane(most);
    if (largest > floor) floor = largest;
    const float below = floor - 1e-6f * __builtin_fabsf(floor) - 1e-30f;
    for (int64_t t = 0; t < count; t += kLanes) {
      uint32_t above = lanes_not_at_most(load(upper + t), broadcast(below));
      for (; above != 0; above &= above - 1) {
        const int64_t i = t + __builtin_ctz(above);
        add(i, upper[i], lower[i]);
      }
    }
    return found;
  }
  const float inverse = 1.0f / temperature;
  uint32_t words[2 * kLanes];
  for (int64_t base = 0; base < count; base += 2 * kLanes) {
    race_words(counter, static_cast<uint32_t>(first_token + base), words);
    for (int half = 0; half < 2 * kLanes; half += kLanes) {
      uint32_t candidates = may_win(upper + base + half, words + half, inverse, floor);
      for (; candidates != 0; candidates &= candidates - 1) {
        const int64_t i = base + half + __builtin_ctz(candidates);
        const uint32_t token = static_cast<uint32_t>(first_token + i);
        add(i, race_score(counter, token, words[i - base], upper[i], temperature),
            race_score(counter, token, words[i - base], lower[i], temperature));
      }
    }
  }
  return found;
}

int64_t find_contenders(const TokenRaceProblem& p, int64_t begin, int64_t end, const uint32_t* bytes,
                        const RowBound* bounds, int64_t chunk, float* sums, float* floors, Contender* out) {
  const SampleRowsProblem& rows = *p.rows;
  const int64_t num_rows = end - begin, vocab_size = rows.head.vocab_size, width = rows.head.width;
  const int64_t words = operand_words<Bytes>(width);
  const int64_t first = chunk * kChunkTokens;
  const int64_t last = first + kChunkTokens < vocab_size ? first + kChunkTokens : vocab_size;
  alignas(64) float bias[kTileTokens], upper[kTileTokens], lower[kTileTokens];
  int64_t found = 0;
  for (int64_t token = first; token < last; token += kTileTokens) {
    const int64_t count = last - token < kTileTokens ? last - token : kTileTokens;
    const int64_t visited = round_up(count, 2 * kLanes);
    for (int64_t column = 0; column < visited; column += kPanel)
      multiply<Bytes>({bytes, words, 1}, num_rows, p.quantized.bytes + (token + column) * words, kPanel,
                      words, sums + column, kTileTokens, false, true);
    for (int64_t t = 0; t < visited; ++t) bias[t] = t < count ? rows.head.bias[token + t] : -__builtin_inff();
    const int64_t excluded = rows.excluded_token - token;
    for (int64_t r = 0; r < num_rows; ++r) {
      bound_logits(p, bounds[r], width, token, visited, sums + r * kTileTokens, bias, upper, lower);
      // Behind the last token a row without bounds has NaN, which would be a contender.
      for (int64_t t = count; t < visited; ++t) upper[t] = lower[t] = -__builtin_inff();
      if (excluded >= 0 && excluded < count) upper[excluded] = lower[excluded] = -__builtin_inff();
      found += add_contenders(upper, lower, visited, row_counter(rows, begin + r), rows.temperature,
                              static_cast<int32_t>(begin + r), static_cast<int32_t>(token), floors[r],
                              out + found);
    }
  }
  return found;
}

template <class Operand, class Source>
void logits_of(const TokenRaceProblem& p, const Source* weight, const uint32_t* operands,
               const int32_t* tokens, int count, uint32_t* panel, float* logits) {
  using Weights = typename Operand::Weights;
  const HeadProblem& head = p.rows->head;
  const int64_t words = head_words(head);
  pack_columns_at<Weights>(count, head.width, right_words<Weights>(words), kLanes, panel,
                           [&](int j) { return weight + tokens[j] * head.width; });
  multiply_packed<Operand>({operands, words, 1}, 1, panel, kLanes, words, logits, kLanes, false, false,
                           nullptr);
}

// The exact logits of some tokens of a row, and their race. `panel`: scratch of D * kLanes words.
void race_contenders(const TokenRaceProblem& p, int64_t row, const uint32_t* operands, const int32_t* tokens,
                     int64_t count, uint32_t* panel, RaceState& state) {
  const TileScope scope;
  const SampleRowsProblem& rows = *p.rows;
  const RowCounter counter = row_counter(rows, row);
  const float* floats = static_cast<const float*>(p.weight);
  const uint16_t* halves = static_cast<const uint16_t*>(p.weight);
  for (int64_t first = 0; first < count; first += kLanes) {
    const int here = count - first < kLanes ? static_cast<int>(count - first) : kLanes;
    float logits[kLanes];
    if (p.weight_is_bf16)
      rows.head.bf16 ? logits_of<Bf16>(p, halves, operands, tokens + first, here, panel, logits)
                     : logits_of<Fp32>(p, halves, operands, tokens + first, here, panel, logits);
    else
      rows.head.bf16 ? logits_of<Bf16>(p, floats, operands, tokens + first, here, panel, logits)
                     : logits_of<Fp32>(p, floats, operands, tokens + first, here, panel, logits);
    for (int j = 0; j < here; ++j) {
      const int32_t token = tokens[first + j];
      const float logit = logits[j] + rows.head.bias[token];
      if (!(logit < __builtin_inff())) state.finite = false;
      if (logit > state.top1_logit) {
        state.top1_logit = logit;
        state.top1_token = token;
      }
      if (rows.temperature == 0) continue;
      const uint32_t number = static_cast<uint32_t>(token);
      const PhiloxWords words =
          philox4x32(counter.key, number / 4, counter.position, counter.step, counter.sequence);
      const float score = race_score(counter, number, words.word[number % 4], logit, rows.temperature);
      if (score > state.score) {
        state.score = score;
        state.token = token;
      }
    }
  }
}
