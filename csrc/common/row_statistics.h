// Mean and variance of a row from parts of equal width (Chan, Golub, LeVeque: Updating formulae, 1982). Sums
// of squares are of deviations from the part's own mean: the stream grows over the loops, and E[x^2] - E[x]^2
// would lose the difference.
#pragma once

#include "common/host_device.h"

namespace loopmdm {

struct PartStatistics {
  float mean, deviations;  // sum of squared deviations from the mean
};

struct PartSums {
  float parts = 0, mean = 0, deviations = 0;
};

// Adds a part of `width` columns. The result depends on the order of the parts, which is that of the columns.
LOOPMDM_HD void add_part(PartSums& sums, PartStatistics part, float width) {
  const float delta = part.mean - sums.mean;
  const float share = 1.0f / (sums.parts + 1.0f);
  sums.mean += delta * share;
  sums.deviations += part.deviations + delta * delta * width * sums.parts * share;
  sums.parts += 1.0f;
}

// What `earlier` and `later` parts give together; either may have none.
LOOPMDM_HD PartSums merge_sums(PartSums earlier, PartSums later, float width) {
  const float parts = earlier.parts + later.parts, delta = later.mean - earlier.mean;
  const float share = parts > 0.0f ? later.parts / parts : 0.0f;
  return {parts, earlier.mean + delta * share,
          earlier.deviations + later.deviations + delta * delta * width * earlier.parts * share};
}

LOOPMDM_HD float variance(PartSums sums, float width) { return sums.deviations / (sums.parts * width); }

}  // namespace loopmdm
