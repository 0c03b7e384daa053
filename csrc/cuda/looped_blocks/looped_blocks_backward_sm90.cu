// Gradients of a stack of blocks applied S times, as one kernel that never leaves the GPU
// (loopmdm_kernels/schedule/backward.py): from the last loop to the first it runs a loop again, keeping a
// record of each layer, and goes back through it. Gradients of weights are added to fp32 sums in device
// memory.
#include "cuda/looped_blocks/attention_backward_sm90.cuh"
#include "cuda/looped_blocks/backward_loader_sm90.cuh"

namespace loopmdm {

namespace backward {

class Worker {
 public:
  __device__ Worker(const Parameters& parameters, const Ring& ring, const Kept& kept)
      : p_(parameters), ring_(ring), kept_(kept) {}

  __device__ __forceinline__ void run() {
    RingPlace read{0, 0};
    while (true) {
      const Issued issued = ring_.take(read);
      if (issued.item.phase == kEnd) return;
      execute(issued.item, issued.loop, Seat());
      ring_.complete(read, p_.counters);
    }
  }

 private:
  using Sums = float[kSums];

  // Phases of one kind share their code: a copy for each would not fit the registers.
  __device__ __forceinline__ void execute(const Instruction& item, int32_t loop, const Seat& seat) {
    switch (item.phase) {
      case kNorm1:
      case kNorm2:
        return normalise(p_, item, loop);
      case kTop:
      case kMiddle:
      case kBottom:
        return stream_gradient(p_, item, loop, kept_);
      case kAttention:
        return attention(p_, item, ring_, place_, seat);
      case kGradQueries:
        return attention_gradient<false>(p_, item, ring_, place_, kept_, kept_place_, seat);
      case kGradKeys:
        return attention_gradient<true>(p_, item, ring_, place_, kept_, kept_place_, seat);
      case kQkv:
      case kAttnOut:
      case kMlpIn:
      case kMlpOut:
        return times_transposed_weight(item, loop, seat);
      case kGradMlpIn:
      case kGradMixed:
      case kGradNorm2:
      case kGradNorm1:
        return times_weight(item, seat);
      case kWeightMlpOut:
      case kWeightMlpIn:
      case kWeightAttnOut:
      case kWeightQkv:
        return weight_gradient(item, loop, seat);
      default:
        return;
    }
  }

  // The products of the forward pass. Phases that differ in what becomes of the sums share the loop that
  // makes them: a copy for each would not fit the registers.
  __device__ __forceinline__ void times_transposed_weight(const Instruction& item, int32_t loop,
                                                          const Seat& seat) {
    constexpr int kHidden = Config::kHidden, kMlp = Config::kMlp;
    Sums sums;
    const int inner = item.phase == kMlpOut ? kMlp : kHidden;
    shared_product(sums, ring_, place_, seat, inner / Config::kStep);
    const int64_t first = p_.first_token(item) * kHidden;
    if (item.phase == kQkv) {
      if (p_.cosines && item.column * kColumns < 2 * kHidden) rotate<kColumns>(sums, p_, item, seat);
      store_record(sums, p_.qkv_values, 3 * kHidden, p_, item, seat);
    } else if (item.phase == kMlpIn) {
      store_gelu(sums, p_, item, seat);
    } else {
      const bool of_attention = item.phase == kAttnOut;
      const float* const bias = p_.mlp_out_bias + item.layer * kHidden + item.column * kColumns;
      if (!of_attention) add_bias<kColumns>(sums, bias, seat);
      store_record(sums, of_attention ? p_.branch1_values : p_.branch2_values, kHidden, p_, item, seat);
      if (!of_attention && item.layer + 1 == Config::kLayers) return;  // nobody reads the loop's output
      const int64_t next = p_.token(p_.place(item.layer + 1, item.sequence), 0) * kHidden;
      add_branch(sums, p_, item, seat, gate_of(p_, item.layer, item.sequence, of_attention ? 0 : 1),
                 norm_input(p_, item, loop, of_attention),
                 of_attention ? p_.middle + first : p_.state + next);
    }
  }

  // Gradients of a product's left operand: rows of the weight are the inner dimension.
  __device__ __forceinline__ void times_weight(const Instruction& item, const Seat& seat) {
    Sums sums;
    const int inner = item.phase == kGradNorm2   ? Config::kMlp
                      : item.phase == kGradNorm1 ? 3 * Config::kHidden
                                                 : Config::kHidden;
    shared_product<false, true>(sums, ring_, place_, seat, inner / Config::kStep);
    if (item.phase == kGradMlpIn) {
      through_gelu(sums, p_, item, seat);
      store_record(sums, p_.grad_mlp_in_values, Config::kMlp, p_, item, seat);
    } else if (item.phase == kGradMixed) {
      store_grad_mixed(sums, p_, item, seat);
    } else {
      store_grad_rows(sums, p_, item, seat);
    }
  }

  __device__ __forceinline__ void weight_gradient(const Instruction& item, int32_t loop, const Seat& seat) {
    constexpr int kHidden = Config::kHidden, kMlp = Config::kMlp;
    int sequences = 0;
    for (int i = 0; i < p_.batch; ++i) sequences += __ldg(p_.stop + i) > loop;
    if (sequences == 0) return;  // with early exit the last loops may be nobody's
    Sums sums;
    shared_product<true, true>(sums, ring_, place_, seat, sequences * ((p_.length + 63) / 64));
    const int phase = item.phase;
    float* const gradient = phase == kWeightMlpOut    ? p_.grad_mlp_out_weight
                            : phase == kWeightMlpIn   ? p_.grad_mlp_in_weight
                            : phase == kWeightAttnOut ? p_.grad_attn_out_weight
                                                      : p_.grad_qkv_weight;
    const int height = phase == kWeightMlpIn ? kMlp : phase == kWeightQkv ? 3 * kHidden : kHidden;
    add_to_weight(sums, gradient, height, phase == kWeightMlpOut ? kMlp : kHidden, item, seat);
  }

  const Parameters& p_;
  const Ring& ring_;
  const Kept& kept_;
  RingPlace place_{0, 0}, kept_place_{0, 0};
};

}  // namespace backward

}  // namespace loopmdm

extern "C" __global__ void __launch_bounds__(loopmdm::kThreads, 1)
    looped_blocks_backward_sm90(const __grid_constant__ loopmdm::backward::Parameters parameters) {
  using namespace loopmdm;
  const Ring ring(dynamic_shared_memory());
  const backward::Kept kept(ring);
  if (threadIdx.x == 0) {
    kept.initialise();
    ring.initialise();
  }
  Ring::meet_all();
  load_and_compute<backward::kLoadRegisters>([&] { backward::Loader(parameters, ring, kept).run(); },
                                             [&] { backward::Worker(parameters, ring, kept).run(); });
  if (Config::kBlocks > 1) Ring::meet_all();  // others load for a block, too
}
