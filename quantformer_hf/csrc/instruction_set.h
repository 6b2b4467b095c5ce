// What a set of instructions provides; the drivers (kernels.cpp, product.cpp) know no instruction.
#pragma once

#include <cstdint>

#include "codes.h"

namespace quantformer {

// Output features that are worked on together: a panel of weights holds that many.
constexpr int kPanel = 16;

// Most rows of a tile, for scratch memory.
constexpr int kMostTileRows = 12;

// A run of positions whose products add up as integers before they become floating point: a whole group, or, for an
// instruction set of narrow sums, what cannot overflow these. Groups whose scales are multiples of a unit may be as one.
struct Segment {
  int64_t positions;  // multiple of 4
  bool first, last;   // of its group
  float scale;        // of the group
  int multiple;       // of what its products add up to; other than 1 for sets of narrow sums alone
};

// `rows` rows of activations against one panel; for each row and output, with one rounding an operation, in this order:
//     sum = 0; for each group: sum = sum + scale of the group * float(sum of the group's products)
//     y = sum * scale of the output + bias of the output
// Every instruction set and `reference.py` do the same, so that all give the same bits.
struct Tile {
  const void* x;       // codes: bytes, or 16-bit words for the function that takes words
  int64_t x_stride;    // elements from row to row
  const void* panel;   // bytes `[position / 4][kPanel][4]`, or words `[position / 2][kPanel][2]`
  const Segment* segments;
  int64_t num_segments;
  const float* scale;  // `[kPanel]`
  const float* bias;   // `[kPanel]`
  float* y;            // `[rows][kPanel]`
  int64_t y_stride;
  float* sums;         // `[rows][kPanel]`, scratch
  int32_t* carry;      // the same, for groups in several segments
};

using TileFunction = void (*)(const Tile&);

// Weights of up to kPanel output features, as packed in files (`packing.py`), to be unpacked into a panel. What the
// panel holds beyond `rows` and where a group was padded has no meaning: those outputs are unused, those activations
// zero.
struct Panel {
  const uint8_t* const* codes;  // of each row
  int64_t rows;                 // 1..kPanel
  int64_t columns;
  int bits;
  int multiplier, addend;  // weight = code * multiplier + addend
  const int32_t* source;   // the column of each position, `columns` where a group was padded
  int64_t positions;
  uint8_t* scratch;        // panel_scratch_bytes(columns)
  // Where the codes lie by column, a byte each: kPanel of the first column, and bytes from column to column. Else null.
  const uint8_t* by_column;
  int64_t column_stride;
};

// Codes of one panel as bytes hold them, of few bits each: of each 4 positions of all outputs, 64 bytes of a panel, byte i
// of a run of 8 * bits has the codes of those at i, i + run, i + 2 * run, ..., from its lowest bits on.
struct Ordered {
  const uint8_t* codes;    // `[positions / 4][8 * bits]`
  int bits;                // 2 or 4
  const uint8_t* weights;  // of each code, signed bytes, `[kWeights]`
  int64_t positions;
};

// Codes of weights that `Ordered` tells apart.
constexpr int kWeights = 16;

inline int64_t panel_scratch_bytes(int64_t columns) { return 3 * (columns + 32) * kPanel; }

// Rows whose channels are brought into order together.
constexpr int kBlock = 16;

struct Order {
  const uint8_t* rows;    // `[kBlock][stride]`, stride a multiple of 16
  int64_t stride, columns;
  const int32_t* source;
  int64_t positions;
  uint8_t* out;           // `[rows_out][positions]`
  int64_t rows_out;       // 1..kBlock
  uint8_t* scratch;       // (stride + 1) * kBlock bytes
};

struct Pairs;
struct Matrices;

struct InstructionSet {
  const char* name;
  int tile_rows;                  // at most kMostTileRows
  bool narrow_sums;               // products of bytes add up in 16 bits: pairs and segments must fit
  int largest_byte;               // largest code of activations that `bytes` takes: less than 255 where it is signed
  const TileFunction* bytes;      // by number of rows, from 1
  const TileFunction* words;      // the same; used where bytes would not fit
  void (*unpack_bytes)(const Panel&, int8_t* panel);
  void (*unpack_words)(const Panel&, int16_t* panel);
  void (*unpack_ordered)(const Ordered&, int8_t* panel);
  // One row: the levels nearest to (x - offset) * inverse, in the order of the channels.
  void (*quantize)(const float* x, const float* offset, const float* inverse, Levels levels, int64_t n, uint8_t* codes);
  // See pointwise.h; of softmax and LayerNorm rows side by side.
  void (*gelu)(const float* x, int64_t n, float* y);
  void (*softmax)(float* rows, int64_t count, const float* masks, int64_t stride, int64_t n);
  void (*layer_norm)(const float* x, int64_t rows, const float* weight, const float* bias, float epsilon, int64_t n,
                     float* y);
  void (*add)(const float* a, const float* b, int64_t n, float* y);
  int32_t (*sum)(const uint8_t* codes, int64_t n);
  void (*in_units_of_largest)(const float* x, int64_t n, float units, float* y);
  // kBlock rows: out[row][position] = rows[row][source[position]], zero where that is `columns`.
  void (*reorder)(const Order&);
  const Pairs* pairs;  // see pairs.h; null where multiplying is as fast
  const Matrices* matrices;  // see matrices.h; null where there are no such instructions
};

const InstructionSet* plain();
const InstructionSet* avx2();    // null where this processor, or this compiler, has it not
const InstructionSet* avx512();
const InstructionSet* amx();
const InstructionSet* neon();
const InstructionSet* neon_dotprod();

// The one in use: the best of this machine, or what the caller chose.
const InstructionSet& current();

}  // namespace quantformer
