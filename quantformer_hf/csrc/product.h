// A product of codes by codes: what linear layers and both products of attention are made of.
#pragma once

#include <cstdint>
#include <vector>

#include "codes.h"
#include "instruction_set.h"

namespace quantformer {

// y[row][output] = sums(row, output) * scale[output] + bias[output], `sums` as in instruction_set.h.
struct Product {
  const uint8_t* x;  // codes, `(rows, x_stride)`, in the order of positions
  int64_t rows, x_stride;
  int largest_x;     // of the codes

  const uint8_t* codes;  // `(outputs, code_stride)`, as packed in files
  int64_t code_stride;
  int64_t outputs, columns;
  int bits;          // that a packed code takes
  int largest_code;  // less than 2^bits where codes lie in more bits than they need
  int multiplier, addend;  // weight = code * multiplier + addend

  const int32_t* source;  // `(positions,)`, see Panel
  int64_t positions;
  const int64_t* group_ends;  // `(groups,)`, multiples of 4 that rise to `positions`
  const float* group_scales;
  int64_t groups;
  // The scales once more, as whole multiples of units, where those of a unit may be added up as one: weights times multiples
  // are bytes, and no sum in floating point is rounded, so that the bits are the same (`merging.py`). Null: they may not.
  const uint8_t* multiples;  // `(groups,)`
  const float* units;        // `(groups,)`

  const float* scale;  // `(outputs,)`
  const float* bias;   // `(outputs,)`
  float* y;            // `(rows, y_stride)`
  int64_t y_stride;

  // Whether codes lie as `(columns, code_stride)`, a byte each, of whole panels: outputs beyond the last one are read.
  int32_t by_column;

  // The same codes once more, or null: so they take less time to unpack, and serve where what reads the outputs takes them in
  // this order (null: as they are). As `order_panels` puts them, of so many bits, or `order_pairs` (0).
  const uint8_t* ordered;
  int ordered_bits;
  const int32_t* output_order;

  // As of `Codes`: the product of the class token, with scales of groups, bias and largest code of its own.
  const Product* first;
  int64_t first_rows, image_rows;
};

// How a product is cut into segments for the instruction set at hand.
struct Plan {
  bool words;   // whether it takes words in place of bytes
  bool merged;  // whether groups of a unit are one, and weights are multiplied by the groups' multiples
  std::vector<Segment> segments;
};

// As read by `then`, which may be null.
Plan plan(const Product& product, const Codes* then, const InstructionSet& set);

// The weights in `ordered_bits`, 2 or 4, each, in the order in which panels of bytes have them, and outputs in that in which
// `then` takes them, where there is one: `(panels, positions / 4, 8 * bits)`, see `Ordered`.
void order_panels(const Product& product, const Codes* then, uint8_t* ordered);

// Panels `begin` to `end` of kPanel outputs each, rows `first` to `last`. Threads call it side by side. Where there is a
// `then` (`quantformer_multiply_to_codes`), a panel has kPanel of its positions, and each tile becomes codes while it is in
// cache: weights are taken in the order in which the codes are to lie.
void multiply(const Product& product, const Codes* then, const Plan& plan, const InstructionSet& set, int64_t begin,
              int64_t end, int64_t first, int64_t last);

}  // namespace quantformer
