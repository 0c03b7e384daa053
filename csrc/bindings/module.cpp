// Python module loopmdm_kernels._C.
#include <pybind11/pybind11.h>

#include "bindings/ops.h"
#include "common/philox.h"
#include "cpu/machine/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of loopmdm_kernels for the CPU.";
  m.def("cpu_isa", [] { return std::string(loopmdm::cpu::isa_name(loopmdm::cpu::current_isa())); });
  m.def("usable_cpu_isas", &loopmdm::cpu::usable_isa_names);
  m.def("philox", [](uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    const auto words = loopmdm::philox4x32(loopmdm::philox_key(seed), c0, c1, c2, c3);
    return py::make_tuple(words.word[0], words.word[1], words.word[2], words.word[3]);
  });
  loopmdm::bind_attention(m);
  loopmdm::bind_decoding(m);
  loopmdm::bind_head_logits(m);
  loopmdm::bind_linear(m);
  loopmdm::bind_looped_blocks(m);
  loopmdm::bind_masked_cross_entropy(m);
  loopmdm::bind_peak(m);
  loopmdm::bind_sample_rows(m);
  loopmdm::bind_threads(m);
}
