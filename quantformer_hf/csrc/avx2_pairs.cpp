// `pairs.h` by AVX2's shuffle of bytes.
#include "pairs.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#define TARGET __attribute__((target("avx2")))
#define INLINE TARGET __attribute__((always_inline)) inline

namespace quantformer {
namespace {

TARGET inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TARGET inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// `visit` with 0 to N - 1 as constants. Loops would leave arrays of vectors in memory where the compiler unrolls them too late.
template <int... I, typename Visit>
INLINE void each(std::integer_sequence<int, I...>, const Visit& visit) {
  (visit(std::integral_constant<int, I>()), ...);
}
template <int N, typename Visit>
INLINE void each(const Visit& visit) {
  each(std::make_integer_sequence<int, N>(), visit);
}
#define LAMBDA __attribute__((target("avx2"), always_inline))

// By what a pair of activations is in a tile: the sums of products with each pair of weights.
struct Table {
  alignas(64) uint8_t sums[256];
  constexpr Table() : sums() {
    for (int i = 0; i < 256; ++i) sums[i] = static_cast<uint8_t>((i >> 4 & 3) * (i & 3) + (i >> 6) * (i >> 2 & 3));
  }
};
constexpr Table kTable;

// In memory, wherever it lies.
struct __attribute__((packed, may_alias)) Vector {
  __m256i value;
};

// In place, and in the order written, as in avx2.cpp.
INLINE void add_bytes(__m256i& sum, __m256i x) { asm volatile("vpaddb %1, %0, %0" : "+x"(sum) : "x"(x)); }

// A look-up by weights in memory, where they are to stay: the compiler would take a register for them, which there is not.
INLINE __m256i shuffled(__m256i table, const uint8_t* weights) {
  __m256i found;
  asm("vpshufb %1, %2, %0" : "=x"(found) : "m"(*reinterpret_cast<const Vector*>(weights)), "x"(table));
  return found;
}

// The sums of `count` pairs, at most kPairsInByte. `x` and `panel` move on.
template <int R, int B>
INLINE void add_pairs(const uint8_t*& x, int64_t stride, const uint8_t*& panel, int64_t count, __m256i (&sums)[R * B]) {
  // Of 16 registers two are for a table and what is found in it.
  constexpr int kHeld = R * B + B + 2 > 16 ? B - 1 : B;
  each<R * B>([&](auto i) LAMBDA { sums[i] = _mm256_setzero_si256(); });
  for (const uint8_t* end = x + count; x != end; ++x, panel += B * kPairBlock) {
    __m256i weights[B];
    each<kHeld>([&](auto b) LAMBDA { weights[b] = load(panel + b * kPairBlock); });
    each<R>([&](auto r) LAMBDA {
      const auto table = reinterpret_cast<const __m128i*>(kTable.sums + x[r * stride]);
      const __m256i products = _mm256_broadcastsi128_si256(_mm_load_si128(table));
      each<kHeld>([&](auto b) LAMBDA { add_bytes(sums[r * B + b], _mm256_shuffle_epi8(products, weights[b])); });
      if constexpr (kHeld < B) add_bytes(sums[r * B + kHeld], shuffled(products, panel + kHeld * kPairBlock));
    });
  }
  // What is needed after the loop is to be fetched then, and not to wait in registers.
  asm volatile("" ::: "memory");
}

// Bytes of one run of pairs, and of another one where there is one, as words times the weights' multiplier: of a block the
// first 4 of every 8 outputs, and the last.
struct Words {
  __m256i low, high;
};
INLINE Words words_of(__m256i bytes, __m256i others, __m256i multiplier) {
  return {_mm256_maddubs_epi16(_mm256_unpacklo_epi8(bytes, others), multiplier),
          _mm256_maddubs_epi16(_mm256_unpackhi_epi8(bytes, others), multiplier)};
}

// A word below the bits of 2^23 in floating point is that many more than 2^23.
constexpr float kTwo23 = 8388608.0f;
constexpr int16_t kTwo23Bits = 0x4b00;

// Those words of a group become floating point, and are added to the groups before, of which the first one has none. What is to
// be taken off them is `less`, kTwo23 less their row's sum.
template <bool kFirst>
INLINE void flush(Words words, __m256 less, __m256 scale, float* sums) {
  const __m256i above = _mm256_set1_epi16(kTwo23Bits);
  const auto add = [&](__m256i number, int at) LAMBDA {
    const __m256 before = kFirst ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + at);
    const __m256 sum = _mm256_mul_ps(_mm256_sub_ps(_mm256_castsi256_ps(number), less), scale);
    _mm256_storeu_ps(sums + at, _mm256_add_ps(before, sum));
  };
  add(_mm256_unpacklo_epi16(words.low, above), 0);
  add(_mm256_unpackhi_epi16(words.low, above), 8);
  add(_mm256_unpacklo_epi16(words.high, above), 16);
  add(_mm256_unpackhi_epi16(words.high, above), 24);
}

// Words of all rows and blocks, which `words_at` makes: added to those that wait, but for the first ones, and made floating
// point, if they are the last ones, or left to wait.
template <int R, int B, bool kFirst, typename WordsAt>
INLINE void put(const PairTile& tile, int64_t g, bool first, bool last, const WordsAt& words_at) {
  uint16_t* const carry = tile.carry;
  const auto more_at = [&](auto i) LAMBDA {
    const Words words = words_at(i);
    const uint16_t* const from = carry + i * kPairBlock;
    return Words{_mm256_add_epi16(words.low, load(from)), _mm256_add_epi16(words.high, load(from + kPairBlock / 2))};
  };
  if (last) {
    const auto flush_it = [&](auto i, Words words) LAMBDA {
      const float less = kTwo23 - static_cast<float>(tile.row_sums[i / B * tile.num_groups + g]);
      flush<kFirst>(words, _mm256_set1_ps(less), _mm256_set1_ps(tile.groups[g].scale), tile.sums + i * kPairBlock);
    };
    if (first) {
      each<R * B>([&](auto i) LAMBDA { flush_it(i, words_at(i)); });
    } else {
      each<R * B>([&](auto i) LAMBDA { flush_it(i, more_at(i)); });
    }
    return;
  }
  const auto keep = [&](auto i, Words words) LAMBDA {
    store(carry + i * kPairBlock, words.low);
    store(carry + i * kPairBlock + kPairBlock / 2, words.high);
  };
  if (first) {
    each<R * B>([&](auto i) LAMBDA { keep(i, words_at(i)); });
  } else {
    each<R * B>([&](auto i) LAMBDA { keep(i, more_at(i)); });
  }
}

// All pairs of group g. `x` and `panel` move on.
template <int R, int B, bool kFirst>
INLINE void add_group(const PairTile& tile, int64_t g, const uint8_t*& x, const uint8_t*& panel) {
  uint8_t* const bytes = tile.bytes;
  const PairGroup& group = tile.groups[g];
  const int64_t pairs = group.pairs;
  // To be called where it is needed: until then its register is.
  const auto multiplier = [&]() LAMBDA { return _mm256_set1_epi8(static_cast<char>(tile.multiplier * group.multiple)); };
  __m256i sums[R * B];
  // The usual case by itself: groups of few pairs.
  if (pairs <= kPairsInByte) {
    add_pairs<R, B>(x, tile.x_stride, panel, pairs, sums);
    put<R, B, kFirst>(tile, g, group.first, group.last,
                      [&](auto i) LAMBDA { return words_of(sums[i], _mm256_setzero_si256(), multiplier()); });
    return;
  }
  for (int64_t done = 0; done < pairs;) {
    // Two runs become words together: of the first one the sums wait in memory.
    const int64_t both = std::min(pairs - done, 2 * kPairsInByte), run = (both + 1) / 2;
    add_pairs<R, B>(x, tile.x_stride, panel, run, sums);
    each<R * B>([&](auto i) LAMBDA { store(bytes + i * kPairBlock, sums[i]); });
    add_pairs<R, B>(x, tile.x_stride, panel, both - run, sums);
    const bool first = group.first && done == 0, last = group.last && done + both == pairs;
    done += both;
    put<R, B, kFirst>(tile, g, first, last,
                      [&](auto i) LAMBDA { return words_of(load(bytes + i * kPairBlock), sums[i], multiplier()); });
  }
}

template <int R, int B>
TARGET void look_up_tile(const PairTile& tile) {
  const uint8_t *x = tile.x, *panel = tile.panel;
  const int64_t num_groups = tile.num_groups, stride = tile.y_stride;
  const float *scales = tile.scale, *biases = tile.bias, *sums = tile.sums;
  float* const y = tile.y;
  int64_t g = 0;
  // Up to the first ones that become floating point.
  for (bool last = false; g < num_groups && !last; ++g) {
    add_group<R, B, true>(tile, g, x, panel);
    last = tile.groups[g].last;
  }
  if (g == 0) std::memset(tile.sums, 0, R * B * kPairBlock * sizeof(float));
  for (; g < num_groups; ++g) add_group<R, B, false>(tile, g, x, panel);
  for (int at = 0; at < B * kPairBlock; at += 8) {
    const __m256 scale = _mm256_loadu_ps(scales + at), bias = _mm256_loadu_ps(biases + at);
    each<R>([&](auto r) LAMBDA {
      const __m256 sum = _mm256_loadu_ps(sums + r * B * kPairBlock + at);
      _mm256_storeu_ps(y + r * stride + at, _mm256_add_ps(_mm256_mul_ps(sum, scale), bias));
    });
  }
}

TARGET void prepare(const uint8_t* codes, const PairGroup* groups, int64_t num_groups, int addend, uint8_t* x,
                    int32_t* row_sums) {
  const uint8_t* from = codes;
  const __m128i zero = _mm_setzero_si128();
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint8_t* const end = from + 2 * groups[g].pairs;
    __m128i sum = zero;
    for (; end - from >= 16; from += 16) {
      sum = _mm_add_epi64(sum, _mm_sad_epu8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), zero));
    }
    for (; from != end; from += 4) {
      int32_t four;
      std::memcpy(&four, from, sizeof four);
      sum = _mm_add_epi64(sum, _mm_sad_epu8(_mm_cvtsi32_si128(four), zero));
    }
    const int32_t before = groups[g].first ? 0 : row_sums[g - 1];
    row_sums[g] = before + (_mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 2)) * addend * groups[g].multiple;
  }
  const int64_t pairs = (from - codes) / 2;
  const __m256i places = _mm256_set1_epi16(16 | 64 << 8);
  // Codes that are too large, which nobody makes, must not lead out of the table.
  constexpr uint8_t kTables = 0xf0;
  const __m256i tables = _mm256_set1_epi8(static_cast<char>(kTables));
  int64_t k = 0;
  for (; k + 32 <= pairs; k += 32) {
    const __m256i low = _mm256_maddubs_epi16(load(codes + 2 * k), places);
    const __m256i high = _mm256_maddubs_epi16(load(codes + 2 * k + 32), places);
    store(x + k, _mm256_and_si256(_mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8), tables));
  }
  for (; k < pairs; ++k) x[k] = static_cast<uint8_t>(16 * codes[2 * k] + 64 * codes[2 * k + 1]) & kTables;
}

TARGET void unpack(const uint8_t* ordered, int64_t pairs, int64_t blocks, uint8_t* panel) {
  const __m128i mask = _mm_set1_epi8(15);
  for (int64_t i = 0; i < pairs * blocks; ++i, ordered += kPairBlock / 2, panel += kPairBlock) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ordered));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
    store(panel, _mm256_set_m128i(high, _mm_and_si128(both, mask)));
  }
}

constexpr void (*kTiles[][kPairBlocks])(const PairTile&) = {
    {look_up_tile<1, 1>, look_up_tile<1, 2>, look_up_tile<1, 3>},
    {look_up_tile<2, 1>, look_up_tile<2, 2>, look_up_tile<2, 3>},
    {look_up_tile<3, 1>, look_up_tile<3, 2>, look_up_tile<3, 3>},
    {look_up_tile<4, 1>, look_up_tile<4, 2>, look_up_tile<4, 3>},
};

}  // namespace

const Pairs* avx2_pairs() {
  static const Pairs pairs = {4, prepare, unpack, kTiles};
  return &pairs;
}

}  // namespace quantformer
#endif
