// AMX's tiles in plain C++, for machines without it, and so that the address sanitizer sees what they read and write: what
// amx.cpp includes in place of the instructions in this test's build.
#pragma once

#include <cstdlib>
#include <cstring>

namespace quantformer {
namespace {

struct EmulatedTile {
  alignas(64) uint8_t bytes[kMatrixRows * 64];
};
thread_local EmulatedTile emulated_tiles[8];
thread_local bool configured = false;

bool available() { return true; }

void configure(const void* tiles) {
  const auto bytes = static_cast<const uint8_t*>(tiles);
  // The first of two palettes, and of each of 8 tiles the bytes of a row, in 16 bits, and the rows.
  for (int i = 0; i < 8; ++i) {
    if (bytes[0] != 1 || bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] != 0 || bytes[48 + i] != 16) std::abort();
  }
  configured = true;
}
void release() { configured = false; }

template <int kTile>
void zero() {
  if (!configured) std::abort();
  std::memset(emulated_tiles[kTile].bytes, 0, sizeof(EmulatedTile));
}
template <int kTile>
void load(const void* rows) {
  std::memcpy(emulated_tiles[kTile].bytes, rows, sizeof(EmulatedTile));
}
template <int kTile>
void load_once(const void* rows) {
  load<kTile>(rows);
}
template <int kTile>
void store(int32_t* rows) {
  std::memcpy(rows, emulated_tiles[kTile].bytes, sizeof(EmulatedTile));
}
template <int kSums, int kX, int kWeights>
void multiply() {
  int32_t sums[kMatrixRows][16];
  std::memcpy(sums, emulated_tiles[kSums].bytes, sizeof sums);
  const uint8_t* x = emulated_tiles[kX].bytes;
  const auto weights = reinterpret_cast<const int8_t*>(emulated_tiles[kWeights].bytes);
  for (int row = 0; row < kMatrixRows; ++row) {
    for (int output = 0; output < 16; ++output) {
      for (int k = 0; k < 64; ++k) sums[row][output] += x[row * 64 + k] * weights[k / 4 * 64 + output * 4 + k % 4];
    }
  }
  std::memcpy(emulated_tiles[kSums].bytes, sums, sizeof sums);
}

}  // namespace
}  // namespace quantformer
