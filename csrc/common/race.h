// Times of the exponential race: E = -log(1 - u) of a uniform u. argmin E / p is a draw from p.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

// Below this E is a polynomial in u: 1 - u would round away what distinguishes small times, and a fast
// logarithm has an absolute error near 1. From here on that error is 1.3e-6 of E at most.
constexpr float kSmallUniform = 0.125f;

// sum u^n / n up to n = 7; what is left out is 6e-8 of E at most.
LOOPMDM_HD float small_race_time(float u) {
  float sum = 1.0f / 7.0f;
  sum = sum * u + 1.0f / 6.0f;
  sum = sum * u + 1.0f / 5.0f;
  sum = sum * u + 1.0f / 4.0f;
  sum = sum * u + 1.0f / 3.0f;
  sum = sum * u + 1.0f / 2.0f;
  return (sum * u + 1.0f) * u;
}

}  // namespace loopmdm
