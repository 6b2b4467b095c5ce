// Weights of a product as kernels take them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "instruction_set.h"
#include "matrices.h"
#include "product.h"
#include "scratch.h"
#include "threads.h"
#include "writer.h"

namespace quantformer {

inline void prefetch([[maybe_unused]] const void* address) {
#ifdef __GNUC__
  __builtin_prefetch(address);
#endif
}

// The weights of the panel that begins at `place`, of which `rows` becomes a part.
inline Panel panel_at(const Product& p, const int32_t* order, int64_t places, int64_t place, const uint8_t** rows,
                      uint8_t* scratch) {
  for (int i = 0; i < kPanel; ++i) {
    const int64_t output = output_at(order, places, place + i);
    rows[i] = p.codes + (output >= p.outputs || p.by_column ? 0 : output * p.code_stride);
  }
  const int64_t outputs = std::min<int64_t>(kPanel, places - place);
  return {rows, outputs, p.columns, p.bits, p.multiplier, p.addend, p.source, p.positions, scratch,
          p.by_column ? p.codes + place : nullptr, p.code_stride};
}

// Unpacks panels, of which it holds some at a time.
class Panels {
 public:
  Panels(const Product& product, const Codes* then, const Plan& plan, const InstructionSet& set, int64_t held,
         Scratch& scratch)
      : product_(product), set_(set), order_(order_of(then)), places_(places_of(product, then)), words_(plan.words),
        prepared_(in_order(product, then) && !plan.words), merged_(plan.merged),
        panels_(scratch.take<int16_t>(held * words_in(product))),
        unpacking_(scratch.take<uint8_t>(panel_scratch_bytes(product.columns))),
        weights_(scratch.take<uint8_t>(product.groups * kWeights)) {
    for (int64_t g = 0; g < (merged_ ? product.groups : 1); ++g) {
      const int multiple = merged_ ? product.multiples[g] : 1;
      for (int code = 0; code < kWeights; ++code) {
        weights_[g * kWeights + code] = static_cast<uint8_t>((code * product.multiplier + product.addend) * multiple);
      }
    }
  }

  static size_t scratch_bytes(const Product& product, int64_t held) {
    return held * words_in(product) * sizeof(int16_t) + panel_scratch_bytes(product.columns) + product.groups * kWeights;
  }

  // Bytes from one that is held to the next.
  int64_t step() const { return words_in(product_) * sizeof(int16_t); }

  // The one of the places from n * kPanel on, bytes or words, as number `at` of those that are held.
  const void* unpack(int64_t n, int64_t at = 0) {
    const Product& p = product_;
    int16_t* const panel = panels_ + at * words_in(p);
    if (prepared_) {
      const uint8_t* codes = p.ordered + n * prepared_bytes();
      int64_t start = 0;
      for (int64_t g = 0; g < (merged_ ? p.groups : 1); ++g) {
        const int64_t end = merged_ ? p.group_ends[g] : p.positions;
        set_.unpack_ordered({codes + prepared_bytes(start), p.ordered_bits, weights_ + g * kWeights, end - start},
                            reinterpret_cast<int8_t*>(panel) + start * kPanel);
        start = end;
      }
      return panel;
    }
    const uint8_t* rows[kPanel];
    const Panel packed = panel_at(p, order_, places_, n * kPanel, rows, unpacking_);
    if (words_) {
      set_.unpack_words(packed, panel);
    } else {
      set_.unpack_bytes(packed, reinterpret_cast<int8_t*>(panel));
    }
    return panel;
  }

  // Has weights of the panels from n to n + count come from far, part `part` of `parts`, while others are multiplied: all at
  // once would be waited for.
  void fetch(int64_t n, int64_t count, int64_t part, int64_t parts) const {
    const Product& p = product_;
    if (p.by_column) return;
    const int64_t last = std::min(places_, (n + count) * kPanel);
    if (prepared_) {
      const int64_t end = divide_up(last, kPanel) * prepared_bytes();
      fetch_part(p.ordered, n * prepared_bytes(), end, part, parts);
      return;
    }
    for (int64_t place = n * kPanel + part; place < last; place += parts) {
      const int64_t output = output_at(order_, places_, place);
      if (output < p.outputs) fetch_part(p.codes, output * p.code_stride, (output + 1) * p.code_stride, 0, 1);
    }
  }

 private:
  // Bytes that come from memory together.
  static constexpr int64_t kLine = 64;

  // Of the words that it may be made of. Who multiplies matrices reads beyond the last position, a matrix at most.
  static int64_t words_in(const Product& product) { return (product.positions + kMatrixPositions) * kPanel; }

  int64_t prepared_bytes() const { return prepared_bytes(product_.positions); }
  int64_t prepared_bytes(int64_t positions) const { return positions * kPanel * product_.ordered_bits / 8; }

  static void fetch_part(const uint8_t* from, int64_t begin, int64_t end, int64_t part, int64_t parts) {
    const int64_t lines = divide_up(std::max<int64_t>(0, end - begin), kLine), share = divide_up(lines, parts);
    for (int64_t line = part * share; line < std::min((part + 1) * share, lines); ++line) {
      prefetch(from + begin + line * kLine);
    }
  }

  const Product& product_;
  const InstructionSet& set_;
  const int32_t* const order_;
  const int64_t places_;
  const bool words_, prepared_, merged_;
  int16_t* const panels_;
  uint8_t* const unpacking_;
  uint8_t* const weights_;  // `[groups or one][kWeights]`
};

}  // namespace quantformer
