// One function an op: reads its arguments, releases the GIL, calls the kernel.
#pragma once

#include <pybind11/pybind11.h>

namespace loopmdm {

void bind_attention(pybind11::module_& m);
void bind_decoding(pybind11::module_& m);
void bind_head_logits(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_looped_blocks(pybind11::module_& m);
void bind_masked_cross_entropy(pybind11::module_& m);
void bind_peak(pybind11::module_& m);
void bind_sample_rows(pybind11::module_& m);
void bind_threads(pybind11::module_& m);

}  // namespace loopmdm
