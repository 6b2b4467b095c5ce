// Plain C++, for every processor: what the others are compared with.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "instruction_set.h"

#define TARGET
#include "pointwise.h"

namespace quantformer {
namespace {

template <typename X, typename W, int kTogether, int R>
void multiply(const Tile& tile) {
  auto x = static_cast<const X*>(tile.x);
  auto panel = static_cast<const W*>(tile.panel);
  for (int i = 0; i < R * kPanel; ++i) tile.sums[i] = 0;
  for (int64_t s = 0; s < tile.num_segments; ++s) {
    const Segment& segment = tile.segments[s];
    int32_t sums[R][kPanel] = {};
    for (auto end = x + segment.positions; x != end; x += kTogether, panel += kTogether * kPanel) {
      for (int r = 0; r < R; ++r) {
        for (int o = 0; o < kPanel; ++o) {
          for (int k = 0; k < kTogether; ++k) {
            sums[r][o] += int32_t{x[r * tile.x_stride + k]} * panel[o * kTogether + k];
          }
        }
      }
    }
    for (int i = 0; i < R * kPanel; ++i) {
      // The build's -ffp-contract=off rounds the product before it is added.
      tile.sums[i] = tile.sums[i] + static_cast<float>(sums[i / kPanel][i % kPanel]) * segment.scale;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int o = 0; o < kPanel; ++o) {
      tile.y[r * tile.y_stride + o] = tile.sums[r * kPanel + o] * tile.scale[o] + tile.bias[o];
    }
  }
}

template <typename X, typename W, int kTogether>
constexpr TileFunction kTiles[] = {multiply<X, W, kTogether, 1>, multiply<X, W, kTogether, 2>,
                                   multiply<X, W, kTogether, 3>, multiply<X, W, kTogether, 4>};

inline int code_at(const uint8_t* row, int64_t bytes, int bits, int64_t i) {
  const int64_t at = i * bits / 8;
  const unsigned window = row[at] | (at + 1 < bytes ? row[at + 1] << 8 : 0);
  return window >> (i * bits % 8) & ((1 << bits) - 1);
}

template <typename W, int kTogether>
void unpack(const Panel& p, W* panel) {
  const int64_t bytes = (p.columns * p.bits + 7) / 8;
  for (int64_t k = 0; k < p.positions; ++k) {
    W* out = panel + k / kTogether * kTogether * kPanel + k % kTogether;
    for (int64_t r = 0; r < kPanel; ++r) {
      const int32_t c = p.source[k];
      int code = 0;
      if (r < p.rows && c < p.columns) {
        code = p.by_column == nullptr ? code_at(p.codes[r], bytes, p.bits, c) : p.by_column[c * p.column_stride + r];
      }
      out[r * kTogether] = static_cast<W>(code * p.multiplier + p.addend);
    }
  }
}

void unpack_ordered(const Ordered& o, int8_t* panel) {
  const int64_t run = 8 * o.bits;
  const uint8_t* codes = o.codes;
  for (int64_t k = 0; k < o.positions; k += 4, codes += run, panel += 4 * kPanel) {
    for (int i = 0; i < 4 * kPanel; ++i) {
      const int code = codes[i % run] >> i / run * o.bits & ((1 << o.bits) - 1);
      panel[i] = static_cast<int8_t>(o.weights[code]);
    }
  }
}

void quantize(const float* x, const float* offset, const float* inverse, Levels levels, int64_t n, uint8_t* codes) {
  const auto knee = static_cast<float>(levels.knee), last = static_cast<float>(levels.last);
  for (int64_t i = 0; i < n; ++i) {
    const float difference = x[i] - offset[i];
    float position = difference * inverse[i];
    if (levels.twin()) {
      const float beyond = (position - knee) * kOneCoarse;
      position = std::min(position, beyond + knee);
    }
    // In this order a NaN becomes zero.
    const float clipped = position > 0 ? (position < last ? position : last) : 0;
    const auto code = static_cast<int32_t>(std::nearbyint(clipped));
    codes[i] = static_cast<uint8_t>(code > levels.knee ? code + (code - levels.knee) * (kCoarseStep - 1) : code);
  }
}

void reorder(const Order& order) {
  for (int64_t r = 0; r < order.rows_out; ++r) {
    const uint8_t* row = order.rows + r * order.stride;
    for (int64_t k = 0; k < order.positions; ++k) {
      const int32_t c = order.source[k];
      order.out[r * order.positions + k] = c < order.columns ? row[c] : 0;
    }
  }
}

}  // namespace

const InstructionSet* plain() {
  static const InstructionSet set = {"plain",
                                     4,
                                     false,
                                     255,
                                     kTiles<uint8_t, int8_t, 4>,
                                     kTiles<int16_t, int16_t, 2>,
                                     unpack<int8_t, 4>,
                                     unpack<int16_t, 2>,
                                     unpack_ordered,
                                     quantize,
                                     gelu,
                                     softmax,
                                     layer_norm,
                                     add,
                                     sum,
                                     in_units_of_largest,
                                     reorder,
                                     nullptr,
                                     nullptr};
  return &set;
}

}  // namespace quantformer
