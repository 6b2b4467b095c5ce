// Codes of 16 rows by column, so that a channel is one load wherever it lies: for sets of instructions with vectors of
// 16 bytes. `V` is their struct of such instructions. The file that includes this defines TARGET, the attribute of the
// functions that use them, and this namespace is its own: instances for two sets must not be taken for one.
#pragma once

#include <cstring>

#include "instruction_set.h"

namespace quantformer {
namespace {

static_assert(kPanel == 16 && kBlock == 16, "a vector holds a code of each row");

// Transposes 16 by 16 bytes: four rounds that each interleave row i with row i + 8. The result is in `a`.
template <typename V>
TARGET inline void transpose(typename V::Block* a) {
  typename V::Block b[16];
  typename V::Block *from = a, *to = b;
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = V::low_bytes(from[i], from[i + 8]);
      to[2 * i + 1] = V::high_bytes(from[i], from[i + 8]);
    }
    auto other = from;
    from = to;
    to = other;
  }
}

// `rows` rows, at most 16, each `width` bytes wherever it lies, to `[stride][16]`, stride being `width` up to a multiple
// of 16.
template <typename V>
TARGET void to_columns(const uint8_t* const* from, int64_t rows, int64_t width, uint8_t* columns) {
  for (int64_t c = 0; c < width; c += 16) {
    typename V::Block block[16];
    if (rows == 16 && width - c >= 16) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) block[i] = V::load(from[i] + c);
    } else {
      uint8_t part[16 * 16] = {};
      for (int64_t i = 0; i < rows; ++i) std::memcpy(part + i * 16, from[i] + c, width - c < 16 ? width - c : 16);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) block[i] = V::load(part + i * 16);
    }
    transpose<V>(block);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) V::store(columns + (c + i) * 16, block[i]);
  }
}

// There and back.
template <typename V>
TARGET void reorder(const Order& order) {
  const uint8_t* rows[kBlock];
  for (int64_t r = 0; r < kBlock; ++r) rows[r] = order.rows + r * order.stride;
  to_columns<V>(rows, kBlock, order.stride, order.scratch);
  std::memset(order.scratch + order.columns * kBlock, 0, kBlock);
  for (int64_t k = 0; k < order.positions; k += 16) {
    const int64_t n = order.positions - k < 16 ? order.positions - k : 16;
    typename V::Block block[16];
    for (int64_t i = 0; i < 16; ++i) {
      block[i] = V::load(order.scratch + int64_t{order.source[i < n ? k + i : k]} * kBlock);
    }
    transpose<V>(block);
    uint8_t* out = order.out + k;
    for (int64_t r = 0; r < order.rows_out; ++r, out += order.positions) {
      if (n == 16) {
        V::store(out, block[r]);
      } else {
        std::memcpy(out, &block[r], n);
      }
    }
  }
}

// Bytes of packed codes by column, `[byte][16]`, to codes by column; `bits` is 1, 2 or 4, and none lies across bytes.
template <typename V>
TARGET void split_bytes(const uint8_t* bytes, int bits, int64_t columns, uint8_t* codes) {
  const auto mask = V::repeat_byte((1 << bits) - 1);
  for (int64_t c = 0; c < columns; bytes += 16) {
    auto byte = V::load(bytes);
    for (int bit = 0; bit < 8 && c < columns; bit += bits, ++c) {
      V::store(codes + c * 16, V::both(byte, mask));
      byte = V::shift_right(byte, bits);
    }
  }
}

// Codes by column, `[columns + 1][kPanel]`, the last one of zeros.
template <typename V>
TARGET const uint8_t* codes_by_column(const Panel& p) {
  const int64_t stride = (p.columns + 15) / 16 * 16;
  uint8_t* rows = p.scratch;
  uint8_t* columns = rows + stride * kPanel;
  uint8_t* bytes = columns + (stride + 1) * kPanel;
  const int64_t width = (p.columns * p.bits + 7) / 8;
  if (p.by_column != nullptr) {
    for (int64_t c = 0; c < p.columns; ++c) {
      V::store(columns + c * kPanel, V::load(p.by_column + c * p.column_stride));
    }
  } else if (8 % p.bits == 0) {
    // Whole bytes change places: fewer than codes.
    to_columns<V>(p.codes, p.rows, width, p.bits == 8 ? columns : bytes);
    if (p.bits < 8) split_bytes<V>(bytes, p.bits, p.columns, columns);
  } else {
    const uint8_t* decoded[kPanel];
    for (int64_t r = 0; r < p.rows; ++r) {
      // Decoding reads beyond the end of its row, and so works on a copy.
      std::memcpy(bytes, p.codes[r], width);
      decoded[r] = rows + r * stride;
      V::decode_row(bytes, p.bits, p.columns, rows + r * stride);
    }
    to_columns<V>(decoded, p.rows, p.columns, columns);
  }
  std::memset(columns + p.columns * kPanel, 0, kPanel);
  return columns;
}

template <typename V>
TARGET void unpack_bytes(const Panel& p, int8_t* panel) {
  const uint8_t* columns = codes_by_column<V>(p);
  const auto addend = V::repeat_byte(p.addend), doubled = V::repeat_byte(p.multiplier == 2 ? -1 : 0);
  for (int64_t k = 0; k < p.positions; k += 4, panel += 4 * kPanel) {
    typename V::Block w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto u = V::load(columns + int64_t{p.source[k + i]} * kPanel);
      w[i] = V::add_bytes(V::add_bytes(u, V::both(u, doubled)), addend);
    }
    const auto ab = V::low_bytes(w[0], w[1]), cd = V::low_bytes(w[2], w[3]);
    const auto ef = V::high_bytes(w[0], w[1]), gh = V::high_bytes(w[2], w[3]);
    V::store(panel, V::low_words(ab, cd));
    V::store(panel + 16, V::high_words(ab, cd));
    V::store(panel + 32, V::low_words(ef, gh));
    V::store(panel + 48, V::high_words(ef, gh));
  }
}

template <typename V, int kBits>
TARGET inline void spread(const uint8_t* codes, int64_t positions, typename V::Block weights, int8_t* panel) {
  const auto mask = V::repeat_byte((1 << kBits) - 1);
  for (int64_t k = 0; k < positions; k += 4, codes += 8 * kBits) {
    for (int start = 0; start < 8; start += kBits) {
      for (int at = 0; at < 8 * kBits; at += 16, panel += 16) {
        V::store(panel, V::look_up(weights, V::both(V::shift_right(V::load(codes + at), start), mask)));
      }
    }
  }
}

template <typename V>
TARGET void unpack_ordered(const Ordered& o, int8_t* panel) {
  (o.bits == 2 ? spread<V, 2> : spread<V, 4>)(o.codes, o.positions, V::load(o.weights), panel);
}

// How vectors decode codes of up to 7 bits, eight at a time: a code lies in two neighbouring bytes, which a shuffle by
// `places` brings together; it starts at bit `starts` of the two.
struct Window {
  alignas(16) uint8_t places[16];
  alignas(16) uint16_t starts[8];
  explicit Window(int bits) {
    for (int i = 0; i < 8; ++i) {
      places[2 * i] = static_cast<uint8_t>(i * bits / 8);
      places[2 * i + 1] = static_cast<uint8_t>(i * bits / 8 + 1);
      starts[i] = static_cast<uint16_t>(i * bits % 8);
    }
  }
};

}  // namespace
}  // namespace quantformer
