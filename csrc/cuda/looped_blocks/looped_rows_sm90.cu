// A stack of narrow blocks applied S times to short sequences. Each block of threads has eight tokens, whose
// stream does not leave its shared memory from the first loop to the last; the weights of all layers stream
// by. A cluster has a sequence: its blocks hand over keys and values, once a layer, and nothing else.
#include "cuda/looped_blocks/rows_attention_sm90.cuh"
#include "cuda/looped_blocks/rows_loader_sm90.cuh"

namespace loopmdm {

namespace looped_rows {

using Sums = float[kTiles][4];  // of a product with D results

class Layers {
 public:
  __device__ Layers(const KernelParameters& p, const Memory& memory)
      : p_(p), memory_(memory), base_(memory.base), warp_(static_cast<int>(threadIdx.x) / 32) {}

  __device__ void run() {
    if (p_.cosines) remember_turns();
    for_each_sequence(p_, [&](int sequence) {
      sequence_ = sequence;
      const int32_t loops = __ldcg(p_.stop + sequence);
      seen_ = Attention::seen_keys(p_, seat_, sequence);
      enter();
#pragma unroll 1
      for (int32_t loop = 0; loop < loops; ++loop) {
        if (p_.adaptive) remember_input();
#pragma unroll 1
        for (layer_ = 0; layer_ < Widths::kLayers; ++layer_) {
          attention(loop + layer_ == 0);
          mlp();
        }
        if (p_.stream_values) copy_rows(p_.stream_values + (loop + 1) * matrix());
        if (p_.adaptive && loop + 1 < loops && !goes_on(loop)) break;
      }
      copy_rows(p_.output);
    });
  }

  // bench/probes/hopper_narrow.cu times pieces of it.
 protected:
  // Of the whole batch.
  __device__ int64_t matrix() const { return static_cast<int64_t>(p_.batch) * p_.length * kHidden; }
  // Where a warp has whole rows: each of them, by its number, while it is one of the sequence's.
  template <class Work>
  __device__ void for_own_rows(const Work& work) const {
#pragma unroll
    for (int row = warp_; row < kRows; row += kWarps) {
      if (first_token() + row < p_.length) work(row);
    }
  }
  // Of a matrix [B, L, columns].
  __device__ int64_t line(int row, int columns, int matrix) const {
    return (static_cast<int64_t>(matrix) * p_.length + first_token() + row) * columns;
  }
  // A lane's column of a part of a row, in shared memory.
  __device__ uint32_t word_at(uint32_t place, int row, int part) const {
    return base_ + place + 4 * (row * kPitch + part * kPartPitch + static_cast<int>(threadIdx.x) % 32);
  }
  __device__ int vectors(int branch) const { return modulation(p_, layer_, sequence_, branch); }

  // With the statistics of rows' parts. Rows beyond the sequence are 0.
  __device__ void enter() const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int row = warp_; row < kRows; row += kWarps) {
      const bool inside = first_token() + row < p_.length;
#pragma unroll
      for (int part = 0; part < Widths::kParts; ++part) {
        const float* const source = p_.input + line(row, kHidden, sequence_) + part * Widths::kPart + lane;
        const float value = inside ? __ldg(source) : 0.0f;
        store_shared_float(word_at(Places::stream, row, part), value);
        const float mean = warp_sum(value) / Widths::kPart;
        const float deviations = warp_sum((value - mean) * (value - mean));
        if (lane == 0) store_shared_pair(statistics_at(row, part), make_float2(mean, deviations));
      }
    }
    if (p_.stream_values) copy_rows(p_.stream_values);
    meet_all();
  }

  // By the threads that `enter` has the same numbers from.
  __device__ void copy_rows(float* target) const {
    for_own_rows([&](int row) {
      float* const own = target + line(row, kHidden, sequence_) + threadIdx.x % 32;
      for (int part = 0; part < Widths::kParts; ++part) {
        store(own + part * Widths::kPart, __uint_as_float(load_shared(word_at(Places::stream, row, part))));
      }
    });
  }

  __device__ void remember_input() const {
    for_own_rows([&](int row) {
      for (int part = 0; part < Widths::kParts; ++part) {
        store_shared(word_at(Places::input, row, part), load_shared(word_at(Places::stream, row, part)));
      }
    });
  }

  __device__ uint32_t statistics_at(int row, int part) const {
    return base_ + Places::statistics + (row * Widths::kParts + part) * sizeof(PartStatistics);
  }

  // Normalised, modulated and rounded, as right operand. A quad has a part of a row.
  __device__ void normalise(int branch, bool entered) const {
    constexpr int kLanes = 4 * Widths::kParts;  // of a row
    const int thread = threadIdx.x, row = thread / kLanes, part = thread / 4 % Widths::kParts;
    if (row < kRows) {
      const int column = part * Widths::kPart + 2 * (thread % 4);
      const float4* const affine = p_.affine + (vectors(branch) * kHidden + column) / 2;
      const uint32_t place =
          base_ + Places::stream + 4 * (row * kPitch + part * kPartPitch + 2 * (thread % 4));
      float values[Widths::kPart / 2];  // where part_statistics looks for them
      float total = 0;
#pragma unroll
      for (int i = 0; i < Widths::kPart / 8; ++i) {
        const float2 pair = load_shared_pair(place + 32 * i);
        values[4 * i] = pair.x;
        values[4 * i + 1] = pair.y;
        total += pair.x + pair.y;
      }
      if (!entered) {
        const PartStatistics found = part_statistics(values, 0, 0, total);
        if (thread % 4 == 0) store_shared_pair(statistics_at(row, part), {found.mean, found.deviations});
        __syncwarp();
      }
      const float2 norm =
          merged_norm(thread, [&](int number) { return load_shared_pair(statistics_at(row, number)); });
#pragma unroll
      for (int i = 0; i < Widths::kPart / 8; ++i) {
        store_operand(base_ + Places::rows, kRows, row, column + 8 * i,
                      modulated({values[4 * i], values[4 * i + 1]}, norm.x, norm.y, __ldg(affine + 4 * i)));
      }
    }
    shared_proxy_fence();
    meet_all();
  }

  __device__ uint32_t turn_at(int i, int feature) const {
    return base_ + Places::sums + 4 * (seat_.token(i) * kTurnPitch + feature);
  }

  // Cosine and sine for number `i` of four sums, the same in all tiles, loops and layers.
  __device__ float2& turn(int i) { return turns_[kTurnsInThread ? 0 : i / 2][i % 2]; }

  __device__ void remember_turns() {
#pragma unroll
    for (int i = 0; i < (kTurnsInThread ? 2 : 4); ++i) {
      const int token = min(first_token() + seat_.token(i), p_.length - 1);
      const int64_t place = static_cast<int64_t>(token) * kHalf + seat_.feature<kTurnApart>(0, i) % kHalf;
      turn(i) = make_float2(__ldg(p_.cosines + place), __ldg(p_.sines + place));
    }
  }

  // The next of keys or queries.
  __device__ void multiply_and_rotate(Sums& sums) {
    multiply<kTiles, kPanels, kTurnApart>(sums, memory_.ring, place_, seat_, base_ + Places::rows);
    if (!p_.cosines) return;
    if constexpr (kTurnsInThread) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) rotate_pair(sums[tile][i], sums[tile][i + 2], turn(i).x, turn(i).y);
      }
    } else {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared_float(turn_at(i, seat_.feature(tile, i)), sums[tile][i]);
      }
      meet_all();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int feature = seat_.feature(tile, i);
          const float other = __uint_as_float(load_shared(turn_at(i, feature ^ kHalf)));
          const bool later = (feature & kHalf) != 0;
          float first = later ? other : sums[tile][i], second = later ? sums[tile][i] : other;
          rotate_pair(first, second, turn(i).x, turn(i).y);
          sums[tile][i] = later ? second : first;
        }
      }
    }
  }

  // Rounded, two features of a token at a time.
  template <int kApart, class Take>
  __device__ void round_pairs(const Sums& sums, const Take& take) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float2 pair = in_pairs(sums[tile][i], sums[tile][i + 1]);
        take(seat_.feature<kApart>(tile, i) & ~1, pack_bf16(pair.x, pair.y));
      }
    }
  }

  // Keys (0) or values (1): to global memory, from where they are sent to all blocks of the cluster. Those of
  // the layer before have come by then, and nobody else reads what a block stores.
  template <int kKind, int kApart>
  __device__ void hand_over(const Sums& sums) const {
    const int row = seat_.pair_token(), first = kKind * kHidden;
    uint16_t* const target = p_.qkv_values + line(row, 2 * kHidden, sequence_) + first;
    const bool inside = first_token() + row < p_.length;
    round_pairs<kApart>(sums, [&](int feature, uint32_t word) {
      if (inside) store(reinterpret_cast<uint32_t*>(target + feature), word);
    });
    proxy_fence();
    meet_all();
    if (warp_ > 0) return;
    Ring::wait_together(memory_.free(), (applications_ & 1) ^ 1);
    proxy_fence();
    if (!elected()) return;
    const uint32_t arrived = memory_.arrived(kKind);
    barrier_arrive_expect(arrived, kBlocks * kOperandBytes);
    constexpr int kPlace = kKind == 0 ? Places::keys : Places::values;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const uint32_t place = base_ + kPlace + (panel * kKeys + first_token()) * 128;
      const int column = first + kStep * panel;
      if constexpr (kBlocks > 1) {
        load_box_for_all(place, &p_.qkv, arrived, column, first_token(), sequence_, (1 << kBlocks) - 1);
      } else {
        load_box(place, &p_.qkv, arrived, column, first_token(), sequence_);
      }
    }
  }

  __device__ void attention(bool entered) {
    const float* const gate = p_.gate + vectors(0) * kHidden;
    normalise(0, entered);
    Sums sums;
    multiply_and_rotate(sums);
    hand_over<0, kTurnApart>(sums);
    multiply<kTiles, kPanels>(sums, memory_.ring, place_, seat_, base_ + Places::rows);
    hand_over<1, 1>(sums);
    multiply_and_rotate(sums);
    round_pairs<kTurnApart>(sums, [&](int feature, uint32_t word) {
      store_operand(base_ + Places::queries, kRows, seat_.pair_token(), feature, word);
    });
    shared_proxy_fence();
    meet_all();
    const uint32_t parity = applications_ & 1;
    barrier_wait(memory_.arrived(0), parity);
    Attention(base_, seat_, seen_).run([&] { barrier_wait(memory_.arrived(1), parity); });
    shared_proxy_fence();
    meet_all();
    if (threadIdx.x < kBlocks) barrier_arrive_at(memory_.free(), threadIdx.x);
    ++applications_;

    multiply<kTiles, kPanels>(sums, memory_.ring, place_, seat_, base_ + Places::rows);
    add_to_stream(sums, nullptr, gate);
  }

  __device__ void mlp() {
    constexpr int kMlpTiles = kMlp / kFeatures, kParts = Widths::kMlpOutParts;
    constexpr int kSteps = kMlp / kStep / kParts;  // of a part
    const float* const in_bias = p_.mlp_in_bias + layer_ * kMlp;
    const float* const out_bias = p_.mlp_out_bias + layer_ * kHidden;
    const float* const gate = p_.gate + vectors(1) * kHidden;
    normalise(1, false);
    float inner[kMlpTiles][4];
    const auto activate = [&](int tile, int step) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if (i / 2 * kPanels / 2 != step) continue;
        const float bias = __ldg(in_bias + seat_.feature(tile, i));
        const float2 pair = in_pairs(gelu(inner[tile][i] + bias), gelu(inner[tile][i + 1] + bias));
        store_operand(base_ + Places::wide, kRows, seat_.pair_token(), seat_.feature(tile, i) & ~1,
                      pack_bf16(pair.x, pair.y));
      }
    };
    multiply<kMlpTiles, kPanels>(inner, memory_.ring, place_, seat_, base_ + Places::rows, activate);
    shared_proxy_fence();
    meet_all();

    Sums sums;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      clear(sums[tile]);
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        float own[1][4];
        multiply<1, kSteps>(own, memory_.ring, place_, seat_,
                            base_ + Places::wide + part * kSteps * kRows * 128);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][i] += own[0][i];
      }
    }
    add_to_stream(sums, out_bias, gate);
  }

  // stream + gate * (sums + bias)
  __device__ void add_to_stream(const Sums& sums, const float* bias, const float* gate) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int feature = seat_.feature(tile, i);
        const int column = feature / Widths::kPart * kPartPitch + feature % Widths::kPart;
        const uint32_t place = base_ + Places::stream + 4 * (seat_.token(i) * kPitch + column);
        const float old = __uint_as_float(load_shared(place));
        const float own = bias ? __ldg(bias + feature) : 0.0f;
        store_shared_float(place, gated(sums[tile][i], old, __ldg(gate + feature), own));
      }
    }
    meet_all();
  }

  // Whether the loop has changed the sequence by more than the threshold, which all blocks find alike.
  __device__ bool goes_on(int32_t loop) {
    const int lane = threadIdx.x % 32;
    float changed = 0, size = 0;
    for_own_rows([&](int row) {
      for (int part = 0; part < Widths::kParts; ++part) {
        const float before = __uint_as_float(load_shared(word_at(Places::input, row, part)));
        const float now = __uint_as_float(load_shared(word_at(Places::stream, row, part)));
        changed += (now - before) * (now - before);
        size += now * now;
      }
    });
    changed = warp_sum(changed);
    size = warp_sum(size);
    const uint32_t changes = base_ + Places::changes;
    if (lane == 0) store_shared_pair(changes + 8 * warp_, make_float2(changed, size));
    meet_all();
    if (warp_ == 0) {
      float2* const all = p_.change + static_cast<int64_t>(sequence_) * kBlocks;
      int32_t* const told = p_.counters + sequence_;
      if (lane == 0) {
        float2 sum = make_float2(0, 0);
        for (int warp = 0; warp < kWarps; ++warp) {
          const float2 part = load_shared_pair(changes + 8 * warp);
          sum.x += part.x;
          sum.y += part.y;
        }
        store(all + rank(), sum);
        add_release(told, 1);
      }
      wait_for(told, kBlocks * (loop + 1));
      const float2 part = lane < kBlocks ? __ldcg(all + lane) : make_float2(0, 0);
      changed = warp_sum(part.x);
      size = warp_sum(part.y);
      if (lane == 0) {
        const bool stops = sqrtf(changed) / sqrtf(size) < p_.exit_threshold;
        store_shared(memory_.goes_on(), stops ? 0u : 1u);
        barrier_arrive(memory_.decided());
        if (stops && rank() == 0) store(p_.stop + sequence_, loop + 1);
      }
    }
    meet_all();
    return load_shared(memory_.goes_on()) != 0;
  }

  const KernelParameters& p_;
  const Memory& memory_;
  const uint32_t base_;
  const int warp_;
  const Seat seat_;
  RingPlace place_{0, 0};
  float2 turns_[kTurnsInThread ? 1 : 2][2];
  uint32_t applications_ = 0;  // of layers, so far
  uint32_t seen_ = 0;          // keys of the sequence
  int sequence_ = 0, layer_ = 0;
};

// Before anyone loads or sends: barriers, and zeros behind the values, whose weights are 0. Who stores them
// makes them known to products together with the first rows.
__device__ void begin(const Memory& memory) {
  constexpr int kPieces = 8 * (kKeys - kRows * kBlocks);  // of 16 bytes, in a panel
  static_assert(kPieces < kComputeThreads, "none by the warp that loads");
  if (threadIdx.x == 0) {
    barrier_init(memory.arrived(0), 1);
    barrier_init(memory.arrived(1), 1);
    barrier_init(memory.free(), kBlocks);
    barrier_init(memory.decided(), 1);
    memory.ring.initialise();
  }
  for (int panel = 0; panel < kPanels; ++panel) {
    const uint32_t behind = memory.base + Places::values + (panel * kKeys + kRows * kBlocks) * 128;
    for (int i = threadIdx.x; i < kPieces; i += kComputeThreads)
      store_shared_four(behind + 16 * i, make_uint4(0, 0, 0, 0));
  }
  meet_in_cluster();
}

}  // namespace looped_rows

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::looped_rows::kThreads, 1)
    looped_rows_sm90(const __grid_constant__ loopmdm::looped_rows::KernelParameters parameters) {
  using namespace loopmdm;
  const looped_rows::Memory memory(dynamic_shared_memory());
  looped_rows::begin(memory);
  if (threadIdx.x < looped_rows::kComputeThreads) {
    looped_rows::Layers(parameters, memory).run();
  } else {
    looped_rows::WeightStream(parameters, memory).run();
  }
  meet_in_cluster();  // a block that is gone can be neither sent to nor told
}
