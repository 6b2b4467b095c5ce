// NEON, of every 64-bit Arm: products of words, the work on codes, and, where the processor has them, dot products of
// four signed bytes.
#include "instruction_set.h"

#if defined(__AARCH64EL__) && defined(__GNUC__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstring>

#define TARGET
#include "columns.h"
#include "pointwise.h"

// Not for compilers that are told of a processor which has them: `arch` would take the rest of it away.
#if defined(__ARM_FEATURE_DOTPROD)
#define TARGET_DOTPROD
#else
#define TARGET_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

namespace quantformer {
namespace {

// 4 vectors of sums a row: 6 rows take 24 of the 32 registers. Each loop over rows is unrolled, for an array that is
// indexed at run time lies in memory.
constexpr int kTileRows = 6;

// Keeps the compiler from interleaving the rows of a tile: it would need more registers than there are.
inline void in_order(int32x4_t* sums) { asm volatile("" : "+w"(sums[0]), "+w"(sums[1]), "+w"(sums[2]), "+w"(sums[3])); }

// The integers of a segment, which is a whole group, into the floating-point sums.
inline void flush(const int32x4_t* integers, float scale, float* sums) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const float32x4_t part = vmulq_n_f32(vcvtq_f32_s32(integers[q]), scale);
    vst1q_f32(sums + 4 * q, vaddq_f32(vld1q_f32(sums + 4 * q), part));
  }
}

inline void finish(const Tile& tile, int rows) {
  for (int q = 0; q < kPanel; q += 4) {
    const float32x4_t scale = vld1q_f32(tile.scale + q), bias = vld1q_f32(tile.bias + q);
    for (int r = 0; r < rows; ++r) {
      const float32x4_t sum = vld1q_f32(tile.sums + r * kPanel + q);
      vst1q_f32(tile.y + r * tile.y_stride + q, vaddq_f32(vmulq_f32(sum, scale), bias));
    }
  }
}

// Four bytes in the low lane: one load, without the copy into the other lanes that an intrinsic would ask for.
inline uint64_t load4(const void* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

template <int R>
TARGET_DOTPROD void multiply_bytes(const Tile& tile) {
  auto x = static_cast<const uint8_t*>(tile.x);
  auto panel = static_cast<const int8_t*>(tile.panel);
  std::memset(tile.sums, 0, R * kPanel * sizeof(float));
  for (int64_t s = 0; s < tile.num_segments; ++s) {
    int32x4_t integers[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) integers[r][0] = integers[r][1] = integers[r][2] = integers[r][3] = vdupq_n_s32(0);
    for (auto end = x + tile.segments[s].positions; x != end; x += 4, panel += 4 * kPanel) {
      const int8x16_t w[4] = {vld1q_s8(panel), vld1q_s8(panel + 16), vld1q_s8(panel + 32), vld1q_s8(panel + 48)};
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const int8x8_t a = vcreate_s8(load4(x + r * tile.x_stride));
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) integers[r][q] = vdotq_lane_s32(integers[r][q], w[q], a, 0);
        in_order(integers[r]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) flush(integers[r], tile.segments[s].scale, tile.sums + r * kPanel);
  }
  finish(tile, R);
}

template <int R>
void multiply_words(const Tile& tile) {
  auto x = static_cast<const int16_t*>(tile.x);
  auto panel = static_cast<const int16_t*>(tile.panel);
  std::memset(tile.sums, 0, R * kPanel * sizeof(float));
  for (int64_t s = 0; s < tile.num_segments; ++s) {
    int32x4_t integers[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) integers[r][0] = integers[r][1] = integers[r][2] = integers[r][3] = vdupq_n_s32(0);
    for (auto end = x + tile.segments[s].positions; x != end; x += 2, panel += 2 * kPanel) {
      // Takes the two positions apart: 8 outputs at `.val[0]`, and the same at the next position.
      const int16x8x2_t w[2] = {vld2q_s16(panel), vld2q_s16(panel + kPanel)};
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const int16x4_t a = vcreate_s16(load4(x + r * tile.x_stride));
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          int32x4_t& low = integers[r][2 * half];
          int32x4_t& high = integers[r][2 * half + 1];
          low = vmlal_lane_s16(low, vget_low_s16(w[half].val[0]), a, 0);
          high = vmlal_high_lane_s16(high, w[half].val[0], a, 0);
          low = vmlal_lane_s16(low, vget_low_s16(w[half].val[1]), a, 1);
          high = vmlal_high_lane_s16(high, w[half].val[1], a, 1);
        }
        in_order(integers[r]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) flush(integers[r], tile.segments[s].scale, tile.sums + r * kPanel);
  }
  finish(tile, R);
}

constexpr TileFunction kBytes[kTileRows] = {multiply_bytes<1>, multiply_bytes<2>, multiply_bytes<3>,
                                            multiply_bytes<4>, multiply_bytes<5>, multiply_bytes<6>};
constexpr TileFunction kWords[kTileRows] = {multiply_words<1>, multiply_words<2>, multiply_words<3>,
                                            multiply_words<4>, multiply_words<5>, multiply_words<6>};

struct Vectors {
  using Block = uint8x16_t;
  static Block load(const uint8_t* p) { return vld1q_u8(p); }
  static void store(void* p, Block v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
  static Block low_bytes(Block a, Block b) { return vzip1q_u8(a, b); }
  static Block high_bytes(Block a, Block b) { return vzip2q_u8(a, b); }
  static Block low_words(Block a, Block b) {
    return vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
  }
  static Block high_words(Block a, Block b) {
    return vreinterpretq_u8_u16(vzip2q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
  }
  static Block repeat_byte(int value) { return vdupq_n_u8(static_cast<uint8_t>(value)); }
  static Block add_bytes(Block a, Block b) { return vaddq_u8(a, b); }
  static Block both(Block a, Block b) { return vandq_u8(a, b); }
  static Block look_up(Block table, Block b) { return vqtbl1q_u8(table, b); }
  static Block shift_right(Block a, int bits) { return vshlq_u8(a, vdupq_n_s8(static_cast<int8_t>(-bits))); }
  static void decode_row(const uint8_t* packed, int bits, int64_t columns, uint8_t* codes);
};

// 16 codes at a time. `packed` is read up to 32 bytes beyond its end, and `codes` written up to a multiple of 16.
void Vectors::decode_row(const uint8_t* packed, int bits, int64_t columns, uint8_t* codes) {
  const Window window(bits);
  const uint8x16_t places = vld1q_u8(window.places);
  const int16x8_t shift = vnegq_s16(vreinterpretq_s16_u16(vld1q_u16(window.starts)));
  const uint8x16_t mask = repeat_byte((1 << bits) - 1);
  const auto decode8 = [&](const uint8_t* p) {
    return vmovn_u16(vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(p), places)), shift));
  };
  for (int64_t i = 0; i < columns; i += 16, packed += 2 * bits) {
    store(codes + i, vandq_u8(vcombine_u8(decode8(packed), decode8(packed + bits)), mask));
  }
}

void unpack_words(const Panel& p, int16_t* panel) {
  const uint8_t* columns = codes_by_column<Vectors>(p);
  const int16x8_t addend = vdupq_n_s16(static_cast<int16_t>(p.addend));
  const auto weights = [&](uint8x8_t codes) {
    const int16x8_t u = vreinterpretq_s16_u16(vmovl_u8(codes));
    return vmlaq_n_s16(addend, u, static_cast<int16_t>(p.multiplier));
  };
  for (int64_t k = 0; k < p.positions; k += 2, panel += 2 * kPanel) {
    const uint8x16_t u = Vectors::load(columns + int64_t{p.source[k]} * kPanel);
    const uint8x16_t v = Vectors::load(columns + int64_t{p.source[k + 1]} * kPanel);
    // Stores each output's two positions side by side.
    vst2q_s16(panel, {{weights(vget_low_u8(u)), weights(vget_low_u8(v))}});
    vst2q_s16(panel + kPanel, {{weights(vget_high_u8(u)), weights(vget_high_u8(v))}});
  }
}

template <bool kTwin>
void quantize_row(const float* x, const float* offset, const float* inverse, Levels levels, int64_t n, uint8_t* codes) {
  const float32x4_t knee = vdupq_n_f32(levels.knee), top = vdupq_n_f32(levels.last), zero = vdupq_n_f32(0);
  const auto quantize4 = [&](int64_t i) {
    float32x4_t position = vmulq_f32(vsubq_f32(vld1q_f32(x + i), vld1q_f32(offset + i)), vld1q_f32(inverse + i));
    // This maximum makes zero of a NaN; the conversion rounds halves to even.
    position = vmaxnmq_f32(position, zero);
    if constexpr (kTwin) {
      position = vminq_f32(position, vaddq_f32(vmulq_n_f32(vsubq_f32(position, knee), kOneCoarse), knee));
    }
    uint32x4_t code = vcvtnq_u32_f32(vminq_f32(position, top));
    if constexpr (kTwin) code = vmlaq_n_u32(code, vqsubq_u32(code, vdupq_n_u32(levels.knee)), kCoarseStep - 1);
    return vmovn_u32(code);
  };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) vst1_u8(codes + i, vmovn_u16(vcombine_u16(quantize4(i), quantize4(i + 4))));
  if (i < n) plain()->quantize(x + i, offset + i, inverse + i, levels, n - i, codes + i);
}

void quantize(const float* x, const float* offset, const float* inverse, Levels levels, int64_t n, uint8_t* codes) {
  (levels.twin() ? quantize_row<true> : quantize_row<false>)(x, offset, inverse, levels, n, codes);
}

bool has_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD)
  return true;
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}

}  // namespace

const InstructionSet* neon() {
  // Without dot products, words are as fast as bytes: no code of activations is small enough for bytes.
  static const InstructionSet set = {
      "neon", kTileRows, false, -1, nullptr, kWords, nullptr, unpack_words, nullptr, quantize, gelu, softmax,
      layer_norm, add, sum, in_units_of_largest, reorder<Vectors>, nullptr, nullptr};
  return &set;
}

const InstructionSet* neon_dotprod() {
  static const InstructionSet set = {
      "neon_dotprod", kTileRows, false, 127, kBytes, kWords, unpack_bytes<Vectors>, unpack_words,
      unpack_ordered<Vectors>, quantize, gelu, softmax, layer_norm, add, sum, in_units_of_largest, reorder<Vectors>, nullptr, nullptr};
  return has_dotprod() ? &set : nullptr;
}

}  // namespace quantformer

#else
namespace quantformer {
const InstructionSet* neon() { return nullptr; }
const InstructionSet* neon_dotprod() { return nullptr; }
}  // namespace quantformer
#endif
