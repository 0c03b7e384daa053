// A number that changes when a weight does, at a small part of the cost of reading it.
#pragma once

#include <cstdint>

namespace loopmdm::cpu {

// A 64-bit hash of all data up to 1 MB; beyond, of one cache line of every KB (of every 16 KB beyond 16 MB)
// and of the last line. Which line of a KB varies from one KB to the next, so a change of one column of a
// matrix meets some of them. A change in a single word that is read always changes the number. The number
// does not depend on num_threads.
uint64_t fingerprint(const void* data, int64_t bytes, int num_threads);

}  // namespace loopmdm::cpu
