// Denoising steps without a way back to Python: which masked positions a step predicts, the network calls
// that takes, and which of the predictions it reveals. The rules are those of the orders in
// loopmdm.sampling, which the tests compare it with.
#pragma once

#include <cstdint>
#include <limits>

#include "cpu/decoding/network.h"

namespace loopmdm::cpu {

// What rates a prediction; `place` rates the slot itself, `none` reveals whatever the schedule says.
enum class Rating { none, confidence, margin, certainty, place };

// The positions to fill, by sequence and then by position.
struct Slots {
  const int64_t *sequence, *position;  // [N]
  const int64_t* sequence_id;          // [N] names the random numbers
  const int64_t* block;                // [N] of a sequence the blocks are filled one after the other
  int64_t size;
};

// How much each step reveals, and what. With a schedule a step reveals as many slots of a sequence as the
// schedule has, and these very slots if nothing is rated. Without one the leading run of the best rated whose
// score reaches the threshold, or whose entropies H satisfy sum H - max H <= bound; at least one slot.
struct Pace {
  const int64_t* by_step;  // slots by the step that reveals them, or null
  const int64_t* ends;     // [T] where each step's end
  Rating rating, score;
  const double* place;  // [N] the lowest is revealed first, where that rates
  float threshold;      // of the score; NaN: the entropy bound counts
  double entropy_bound;
  int64_t window;  // leftmost open slots that are in reach, at least 1
};

struct StepComputes {
  const int64_t *num_loops, *min_loops;  // [T]
  const double* exit_threshold;          // [T], below 0: none
};

struct DecodingProblem {
  const Network* network;
  Slots slots;
  Pace pace;
  StepComputes computes;
  int64_t num_steps, batch, length;
  int64_t max_batch;
  int64_t mask_token;
  uint64_t seed;
  float temperature;
};

// What the steps change, and the slots they have revealed, in order.
struct DecodingState {
  int64_t* tokens;          // [B, L]
  bool* masked;             // [N]
  int64_t* network_calls;   // [B]
  int64_t* loops;           // [B]
  int64_t* revealed;        // [N] slots
  int64_t* revealed_step;   // [N]
  int64_t* revealed_loops;  // [N] of the slot's sequence in the step
  float* log_prob;          // [N]
};

struct DecodingProgress {
  int64_t steps = 0;           // taken, those that change nothing too
  int64_t revealed = 0;        // slots
  int64_t calls = 0;           // of the network
  int64_t sequence_calls = 0;  // sequences in them
  int64_t loops = 0;           // of these sequences
  int64_t rows = 0;            // drawn
  int64_t not_finite = -1;     // a slot whose prediction is NaN or infinite; it ended the step
};

// Takes steps from `first` on until nothing is masked any more or `most` are taken, fewer once the time is
// over; one at least, where something is masked. The slots they reveal go behind the `revealed` that are
// there.
DecodingProgress take_steps(const DecodingProblem& problem, const DecodingState& state, int64_t first,
                            int64_t most, int64_t revealed, double milliseconds, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
