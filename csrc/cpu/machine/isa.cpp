#include "cpu/machine/isa.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#  include <sys/auxv.h>
#elif defined(__x86_64__)
#  include <cpuid.h>
#  if defined(__linux__)
#    include <sys/syscall.h>
#    include <unistd.h>
#  endif
#endif

namespace loopmdm::cpu {
namespace {

#define LOOPMDM_ISA_VALUE(isa, ...) Isa::isa,
#define LOOPMDM_ISA_STRING(isa, ...) #isa,
constexpr Isa kAllIsas[] = {LOOPMDM_ISAS(LOOPMDM_ISA_VALUE)};
constexpr const char* kNames[] = {LOOPMDM_ISAS(LOOPMDM_ISA_STRING)};

#if defined(__x86_64__)
constexpr uint64_t kSavesYmm = 0x06;                          // XCR0: SSE and AVX state
constexpr uint64_t kSavesZmm = 0xe6;                          // and opmask, upper zmm halves, zmm16-31
constexpr uint64_t kSavesTmm = 0x60000;                       // tile configuration and tile data
constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // of leaf 7, edx

struct CpuidRegisters {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidRegisters cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidRegisters r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

// The register states that the operating system saves on a context switch.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool has_all(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

// Linux saves tile data only for processes that asked for it (Documentation/arch/x86/xstate.rst).
bool tile_data_permitted() {
#  if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#  else
  return false;
#  endif
}

// Some virtual machines report AMX but no palette, and then have no tiles.
bool has_tiles(uint64_t saved) {
  return (saved & kSavesTmm) == kSavesTmm && has_all(cpuid(7, 0).edx, kAmxBf16 | kAmxTile) &&
         cpuid(0x1d, 0).eax >= 1 && tile_data_permitted();
}

Isa detect() {
  const CpuidRegisters basic = cpuid(1, 0), extended = cpuid(7, 0), extended1 = cpuid(7, 1);
  if (!has_all(basic.ecx, bit_OSXSAVE | bit_AVX | bit_FMA)) return Isa::generic;
  const uint64_t saved = saved_states();
  if ((saved & kSavesYmm) != kSavesYmm || !has_all(extended.ebx, bit_AVX2)) return Isa::generic;
  constexpr uint32_t avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  if ((saved & kSavesZmm) != kSavesZmm || !has_all(extended.ebx, avx512)) return Isa::avx2;
  if (!has_all(extended1.eax, bit_AVX512BF16) || !has_all(extended.ecx, bit_AVX512VNNI)) return Isa::avx512;
  return has_tiles(saved) ? Isa::amx_bf16 : Isa::avx512_bf16;
}
#elif defined(__aarch64__)
Isa detect() {
#  if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16 (Documentation/arch/arm64/elf_hwcaps.rst)
  if (getauxval(AT_HWCAP2) & kBf16) return Isa::asimd_bf16;
#  endif
  return Isa::generic;
}
#else
Isa detect() { return Isa::generic; }
#endif

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_usable(Isa isa) { return isa <= detected_isa(); }

std::string usable_isa_names() {
  std::string names;
  for (const Isa isa : kAllIsas) {
    if (!isa_usable(isa)) continue;
    if (!names.empty()) names += ", ";
    names += isa_name(isa);
  }
  return names;
}

Isa current_isa() {
  const char* forced = std::getenv("LOOPMDM_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return detected_isa();
  for (const Isa isa : kAllIsas)
    if (isa_usable(isa) && std::string(forced) == isa_name(isa)) return isa;
  throw std::runtime_error("LOOPMDM_CPU_ISA: got '" + std::string(forced) +
                           "'; this machine accepts: " + usable_isa_names());
}

}  // namespace loopmdm::cpu
