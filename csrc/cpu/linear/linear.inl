// Packing of weights into the panels of tile.inl.
#pragma once

#include "cpu/vector/tile.inl"

template <class Operand, class Source>
void pack_panel_of(const Source* w, const LinearSource& source, const LinearLayout& layout, int64_t group,
                   int64_t panel, uint32_t* packed) {
  const int64_t first = panel * kPanel, group_width = layout.group_width(group);
  if (first >= group_width) return;
  const int width = panel_width(group_width, first);
  uint32_t* out = packed + layout.group_offset(group) + first * layout.words;
  if (source.transposed) {  // a plain matrix, one unit
    for (int64_t k = 0; k < layout.words; ++k, out += width) {
      const int64_t row = k * Operand::kPerWord;
      const bool has_odd = Operand::kPerWord == 2 && row + 1 < source.depth;
      const Source* at = w + row * source.columns + first;
      for (int j = 0; j < width; j += kLanes) {
        const int64_t filled = source.columns - first - j;
        const Floats even = load_some(at + j, filled);
        const Floats odd = has_odd ? load_some(at + source.columns + j, filled) : Floats{};
        store_words(out + j, Operand::zip(even, odd));
      }
    }
    return;
  }
  for (int j = 0; j < width; j += kLanes) {
    // A vector of columns lies in one unit: unit_width is a multiple of kLanes.
    const int64_t unit = group * layout.units_per_group + (first + j) / layout.unit_width;
    const int64_t in_unit = (first + j) % layout.unit_width;
    const int64_t column = unit * layout.unit + in_unit;
    const int64_t filled = layout.unit - in_unit;  // columns left in the unit
    const int here = static_cast<int>(filled < kLanes ? filled : kLanes);
    pack_columns<Operand>(w + column * source.depth, source.depth, here, source.depth, layout.words, width,
                          out + j);
  }
}

void pack_panel(const LinearSource& source, const LinearLayout& layout, bool bf16, int64_t group,
                int64_t panel, uint32_t* packed) {
  const float* floats = static_cast<const float*>(source.data);
  const uint16_t* halves = static_cast<const uint16_t*>(source.data);
  if (source.is_bf16)
    bf16 ? pack_panel_of<Bf16::Weights>(halves, source, layout, group, panel, packed)
         : pack_panel_of<Fp32>(halves, source, layout, group, panel, packed);
  else
    bf16 ? pack_panel_of<Bf16::Weights>(floats, source, layout, group, panel, packed)
         : pack_panel_of<Fp32>(floats, source, layout, group, panel, packed);
}

constexpr LinearKernel table = {kLanes, kPanel, Bf16::kPerWord, pack_panel};
