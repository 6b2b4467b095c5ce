// AVX2: `vpmaddubsw` multiplies bytes and adds pairs in 16 bits, which codes of few bits do not overflow for long.
#include "instruction_set.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>

#define TARGET __attribute__((target("avx2")))
#include "columns.h"
#include "pairs.h"
#define MASKED_PARTS
#include "pointwise.h"

namespace quantformer {
namespace {

TARGET inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TARGET inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

TARGET inline __m256i broadcast(const void* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return _mm256_set1_epi32(value);
}

// Additions in place, and in the order written. The compiler would interleave the rows of a tile, for which there are not
// registers enough, and give each sum another register at each step, at the cost of a move. For the same reason loops over
// rows are unrolled: an array that is indexed at run time lies in memory.
TARGET inline void add_words(__m256i& sum, __m256i x) { asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }
TARGET inline void add_longs(__m256i& sum, __m256i x) { asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }

// The integers of a segment, 8 outputs, into the floating-point sums, or into the carry while their group goes on.
TARGET inline void flush(__m256i integers, bool first, bool last, bool fresh, __m256 scale, float* sums,
                         int32_t* carry) {
  if (!first) integers = _mm256_add_epi32(integers, load(carry));
  if (last) {
    const __m256 sum = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(sums);
    _mm256_storeu_ps(sums, _mm256_add_ps(sum, _mm256_mul_ps(_mm256_cvtepi32_ps(integers), scale)));
  } else {
    store(carry, integers);
  }
}

TARGET inline void finish(const Tile& tile, int rows) {
  for (int half = 0; half < kPanel; half += 8) {
    const __m256 scale = _mm256_loadu_ps(tile.scale + half), bias = _mm256_loadu_ps(tile.bias + half);
    for (int r = 0; r < rows; ++r) {
      const __m256 sum = _mm256_loadu_ps(tile.sums + r * kPanel + half);
      _mm256_storeu_ps(tile.y + r * tile.y_stride + half, _mm256_add_ps(_mm256_mul_ps(sum, scale), bias));
    }
  }
}

struct Bytes {
  using X = uint8_t;
  using W = int8_t;
  static constexpr int kTogether = 4;
  TARGET static void step(__m256i& sum, __m256i x, __m256i w) { add_words(sum, _mm256_maddubs_epi16(x, w)); }
  TARGET static __m256i widen(__m256i sum, __m256i multiple) { return _mm256_madd_epi16(sum, multiple); }
};

struct Words {
  using X = int16_t;
  using W = int16_t;
  static constexpr int kTogether = 2;
  TARGET static void step(__m256i& sum, __m256i x, __m256i w) { add_longs(sum, _mm256_madd_epi16(x, w)); }
  TARGET static __m256i widen(__m256i sum, __m256i) { return sum; }
};

template <typename Kind, int R>
TARGET void multiply(const Tile& tile) {
  auto x = static_cast<const typename Kind::X*>(tile.x);
  auto panel = static_cast<const typename Kind::W*>(tile.panel);
  const int64_t stride = tile.x_stride;
  float* const sums = tile.sums;
  int32_t* const carry = tile.carry;
  bool fresh = true;
  for (int64_t s = 0; s < tile.num_segments; ++s) {
    const Segment segment = tile.segments[s];
    __m256i low[R], high[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) low[r] = high[r] = _mm256_setzero_si256();
    for (auto end = x + segment.positions; x != end; x += Kind::kTogether, panel += Kind::kTogether * kPanel) {
      const __m256i w0 = load(panel), w1 = load(panel + Kind::kTogether * kPanel / 2);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i a = broadcast(x + r * stride);
        Kind::step(low[r], a, w0);
        Kind::step(high[r], a, w1);
      }
    }
    const __m256i multiple = _mm256_set1_epi16(static_cast<int16_t>(segment.multiple));
    if (!segment.last) {
      const __m256i kept = _mm256_set1_epi32(segment.first ? 0 : -1);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t* const to = carry + r * kPanel;
        store(to, _mm256_add_epi32(Kind::widen(low[r], multiple), _mm256_and_si256(kept, load(to))));
        store(to + 8, _mm256_add_epi32(Kind::widen(high[r], multiple), _mm256_and_si256(kept, load(to + 8))));
      }
      continue;
    }
    const __m256 scale = _mm256_set1_ps(segment.scale);
    // The usual case by itself: a branch an output would cost a tenth of the speed.
    if (segment.first && segment.last && !fresh) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        flush(Kind::widen(low[r], multiple), true, true, false, scale, sums + r * kPanel, carry);
        flush(Kind::widen(high[r], multiple), true, true, false, scale, sums + r * kPanel + 8, carry);
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int at = r * kPanel;
        flush(Kind::widen(low[r], multiple), segment.first, segment.last, fresh, scale, sums + at, carry + at);
        flush(Kind::widen(high[r], multiple), segment.first, segment.last, fresh, scale, sums + at + 8, carry + at + 8);
      }
      fresh = fresh && !segment.last;
    }
  }
  // Where every group is empty.
  if (fresh) std::memset(sums, 0, R * kPanel * sizeof(float));
  finish(tile, R);
}

template <typename Kind>
constexpr TileFunction kTiles[] = {multiply<Kind, 1>, multiply<Kind, 2>, multiply<Kind, 3>,
                                   multiply<Kind, 4>, multiply<Kind, 5>, multiply<Kind, 6>};

struct Vectors {
  using Block = __m128i;
  TARGET static Block load(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  TARGET static void store(void* p, Block v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
  TARGET static Block low_bytes(Block a, Block b) { return _mm_unpacklo_epi8(a, b); }
  TARGET static Block high_bytes(Block a, Block b) { return _mm_unpackhi_epi8(a, b); }
  TARGET static Block low_words(Block a, Block b) { return _mm_unpacklo_epi16(a, b); }
  TARGET static Block high_words(Block a, Block b) { return _mm_unpackhi_epi16(a, b); }
  TARGET static Block repeat_byte(int value) { return _mm_set1_epi8(static_cast<char>(value)); }
  TARGET static Block add_bytes(Block a, Block b) { return _mm_add_epi8(a, b); }
  TARGET static Block both(Block a, Block b) { return _mm_and_si128(a, b); }
  // Byte i of the table at b[i], of 0 to 15.
  TARGET static Block look_up(Block table, Block b) { return _mm_shuffle_epi8(table, b); }
  // Of each two bytes together: what comes over from the other one has to be masked.
  TARGET static Block shift_right(Block a, int bits) { return _mm_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
  TARGET static void decode_row(const uint8_t* packed, int bits, int64_t columns, uint8_t* codes);
};

// 16 codes at a time. A multiplication shifts each by its own number of bits. `packed` is read up to 32 bytes beyond
// its end, and `codes` written up to a multiple of 16.
TARGET void Vectors::decode_row(const uint8_t* packed, int bits, int64_t columns, uint8_t* codes) {
  const Window window(bits);
  alignas(16) uint16_t factors[8];
  for (int i = 0; i < 8; ++i) factors[i] = static_cast<uint16_t>(1 << (8 - window.starts[i]));
  const __m256i places = _mm256_broadcastsi128_si256(load(window.places));
  const __m256i shift = _mm256_broadcastsi128_si256(load(factors));
  const __m256i mask = _mm256_set1_epi16(static_cast<int16_t>((1 << bits) - 1));
  for (int64_t i = 0; i < columns; i += 16, packed += 2 * bits) {
    __m256i pairs = _mm256_shuffle_epi8(_mm256_set_m128i(load(packed + bits), load(packed)), places);
    pairs = _mm256_and_si256(_mm256_srli_epi16(_mm256_mullo_epi16(pairs, shift), 8), mask);
    store(codes + i, _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
  }
}

TARGET void unpack_words(const Panel& p, int16_t* panel) {
  const uint8_t* columns = codes_by_column<Vectors>(p);
  const __m256i addend = _mm256_set1_epi16(p.addend), multiplier = _mm256_set1_epi16(p.multiplier);
  for (int64_t k = 0; k < p.positions; k += 2, panel += 2 * kPanel) {
    __m256i w[2];
    for (int i = 0; i < 2; ++i) {
      const __m256i u = _mm256_cvtepu8_epi16(Vectors::load(columns + int64_t{p.source[k + i]} * kPanel));
      w[i] = _mm256_add_epi16(_mm256_mullo_epi16(u, multiplier), addend);
    }
    // Each half interleaves four outputs of its own eight: swapped into order.
    const __m256i low = _mm256_unpacklo_epi16(w[0], w[1]), high = _mm256_unpackhi_epi16(w[0], w[1]);
    store(panel, _mm256_permute2x128_si256(low, high, 0x20));
    store(panel + kPanel, _mm256_permute2x128_si256(low, high, 0x31));
  }
}

template <bool kTwin>
TARGET inline __m256i quantize8(__m256 x, __m256 offset, __m256 inverse, __m256 knee, __m256 top) {
  __m256 position = _mm256_mul_ps(_mm256_sub_ps(x, offset), inverse);
  if constexpr (kTwin) {
    const __m256 beyond = _mm256_mul_ps(_mm256_sub_ps(position, knee), _mm256_set1_ps(kOneCoarse));
    position = _mm256_min_ps(position, _mm256_add_ps(beyond, knee));
  }
  // The order of operands makes zero of a NaN.
  const __m256 clipped = _mm256_min_ps(_mm256_max_ps(position, _mm256_setzero_ps()), top);
  const __m256i code = _mm256_cvtps_epi32(clipped);
  if constexpr (!kTwin) return code;
  const __m256i coarse = _mm256_max_epi32(_mm256_sub_epi32(code, _mm256_cvtps_epi32(knee)), _mm256_setzero_si256());
  return _mm256_add_epi32(code, _mm256_mullo_epi32(coarse, _mm256_set1_epi32(kCoarseStep - 1)));
}

template <bool kTwin>
TARGET void quantize_row(const float* x, const float* offset, const float* inverse, Levels levels, int64_t n,
                         uint8_t* codes) {
  const __m256 knee = _mm256_set1_ps(levels.knee), top = _mm256_set1_ps(levels.last);
  const auto quantized = [&](int64_t at) TARGET {
    return quantize8<kTwin>(_mm256_loadu_ps(x + at), _mm256_loadu_ps(offset + at), _mm256_loadu_ps(inverse + at), knee,
                            top);
  };
  const auto to_bytes = [](__m256i q) TARGET {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    return _mm_packus_epi16(words, words);
  };
  // Packing works on halves, and leaves runs of four in this order.
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i words = _mm256_packs_epi32(quantized(i), quantized(i + 8));
    const __m256i more = _mm256_packs_epi32(quantized(i + 16), quantized(i + 24));
    store(codes + i, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, more), in_order));
  }
  for (; i + 8 <= n; i += 8) _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), to_bytes(quantized(i)));
  if (i == n) return;
  const auto last = [&](const float* p) TARGET { return load_last(p + i, n - i, 0); };
  uint8_t bytes[8];
  _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), to_bytes(quantize8<kTwin>(last(x), last(offset), last(inverse), knee, top)));
  for (int64_t at = 0; at < n - i; ++at) codes[i + at] = bytes[at];
}

TARGET void quantize(const float* x, const float* offset, const float* inverse, Levels levels, int64_t n,
                     uint8_t* codes) {
  (levels.twin() ? quantize_row<true> : quantize_row<false>)(x, offset, inverse, levels, n, codes);
}

}  // namespace

const InstructionSet* avx2() {
  static const InstructionSet set = {
      "avx2", 6, true, 255, kTiles<Bytes>, kTiles<Words>, unpack_bytes<Vectors>, unpack_words,
      unpack_ordered<Vectors>, quantize, gelu, softmax, layer_norm, add, sum, in_units_of_largest, reorder<Vectors>,
      avx2_pairs(), nullptr};
  return __builtin_cpu_supports("avx2") ? &set : nullptr;
}

}  // namespace quantformer

#else
namespace quantformer {
const InstructionSet* avx2() { return nullptr; }
}  // namespace quantformer
#endif
