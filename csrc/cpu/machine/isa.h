// Which compiled copy of the CPU kernels this machine runs.
#pragma once

#include <string>

namespace loopmdm::cpu {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx_bf16 };

const char* isa_name(Isa isa);

// Whether the processor and the operating system support `isa`, and this build contains it. AMX needs the
// system's permission, which the first call requests for the whole process.
bool isa_usable(Isa isa);

// The best usable level. The environment variable LOOPMDM_CPU_ISA, read at every call, names another one;
// throws std::runtime_error if that name is unknown or not usable here.
Isa current_isa();

// "generic, avx2, ...": what LOOPMDM_CPU_ISA accepts on this machine.
std::string usable_isa_names();

}  // namespace loopmdm::cpu
