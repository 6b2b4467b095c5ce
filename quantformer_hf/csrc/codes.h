// What makes codes of numbers.
#pragma once

#include <cstdint>

// Levels of a scale: integers from 0, one step apart up to the knee and kCoarseStep apart above it. All are one apart where the
// knee is the highest.
constexpr int kCoarseStep = 3;
struct Levels {
  int32_t knee, last;  // `last` is the number of the highest level
  bool twin() const { return knee < last; }
};
// Of positions beyond the knee, numbers of levels: one rounding, as all others.
constexpr float kOneCoarse = 1.0f / kCoarseStep;
inline Levels levels_up_to(int32_t largest, int32_t knee) { return {knee, knee + (largest - knee) / kCoarseStep}; }

struct LayerNorm {
  const float *weight, *bias;  // `(channels,)`, or null
  float epsilon;
};

// Codes of activations: row by row, the level from 0 to `largest` that is nearest to (f(x) - offset) * inverse, then in the
// order of `source`. f is GELU where `gelu` is not zero, and LayerNorm where `norm` is not null.
struct Codes {
  const float* x;  // `(rows, channels)`
  int64_t rows, channels;
  const float* offset;   // `(channels,)`
  const float* inverse;  // `(channels,)`, 1 / scale
  int32_t largest, knee, gelu;
  const int32_t* source;  // `(positions,)`, the channel of each position, `channels` for padding; null: as they are
  int64_t positions;
  uint8_t* codes;  // `(rows, positions)`
  const LayerNorm* norm;
  // Of every `image_rows` rows the first `first_rows`, the class token, are made to codes by `first`, which has offset,
  // inverse, largest and knee of its own, and all else as here. Null: none is.
  const Codes* first;
  int64_t first_rows, image_rows;
  int64_t stride;  // from one row of codes to the next where a product makes them; 0: positions
};
