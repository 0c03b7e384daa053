// Which compiled copy of the CPU kernels this machine runs.
#pragma once

#include <string>

// of_each(instruction set, ...) for those that this build contains, each a superset of the one before.
#if defined(__x86_64__)
#  define LOOPMDM_ISAS(of_each, ...)                                                      \
    of_each(generic, __VA_ARGS__) of_each(avx2, __VA_ARGS__) of_each(avx512, __VA_ARGS__) \
        of_each(avx512_bf16, __VA_ARGS__) of_each(amx_bf16, __VA_ARGS__)
#elif defined(__aarch64__)
#  define LOOPMDM_ISAS(of_each, ...) of_each(generic, __VA_ARGS__) of_each(asimd_bf16, __VA_ARGS__)
#else
#  define LOOPMDM_ISAS(of_each, ...) of_each(generic, __VA_ARGS__)
#endif

namespace loopmdm::cpu {

#define LOOPMDM_ISA_NAME(isa, ...) isa,
enum class Isa { LOOPMDM_ISAS(LOOPMDM_ISA_NAME) };
#undef LOOPMDM_ISA_NAME

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

// Declares name(isa), the table of functions that was compiled for an instruction set (see kernel.cpp.in).
#define LOOPMDM_KERNEL(Table, name)                                                        \
  LOOPMDM_ISAS(LOOPMDM_DECLARE_TABLE, Table, name)                                         \
  inline const Table& name(Isa isa) {                                                      \
    static constexpr const Table* kTables[] = {LOOPMDM_ISAS(LOOPMDM_TABLE_ADDRESS, name)}; \
    return *kTables[static_cast<int>(isa)];                                                \
  }
#define LOOPMDM_DECLARE_TABLE(isa, Table, name) \
  namespace isa {                               \
  extern const Table name;                      \
  }
#define LOOPMDM_TABLE_ADDRESS(isa, name) &isa::name,
