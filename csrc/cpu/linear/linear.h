// Weights of a linear layer, packed once into the panels that the kernels of one instruction set read.
#pragma once

#include <cstdint>

#include "cpu/machine/isa.h"

namespace loopmdm::cpu {

struct LinearSource {
  const void* data;  // [columns, depth], or [depth, columns] if transposed; float or bf16
  int64_t columns;
  int64_t depth;  // the summed dimension
  bool is_bf16;
  bool transposed;
};

// A word is a float, or two consecutive bf16 of the summed dimension where products are of bf16. Columns come
// in units (heads, or the whole matrix as one) padded with zero columns to `unit_width`. Units of a group lie
// side by side and are cut into panels of at most `panel` columns; each panel is [words][its columns]. The
// last group may have fewer units.
struct LinearLayout {
  int64_t unit, unit_width, num_units, units_per_group, words, panel;

  int64_t num_groups() const { return (num_units + units_per_group - 1) / units_per_group; }
  int64_t group_width(int64_t group) const {
    const int64_t left = num_units - group * units_per_group;
    return (left < units_per_group ? left : units_per_group) * unit_width;
  }
  int64_t group_offset(int64_t group) const { return group * units_per_group * unit_width * words; }
  int64_t panels_per_group() const { return (units_per_group * unit_width + panel - 1) / panel; }
  int64_t size() const { return num_units * unit_width * words; }  // in words
};

struct LinearKernel {
  int lanes, panel;
  int bf16_per_word;  // in a word of a left operand: 2 if an instruction multiplies pairs, else 1, as floats
  void (*pack_panel)(const LinearSource&, const LinearLayout&, bool bf16, int64_t group, int64_t panel,
                     uint32_t* packed);
};

LOOPMDM_KERNEL(LinearKernel, linear_kernel)

inline int64_t operands_per_word(const LinearKernel& kernel, bool bf16) {
  return bf16 ? kernel.bf16_per_word : 1;
}

// Words of a left operand; those of packed weights are in their layout.
inline int64_t operand_words(const LinearKernel& kernel, int64_t depth, bool bf16) {
  const int64_t per_word = operands_per_word(kernel, bf16);
  return (depth + per_word - 1) / per_word;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// `head_dim` divides columns where they belong to heads; 0: a plain matrix, one unit.
LinearLayout linear_layout(const LinearKernel& kernel, int64_t columns, int64_t depth, int64_t head_dim,
                           bool bf16);

// `fresh`: `packed` is new memory, which holds nothing.
void pack_linear(const LinearSource& source, const LinearLayout& layout, bool bf16, uint32_t* packed,
                 bool fresh, Isa isa, int num_threads);

}  // namespace loopmdm::cpu
