// What makes codes of numbers.
#pragma once

#include <cstdint>

struct LayerNorm {
  const float *weight, *bias;  // `(channels,)`, or null
  float epsilon;
};

// Codes of activations: row by row, clamp(round((f(x) - offset) * inverse), 0, largest), then in the order of `source`.
// f is GELU where `gelu` is not zero, and LayerNorm where `norm` is not null.
struct Codes {
  const float* x;  // `(rows, channels)`
  int64_t rows, channels;
  const float* offset;   // `(channels,)`
  const float* inverse;  // `(channels,)`, 1 / scale
  int32_t largest, gelu;
  const int32_t* source;  // `(positions,)`, the channel of each position, `channels` for padding; null: as they are
  int64_t positions;
  uint8_t* codes;  // `(rows, positions)`
  const LayerNorm* norm;
  // Of every `image_rows` rows the first `first_rows`, the class token, are made to codes by `first`, which has offset,
  // inverse and largest of its own, and all else as here. Null: none is.
  const Codes* first;
  int64_t first_rows, image_rows;
  int64_t stride;  // from one row of codes to the next where a product makes them; 0: positions
};
