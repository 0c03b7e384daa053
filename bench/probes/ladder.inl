// What the programs that time steps of a kernel share, in terms of tile.inl: their clock, operands and the
// peak.
#pragma once

namespace peak {
#include "cpu/vector/peak.inl"
}

struct Step {
  std::string name;
  double flops;
  std::function<void()> run;
  std::vector<double> seconds = {};
};

using Clock = std::chrono::steady_clock;

double seconds_of(const Step& step, int64_t calls) {
  const auto begin = Clock::now();
  for (int64_t i = 0; i < calls; ++i) step.run();
  return std::chrono::duration<double>(Clock::now() - begin).count() / static_cast<double>(calls);
}

// The steps in turn, so that what disturbs the machine meets all of them; the median of each.
void measure(std::vector<Step>& steps, double seconds, int turns) {
  std::vector<int64_t> calls;
  for (const Step& step : steps) {
    const double once = std::max(1e-9, std::min(seconds_of(step, 1), seconds_of(step, 1)));
    calls.push_back(std::max<int64_t>(1, static_cast<int64_t>(seconds / once)));
  }
  for (int turn = 0; turn < turns; ++turn)
    for (size_t i = 0; i < steps.size(); ++i) steps[i].seconds.push_back(seconds_of(steps[i], calls[i]));
  for (Step& step : steps) {
    auto middle = step.seconds.begin() + turns / 2;
    std::nth_element(step.seconds.begin(), middle, step.seconds.end());
    std::printf("%s\t%.9g\t%.9g\n", step.name.c_str(), step.flops, *middle);
  }
}

// Small values that differ, as operands or floats; freed with the process.
template <class Operand>
uint32_t* operands(int64_t words, bool large_pages = true) {
  constexpr int64_t kPage = 2 << 20;
  const int64_t bytes = round_up((words + 64) * 4, kPage);
  auto* out = static_cast<uint32_t*>(std::aligned_alloc(kPage, static_cast<size_t>(bytes)));
  if (large_pages) prefer_large_pages(out, bytes);
  uint32_t state = 1;
  const auto value = [&state] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-34f;
  };
  constexpr int64_t kValues = 2 * kLanes, kWords = kValues / Operand::kPerWord;
  float values[kValues];
  for (int64_t i = 0; i + kWords <= words + 64; i += kWords) {
    for (float& v : values) v = value();
    Operand::store(out + i, load(values), load(values + kLanes));
  }
  return out;
}

float* floats(int64_t count) { return reinterpret_cast<float*>(operands<Fp32>(count)); }

// Of the instructions that multiply operands of bf16, or floats.
inline Step peak_step(bool bf16) {
  constexpr int64_t kRounds = 2000;
  return {"peak", (bf16 ? peak::kBf16FlopsPerRound : peak::kFp32FlopsPerRound) * kRounds, [bf16] {
            [[maybe_unused]] static volatile float sink;
            sink = (bf16 ? peak::bf16_chains : peak::fp32_chains)(kRounds, 1.0f);
          }};
}
