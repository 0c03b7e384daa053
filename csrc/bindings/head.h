// Reads and checks the arguments that make a HeadProblem.
#pragma once

#include "bindings/tensor_view.h"
#include "cpu/head/token_race.h"
#include "cpu/machine/isa.h"

namespace loopmdm {

// `weight`: [vocab_size, D], packed for `isa`; as it is if not `packed`, and then left to token_race_problem.
// Throws like TensorView.
cpu::HeadProblem head_problem(pybind11::handle hidden, pybind11::handle rows, pybind11::handle norm,
                              pybind11::handle shift, pybind11::handle gain, pybind11::handle weight,
                              pybind11::handle bias, bool normalized, bool bf16, cpu::Isa isa,
                              bool packed = true);

// `weight` [vocab_size, D] and what quantize_head made of it, for sample_tokens; but for the rows.
cpu::TokenRaceProblem token_race_problem(const cpu::HeadProblem& head, pybind11::handle quantized,
                                         pybind11::handle weight);

}  // namespace loopmdm
