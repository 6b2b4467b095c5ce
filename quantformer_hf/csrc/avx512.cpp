// AVX-512 with VNNI: one vector holds the 16 outputs of a panel, one instruction adds four products of bytes to each.
#include "instruction_set.h"

#if defined(__x86_64__) && defined(__GNUC__)

#ifdef QUANTFORMER_EMULATE_AVX512
#include "emulated_avx512.h"  // tests/native: for machines without it
#else
#include <cpuid.h>
#include <immintrin.h>
#define MASKED_PARTS
// GCC 12 warns of its own header, which leaves a vector undefined where the mask keeps nothing of it (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#endif

#include <cstring>

#define AT_ONCE 16
#include "pointwise.h"

namespace quantformer {
namespace {

constexpr int kTileRows = 12;
static_assert(kTileRows <= kMostTileRows, "scratch memory has room for a tile");

TARGET inline __m512i broadcast(const void* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return _mm512_set1_epi32(value);
}

// Keeps the compiler from working on all rows side by side: it then copies each accumulator there and back.
TARGET inline void in_order([[maybe_unused]] __m512i& sum) {
#ifndef QUANTFORMER_EMULATE_AVX512
  asm volatile("" : "+v"(sum));
#endif
}

struct Bytes {
  using X = uint8_t;
  using W = int8_t;
  static constexpr int kTogether = 4;
  TARGET static __m512i step(__m512i sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); }
};

struct Words {
  using X = int16_t;
  using W = int16_t;
  static constexpr int kTogether = 2;
  TARGET static __m512i step(__m512i sum, __m512i x, __m512i w) { return _mm512_dpwssd_epi32(sum, w, x); }
};

// Integers and floating-point sums of 12 rows fit into the 32 registers; each loop over rows is unrolled, for an array
// that is indexed at run time lies in memory.
template <typename Kind, int R>
TARGET void multiply(const Tile& tile) {
  auto x = static_cast<const typename Kind::X*>(tile.x);
  auto panel = static_cast<const typename Kind::W*>(tile.panel);
  const int64_t stride = tile.x_stride;
  __m512 sums[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
  for (int64_t s = 0; s < tile.num_segments; ++s) {
    __m512i integers[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) integers[r] = _mm512_setzero_si512();
    const auto end = x + tile.segments[s].positions;
    for (; x != end; x += Kind::kTogether, panel += Kind::kTogether * kPanel) {
      const __m512i w = _mm512_loadu_si512(panel);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        integers[r] = Kind::step(integers[r], broadcast(x + r * stride), w);
        in_order(integers[r]);
      }
    }
    const __m512 scale = _mm512_set1_ps(tile.segments[s].scale);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      sums[r] = _mm512_add_ps(sums[r], _mm512_mul_ps(_mm512_cvtepi32_ps(integers[r]), scale));
    }
  }
  const __m512 scale = _mm512_loadu_ps(tile.scale), bias = _mm512_loadu_ps(tile.bias);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(tile.y + r * tile.y_stride, _mm512_add_ps(_mm512_mul_ps(sums[r], scale), bias));
  }
}

template <typename Kind>
constexpr TileFunction kTiles[kTileRows] = {
    multiply<Kind, 1>, multiply<Kind, 2>,  multiply<Kind, 3>,  multiply<Kind, 4>,
    multiply<Kind, 5>, multiply<Kind, 6>,  multiply<Kind, 7>,  multiply<Kind, 8>,
    multiply<Kind, 9>, multiply<Kind, 10>, multiply<Kind, 11>, multiply<Kind, 12>};

// Integers of 16, none above the highest level; what is below zero, or no number, is so as an integer.
template <bool kTwin>
TARGET inline __m512i positions16(__m512 x, __m512 offset, __m512 inverse, __m512 knee, __m512 top) {
  __m512 position = _mm512_mul_ps(_mm512_sub_ps(x, offset), inverse);
  // The order of operands leaves a NaN as it is.
  if constexpr (!kTwin) return _mm512_cvtps_epi32(_mm512_min_ps(top, position));
  // Here it makes zero of one, and integers below zero would leave their range.
  position = _mm512_max_ps(position, _mm512_setzero_ps());
  const __m512 beyond = _mm512_mul_ps(_mm512_sub_ps(position, knee), _mm512_set1_ps(kOneCoarse));
  position = _mm512_min_ps(_mm512_add_ps(beyond, knee), position);
  const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(top, position));
  const __m512i coarse = _mm512_max_epi32(_mm512_sub_epi32(code, _mm512_cvtps_epi32(knee)), _mm512_setzero_si512());
  return _mm512_add_epi32(code, _mm512_mullo_epi32(coarse, _mm512_set1_epi32(kCoarseStep - 1)));
}

// The first ones of 16, as `mask` has bits.
template <bool kTwin>
TARGET inline void quantize16(const float* x, const float* offset, const float* inverse, __m512 knee, __m512 top,
                              uint16_t mask, uint8_t* codes) {
  const __m512i q = positions16<kTwin>(_mm512_maskz_loadu_ps(mask, x), _mm512_maskz_loadu_ps(mask, offset),
                                       _mm512_maskz_loadu_ps(mask, inverse), knee, top);
  _mm_mask_storeu_epi8(codes, mask, _mm512_cvtepi32_epi8(_mm512_max_epi32(q, _mm512_setzero_si512())));
}

template <bool kTwin>
TARGET void quantize_row(const float* x, const float* offset, const float* inverse, Levels levels, int64_t n,
                         uint8_t* codes) {
  const __m512 knee = _mm512_set1_ps(levels.knee), top = _mm512_set1_ps(levels.last);
  const auto integers = [&](int64_t at) TARGET __attribute__((always_inline)) {
    return positions16<kTwin>(_mm512_loadu_ps(x + at), _mm512_loadu_ps(offset + at), _mm512_loadu_ps(inverse + at), knee,
                              top);
  };
  // Packing works on quarters, and leaves runs of four in this order.
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i words = _mm512_packs_epi32(integers(i), integers(i + 16));
    const __m512i more = _mm512_packs_epi32(integers(i + 32), integers(i + 48));
    _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(in_order, _mm512_packus_epi16(words, more)));
  }
  for (; i + 16 <= n; i += 16) quantize16<kTwin>(x + i, offset + i, inverse + i, knee, top, 0xffff, codes + i);
  const auto rest = static_cast<uint16_t>((1 << (n - i)) - 1);
  if (i < n) quantize16<kTwin>(x + i, offset + i, inverse + i, knee, top, rest, codes + i);
}

TARGET void quantize(const float* x, const float* offset, const float* inverse, Levels levels, int64_t n,
                     uint8_t* codes) {
  (levels.twin() ? quantize_row<true> : quantize_row<false>)(x, offset, inverse, levels, n, codes);
}

bool available() {
#ifdef QUANTFORMER_EMULATE_AVX512
  return true;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
}

// Whether 512 bits are worked on by halves, as Zen 4 does: products of two bits are then looked up faster than multiplied.
bool by_halves() {
#ifdef QUANTFORMER_EMULATE_AVX512
  return false;
#else
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ebx != signature_AMD_ebx) return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  return (eax >> 8 & 0xf) + (eax >> 20 & 0xff) == 0x19;
#endif
}

}  // namespace

const InstructionSet* avx512() {
  // Unpacking waits for memory more than for instructions: that of AVX2 serves.
  const InstructionSet* narrower = avx2();
  if (narrower == nullptr || !available()) return nullptr;
  static const InstructionSet set = {"avx512",
                                     kTileRows,
                                     false,
                                     255,
                                     kTiles<Bytes>,
                                     kTiles<Words>,
                                     narrower->unpack_bytes,
                                     narrower->unpack_words,
                                     narrower->unpack_ordered,
                                     quantize,
                                     gelu,
                                     softmax,
                                     layer_norm,
                                     add,
                                     sum,
                                     in_units_of_largest,
                                     narrower->reorder,
                                     by_halves() ? narrower->pairs : nullptr,
                                     nullptr};
  return &set;
}

}  // namespace quantformer

#else
namespace quantformer {
const InstructionSet* avx512() { return nullptr; }
}  // namespace quantformer
#endif
