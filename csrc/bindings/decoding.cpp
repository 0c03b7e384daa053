#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <vector>

#include "bindings/blocks.h"
#include "bindings/head.h"
#include "bindings/ops.h"
#include "cpu/decoding/steps.h"

namespace py = pybind11;

namespace loopmdm {
namespace {

// A network whose tensors were checked once. They are kept alive, and must not be written to.
class PreparedNetwork {
 public:
  // blocks: for each the tensors of BlockWeights, packed; modulation: [blocks, 1, 6, D].
  // head: what `sample_rows` takes before the excluded token, of any hidden state [1, 1, D]; or what
  // `sample_tokens` does, with `quantized`, which is None where draws come with their statistics.
  PreparedNetwork(py::handle embedding_arg, py::handle positions_arg, const py::sequence& blocks,
                  py::handle modulation, int64_t num_before, int64_t num_after, int64_t heads, py::handle cos,
                  py::handle sin, const py::sequence& head, int64_t excluded_token, py::handle quantized)
      : isa_(cpu::current_isa()),
        kept_(py::make_tuple(embedding_arg, positions_arg, blocks, modulation, cos, sin, head, quantized)) {
    const TensorView embedding(embedding_arg, "embedding", {DType::float32, DType::bfloat16}, {kAny, kAny});
    const int64_t vocab_size = embedding.size(0), hidden = embedding.size(1);
    if (heads < 1 || hidden % (2 * heads) != 0)
      throw py::value_error("num_heads: got " + std::to_string(heads) + " for " + std::to_string(hidden));
    if (py::len(head) != 9) throw py::value_error("head: expected 9 operands");
    if (excluded_token < 0 || excluded_token >= vocab_size || vocab_size < 2)
      throw py::value_error("excluded_token: expected a token of a vocabulary of at least 2, got " +
                            std::to_string(excluded_token));
    const bool bf16 = head[8].cast<bool>();
    network_.head = head_problem(head[0], head[1], head[2], head[3], head[4], head[5], head[6],
                                 head[7].cast<bool>(), bf16, isa_, /*packed=*/quantized.is_none());
    if (network_.head.width != hidden || network_.head.vocab_size != vocab_size)
      throw py::value_error("head: expected [" + std::to_string(vocab_size) + ", " + std::to_string(hidden) +
                            "] like the embedding");
    if (!quantized.is_none()) network_.race = token_race_problem(network_.head, quantized, head[5]);
    network_.embedding = embedding.data();
    network_.embedding_is_bf16 = embedding.dtype() == DType::bfloat16;
    network_.positions = nullptr;
    if (!positions_arg.is_none()) {
      const TensorView positions(positions_arg, "positions", {embedding.dtype()}, {kAny, hidden});
      network_.positions = positions.data();
      most_positions_ = positions.size(0);
    }
    network_.cos = network_.sin = nullptr;
    if (!cos.is_none()) {
      const int64_t half = hidden / heads / 2;
      const TensorView cos_view(cos, "rotary.cos", {DType::float32}, {kAny, half});
      network_.cos = cos_view.as<const float>();
      network_.sin =
          TensorView(sin, "rotary.sin", {DType::float32}, {cos_view.size(0), half}).as<const float>();
      most_positions_ = std::min(most_positions_, cos_view.size(0));
    }
    network_.hidden = hidden;
    network_.heads = heads;
    network_.excluded_token = excluded_token;
    network_.bf16 = bf16;
    network_.width = block_width(blocks);
    network_.blocks = block_pointers(blocks, hidden, network_.width, heads, bf16, isa_);
    network_.num_before = num_before;
    network_.num_after = num_after;
    const int64_t stored = static_cast<int64_t>(network_.blocks.size());
    if (num_before < 0 || num_after < 0 || num_before + num_after >= stored)
      throw py::value_error("blocks: expected some in the loop");
    network_.modulation =
        TensorView(modulation, "modulation", {DType::float32}, {stored, 1, 6, hidden}).as<const float>();
  }

  const cpu::Network& network() const { return network_; }
  cpu::Isa isa() const { return isa_; }
  int64_t most_positions() const { return most_positions_; }

 private:
  const cpu::Isa isa_;
  const py::object kept_;
  cpu::Network network_{};
  int64_t most_positions_ = std::numeric_limits<int64_t>::max();
};

cpu::Rating rating_of(const std::string& name) {
  constexpr std::array<const char*, 5> kNames = {"none", "confidence", "margin", "certainty", "place"};
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return static_cast<cpu::Rating>(i);
  throw py::value_error("rating: got " + name);
}

// A run of denoising steps. Its tensors are kept alive; those of the state are written to.
class DecodingRun {
 public:
  // slots: sequence, position, sequence_id, block [N]. schedule: (slots by step [N], ends [T]) or None.
  // place: [N] or None. pace: rating, score, threshold or None, entropy bound, window. computes: num_loops,
  // min_loops, exit_threshold [T]. state: tokens [B, L], masked [N], network_calls, loops [B]; revealed,
  // revealed_step, revealed_loops, log_prob [N].
  DecodingRun(const PreparedNetwork& network, const py::sequence& slots, const py::object& schedule,
              const py::object& place, const py::tuple& pace, const py::sequence& computes, int64_t max_batch,
              uint64_t seed, double temperature, const py::sequence& state)
      : network_(network), kept_(py::make_tuple(slots, schedule, place, computes, state)) {
    const TensorView tokens(state[0], "tokens", {DType::int64}, {kAny, kAny});
    const TensorView masked(state[1], "masked", {DType::boolean}, {kAny});
    const TensorView num_loops(computes[0], "num_loops", {DType::int64}, {kAny});
    const int64_t batch = tokens.size(0), length = tokens.size(1), size = masked.size(0);
    const int64_t num_steps = num_loops.size(0);
    const auto integers = [](const py::object& tensor, const char* name, int64_t count, int64_t limit) {
      const TensorView view(tensor, name, {DType::int64}, {count});
      check_range(view, name, limit);
      return view.as<int64_t>();
    };
    constexpr int64_t kAnyValue = std::numeric_limits<int64_t>::max();
    if (length > network.most_positions())
      throw py::value_error("tokens: expected at most " + std::to_string(network.most_positions()) +
                            " positions, got " + std::to_string(length));
    for (int64_t i = 0; i < batch * length; ++i)
      if (tokens.as<int64_t>()[i] < 0 || tokens.as<int64_t>()[i] >= network.network().head.vocab_size)
        throw py::value_error("tokens: expected ids of the vocabulary");
    if (max_batch < 1) throw py::value_error("max_batch: expected at least 1");
    if (!(temperature >= 0) || temperature > 3e38)
      throw py::value_error("temperature: expected a finite number >= 0, got " + std::to_string(temperature));

    problem_ = {
        .network = &network.network(),
        .slots = {integers(slots[0], "sequence", size, batch), integers(slots[1], "position", size, length),
                  integers(slots[2], "sequence_id", size, int64_t{1} << 32),
                  integers(slots[3], "block", size, kAnyValue), size},
        .pace = {.by_step = nullptr,
                 .ends = nullptr,
                 .rating = rating_of(pace[0].cast<std::string>()),
                 .score = rating_of(pace[1].cast<std::string>()),
                 .place = nullptr,
                 .threshold =
                     pace[2].is_none() ? std::numeric_limits<float>::quiet_NaN() : pace[2].cast<float>(),
                 .entropy_bound = pace[3].cast<double>(),
                 .window = pace[4].cast<int64_t>()},
        .computes = {num_loops.as<int64_t>(), integers(computes[1], "min_loops", num_steps, kAnyValue),
                     TensorView(computes[2], "exit_threshold", {DType::float64}, {num_steps}).as<double>()},
        .num_steps = num_steps,
        .batch = batch,
        .length = length,
        .max_batch = max_batch,
        .mask_token = network.network().excluded_token,
        .seed = seed,
        .temperature = static_cast<float>(temperature),
    };
    for (int64_t i = 0; i < num_steps; ++i)
      if (problem_.computes.min_loops[i] < 1 ||
          problem_.computes.num_loops[i] < problem_.computes.min_loops[i])
        throw py::value_error("num_loops: expected at least min_loops, which is at least 1");
    cpu::Pace& p = problem_.pace;
    if (!place.is_none()) p.place = TensorView(place, "place", {DType::float64}, {size}).as<double>();
    if (p.rating == cpu::Rating::place && p.place == nullptr)
      throw py::value_error("place: expected a tensor");
    const bool rated = p.rating != cpu::Rating::none && p.rating != cpu::Rating::place;
    if (network.network().race && (rated || schedule.is_none()))
      throw py::value_error("rating: expected none of predictions whose tokens are drawn alone");
    if (p.window < 1) throw py::value_error("window: expected at least 1");
    if (!schedule.is_none()) {
      const py::tuple both = schedule;
      p.by_step = integers(both[0], "schedule", size, size);
      p.ends = integers(both[1], "ends", num_steps, size + 1);
      if (!std::is_sorted(p.ends, p.ends + num_steps))
        throw py::value_error("ends: expected an ascending order");
    } else if (p.rating == cpu::Rating::none) {
      throw py::value_error("schedule: expected one where nothing is rated");
    }
    const auto of = [&](size_t index, const char* name, int64_t count) {
      return TensorView(state[index], name, {DType::int64}, {count}).as<int64_t>();
    };
    state_ = {.tokens = tokens.as<int64_t>(),
              .masked = masked.as<bool>(),
              .network_calls = of(2, "network_calls", batch),
              .loops = of(3, "loops", batch),
              .revealed = of(4, "revealed", size),
              .revealed_step = of(5, "revealed_step", size),
              .revealed_loops = of(6, "revealed_loops", size),
              .log_prob = TensorView(state[7], "log_prob", {DType::float32}, {size}).as<float>()};
  }

  // (steps taken, slots revealed, network calls, sequences in them, their loops, rows drawn, slot of a
  // prediction that is not finite or -1).
  py::tuple take_steps(int64_t first, int64_t most, double milliseconds, int num_threads) {
    check_num_threads(num_threads);
    if (first < 0 || first > problem_.num_steps) throw py::value_error("first: got " + std::to_string(first));
    cpu::DecodingProgress progress;
    {
      const py::gil_scoped_release release;
      progress = cpu::take_steps(problem_, state_, first, most, revealed_, milliseconds, network_.isa(),
                                 num_threads);
      revealed_ += progress.revealed;
    }
    return py::make_tuple(progress.steps, progress.revealed, progress.calls, progress.sequence_calls,
                          progress.loops, progress.rows, progress.not_finite);
  }

 private:
  const PreparedNetwork& network_;
  const py::object kept_;
  cpu::DecodingProblem problem_;
  cpu::DecodingState state_;
  int64_t revealed_ = 0;
};

}  // namespace

void bind_decoding(py::module_& m) {
  py::class_<PreparedNetwork>(m, "PreparedNetwork")
      .def(py::init<py::handle, py::handle, const py::sequence&, py::handle, int64_t, int64_t, int64_t,
                    py::handle, py::handle, const py::sequence&, int64_t, py::handle>(),
           py::arg("embedding"), py::arg("positions"), py::arg("blocks"), py::arg("modulation"),
           py::arg("num_before"), py::arg("num_after"), py::arg("heads"), py::arg("cos"), py::arg("sin"),
           py::arg("head"), py::arg("excluded_token"), py::arg("quantized").none(true));
  py::class_<DecodingRun>(m, "DecodingRun")
      .def(py::init<const PreparedNetwork&, const py::sequence&, const py::object&, const py::object&,
                    const py::tuple&, const py::sequence&, int64_t, uint64_t, double, const py::sequence&>(),
           py::keep_alive<1, 2>(), py::arg("network"), py::arg("slots"), py::arg("schedule"),
           py::arg("place"), py::arg("pace"), py::arg("computes"), py::arg("max_batch"), py::arg("seed"),
           py::arg("temperature"), py::arg("state"))
      .def("take_steps", &DecodingRun::take_steps, py::arg("first"), py::arg("most"), py::arg("milliseconds"),
           py::arg("num_threads"));
}

}  // namespace loopmdm
