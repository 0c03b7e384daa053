// What the kernel for narrow blocks is made of, piece by piece and in its own code. A cluster of it goes
// through `rounds` of one piece, without the weights that stream by.
#include "cuda/looped_blocks/looped_rows_sm90.cu"

namespace loopmdm {

namespace looped_rows {

struct Pieces {
  KernelParameters kernel;
  int32_t rounds;
};

class Probed : public Layers {
 public:
  __device__ Probed(const Pieces& given, const Memory& memory)
      : Layers(given.kernel, memory), rounds_(given.rounds) {}

  // A stage of weights, all of them zeros, times eight tokens, for each of the ring's stages in turn.
  __device__ void multiply_stages() const {
    for (uint32_t i = 16 * threadIdx.x; i < Places::end + LOOPMDM_STAGES * kStageBytes;
         i += 16 * kComputeThreads)
      store_shared_four(memory_.ring.stage({0, 0}) + i, make_uint4(0, 0, 0, 0));
    shared_proxy_fence();
    meet_all();
    float sums[4];
    clear(sums);
    RingPlace place{0, 0};
#pragma unroll 1
    for (int round = 0; round < rounds_; ++round) {
      const uint32_t first = memory_.ring.stage(place) + 8 * 128 * seat_.first_eight();
      const uint64_t weights = inner_major_descriptor(__shfl_sync(~0u, first, 0), 0);
      const uint64_t right = inner_major_descriptor(base_ + Places::rows, 0);
      products_begin(sums);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        WarpGroupProduct<kRows>::shared<>(sums, further(weights, k), further(right, k), true);
      products_commit();
      products_wait<1>();
      Ring::next(place);
    }
    products_wait<0>();
    pin(sums);
    // Without a reader the compiler leaves the products out.
    store_shared_float(base_ + Places::sums + 4 * threadIdx.x, sums[0] + sums[1] + sums[2] + sums[3]);
  }

  // Two steps of all threads: gate and residual, norm and modulation.
  __device__ void step_twice() const {
    Sums sums;
    sum_up(sums);
    enter();
#pragma unroll 1
    for (int round = 0; round < rounds_; ++round) {
      add_to_stream(sums, p_.mlp_out_bias, p_.gate);
      normalise(1, false);
    }
  }

  // Keys and values by turns, so that no block sends to one that still waits for the last of these.
  __device__ void hand_over_both() const {
    Sums sums;
    sum_up(sums);
#pragma unroll 1
    for (int round = 0; round < rounds_; ++round) {
      hand_over<0, kTurnApart>(sums);
      barrier_wait(memory_.arrived(0), round & 1);
      hand_over<1, 1>(sums);
      barrier_wait(memory_.arrived(1), round & 1);
    }
  }

  // One box after the other, by one thread.
  __device__ void load_boxes() const {
    if (threadIdx.x > 0) return;
#pragma unroll 1
    for (int round = 0; round < rounds_; ++round) {
      barrier_arrive_expect(memory_.arrived(0), kRows * 128);
      load_box(base_ + Places::keys, &p_.qkv, memory_.arrived(0), 0, first_token(), 0);
      barrier_wait(memory_.arrived(0), round & 1);
    }
  }

 private:
  // Numbers that the compiler does not know.
  __device__ static void sum_up(Sums& sums) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] = 1e-3f * static_cast<float>(threadIdx.x + i);
    }
  }

  const int32_t rounds_;
};

template <class Work>
__device__ void probe(const Pieces& given, const Work& work) {
  const Memory memory(dynamic_shared_memory());
  begin(memory);
  if (threadIdx.x < kComputeThreads) work(Probed(given, memory));
  meet_in_cluster();
}

}  // namespace looped_rows

}  // namespace loopmdm

#define LOOPMDM_PIECE(name)                                                          \
  extern "C" __global__ void __launch_bounds__(loopmdm::looped_rows::kThreads, 1)    \
      name(const __grid_constant__ loopmdm::looped_rows::Pieces given) {             \
    using loopmdm::looped_rows::Probed;                                              \
    loopmdm::looped_rows::probe(given, [](const Probed& probed) { probed.name(); }); \
  }

LOOPMDM_PIECE(multiply_stages)
LOOPMDM_PIECE(step_twice)
LOOPMDM_PIECE(hand_over_both)
LOOPMDM_PIECE(load_boxes)
