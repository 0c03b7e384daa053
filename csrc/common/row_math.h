// What a pass over some tokens of one row leaves behind, and how two such passes combine.
#pragma once

#include "common/host_device.h"

#if defined(__CUDACC_RTC__)
#  define LOOPMDM_INFINITY __int_as_float(0x7f800000)
#else
#  include <math.h>
#  define LOOPMDM_INFINITY __builtin_inff()
#endif

namespace loopmdm {

constexpr float kLayerNormEps = 1e-5f;
constexpr float kLowestFloat = -3.402823466e+38f;
constexpr float kMaskedScore = -1e30f;    // its exponential is 0; the bias of a key that is not attended
constexpr double kExpUnderflow = -745.2;  // exp() of less is 0 in double precision

// Whether the deviations of a row may be no more than what its mean was rounded by, so that the mean wants to
// be corrected by their mean.
LOOPMDM_HD bool is_nearly_constant(float variance, float mean) { return variance < 1e-8f * mean * mean; }

// 1 / sqrt(variance + eps); NaN where the variance is beyond fp32, where it would be 0 and the row look fine.
LOOPMDM_HD float inverse_deviation(float variance) {
  const float deviation = sqrtf(variance + kLayerNormEps);
  return deviation < LOOPMDM_INFINITY ? 1.0f / deviation : LOOPMDM_INFINITY - LOOPMDM_INFINITY;
}

struct RowStatistics {
  double sum = 0;       // sum of exp(logit - top1_logit)
  double weighted = 0;  // sum of exp(logit - top1_logit) * (logit - top1_logit)
  float top1_logit = kLowestFloat;
  float top2_logit = kLowestFloat;
  float race_score = -LOOPMDM_INFINITY;
  float race_logit = -LOOPMDM_INFINITY;
  int32_t top1_token = -1;
  int32_t race_token = -1;
};

struct RowResult {
  float log_prob, top1_prob, top2_prob, entropy;
};

LOOPMDM_HD void observe_logit(RowStatistics& stats, float logit, int32_t token) {
  if (logit > stats.top1_logit) {
    stats.top2_logit = stats.top1_logit;
    stats.top1_logit = logit;
    stats.top1_token = token;
  } else if (logit > stats.top2_logit) {
    stats.top2_logit = logit;
  }
}

// Restates the sums relative to `top`, at least as large as the logit they are relative to now.
LOOPMDM_HD void rebase(double& sum, double& weighted, float from, float top) {
  if (from == top) return;
  const double shift = static_cast<double>(from) - static_cast<double>(top);
  if (shift < kExpUnderflow && sum == sum) {
    sum = weighted = 0;
    return;
  }
  const double factor = exp(shift);
  weighted = factor * (weighted + sum * shift);
  sum = factor * sum;
}

// Adds the tokens of `later`, which all come after those of `stats`: a tie goes to the lower token.
LOOPMDM_HD void merge(RowStatistics& stats, RowStatistics later) {
  const float top = later.top1_logit > stats.top1_logit ? later.top1_logit : stats.top1_logit;
  rebase(stats.sum, stats.weighted, stats.top1_logit, top);
  rebase(later.sum, later.weighted, later.top1_logit, top);
  stats.sum += later.sum;
  stats.weighted += later.weighted;
  if (later.top1_logit > stats.top1_logit) {
    stats.top2_logit = later.top2_logit > stats.top1_logit ? later.top2_logit : stats.top1_logit;
    stats.top1_logit = later.top1_logit;
    stats.top1_token = later.top1_token;
  } else if (later.top1_logit > stats.top2_logit) {
    stats.top2_logit = later.top1_logit;
  }
  if (later.race_score > stats.race_score) {
    stats.race_score = later.race_score;
    stats.race_logit = later.race_logit;
    stats.race_token = later.race_token;
  }
}

// Probabilities of the row, with `logit` that of the chosen token. NaN everywhere if any logit was NaN.
LOOPMDM_HD RowResult finish(const RowStatistics& stats, float logit) {
  const double log_sum = log(stats.sum);
  const double top = stats.top1_logit;
  RowResult result;
  result.log_prob = static_cast<float>(logit - top - log_sum);
  result.top1_prob = static_cast<float>(1.0 / stats.sum);
  result.top2_prob = static_cast<float>(exp(stats.top2_logit - top) / stats.sum);
  result.entropy = static_cast<float>(log_sum - stats.weighted / stats.sum);
  return result;
}

}  // namespace loopmdm
