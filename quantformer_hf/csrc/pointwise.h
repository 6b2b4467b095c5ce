// Softmax, GELU and LayerNorm, written once for all instruction sets in the vector extensions of GCC and Clang:
// TARGET, which the including file defines, says which instructions they become. One rounding an operation, in the order written
// here; `reference.py` does the same, so that all give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace quantformer {
namespace {

// Lanes of a sum: they say in which order numbers add up.
constexpr int64_t kLanes = 8;

// Numbers that are worked on together where each is by itself, a multiple of kLanes; the including file may say more.
#ifndef AT_ONCE
#define AT_ONCE kLanes
#endif
constexpr int64_t kAtOnce = AT_ONCE;

template <int64_t kCount>
struct Vector {
  typedef float Floats __attribute__((vector_size(kCount * sizeof(float))));
  typedef uint32_t Integers __attribute__((vector_size(kCount * sizeof(uint32_t))));
};
using Floats = Vector<kLanes>::Floats;

// Of what takes vectors: calls with them differ between instruction sets (hence the build's -Wno-psabi).
#define INLINE TARGET __attribute__((always_inline)) inline

template <int64_t kCount = kLanes>
INLINE typename Vector<kCount>::Floats load_floats(const float* p) {
  typename Vector<kCount>::Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
INLINE void store_floats(float* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Where they are equal or one is no number, b. In one instruction where the compiler would make two of the comparison.
template <typename V>
INLINE V greater_of(V a, V b) {
#ifdef MASKED_PARTS
#if AT_ONCE == 16
  if constexpr (sizeof(V) == sizeof(__m512)) return _mm512_max_ps(a, b);
#endif
  if constexpr (sizeof(V) == sizeof(__m256)) return _mm256_max_ps(a, b);
#endif
  return a > b ? a : b;
}

// Without the sign.
template <typename V>
INLINE V size_of(V x) {
  typename Vector<sizeof(V) / sizeof(float)>::Integers bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = bits & 0x7fffffff;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

#ifdef MASKED_PARTS  // by the including file: the processor reads and writes the first floats of a vector alone

INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// The last `count` floats of a row, less than kLanes, and `rest` in the lanes beyond.
INLINE Floats load_last(const float* p, int64_t count, float rest) {
  const __m256i mask = first_lanes(count);
  return _mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}

INLINE void store_last(float* p, Floats v, int64_t count) { _mm256_maskstore_ps(p, first_lanes(count), v); }

// With zeros in the lanes beyond the first `count`.
INLINE Floats first_of(Floats v, int64_t count) { return _mm256_and_ps(v, _mm256_castsi256_ps(first_lanes(count))); }

#else

// Less than kLanes floats. Sizes that the compiler knows take no call.
INLINE void copy_floats(const float* from, int64_t count, float* to) {
  static_assert(kLanes == 8, "counts up to 7");
  if (count & 4) std::memcpy(to, from, 4 * sizeof(float));
  const int64_t two = count & 4, one = count & 6;
  if (count & 2) std::memcpy(to + two, from + two, 2 * sizeof(float));
  if (count & 1) to[one] = from[one];
}

INLINE Floats load_last(const float* p, int64_t count, float rest) {
  float lanes[kLanes];
  store_floats(lanes, rest - Floats{});
  copy_floats(p, count, lanes);
  return load_floats(lanes);
}

INLINE void store_last(float* p, Floats v, int64_t count) {
  float lanes[kLanes];
  store_floats(lanes, v);
  copy_floats(lanes, count, p);
}

INLINE Floats first_of(Floats v, int64_t count) {
  for (int64_t lane = count; lane < kLanes; ++lane) v[lane] = 0;
  return v;
}

#endif

// e^x for x <= 0, and 2^-124 for all that is less than that: 2^n 2^f, f within half of zero, by the polynomial of degree 5
// with the least relative error there. To within 2e-7 where x is small, and the last digit of x elsewhere.
template <int64_t kCount = kLanes, typename V = typename Vector<kCount>::Floats>
INLINE V exponential(V x) {
  x = x * 1.44269504088896341f;
  x = greater_of(x, -124.0f - V{});
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  const float round = 12582912.0f;
  const V shifted = x + round;
  const V f = x - (shifted - round);
  V p = f * 1.3276471771e-3f + 9.6755413327e-3f;
  p = p * f + 5.5507132742e-2f;
  p = p * f + 2.4022119724e-1f;
  p = p * f + 6.9314696706e-1f;
  p = p * f + 1.0f;
  // Exact: the exponent alone changes.
  typename Vector<kCount>::Integers bits, power;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits = bits + (power << 23);
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// x Φ(x), the tail of Φ by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.28 (powers of √2 in the
// coefficients): to within 1e-6.
template <typename V>
INLINE V gelu_of(V x) {
  const V size = size_of(x);
  V p = size * 5.3829750000e-6f + 4.8890635643e-5f;
  p = p * size + 3.8003575000e-5f;
  p = p * size + 3.2776263241e-3f;
  p = p * size + 2.1141006150e-2f;
  p = p * size + 4.9867346967e-2f;
  p = p * size + 1.0f;
  for (int i = 0; i < 4; ++i) p = p * p;
  const V tail = 0.5f / p;
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

TARGET inline void gelu(const float* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) store_floats(y + i, gelu_of(load_floats<kAtOnce>(x + i)));
  for (; i + kLanes <= n; i += kLanes) store_floats(y + i, gelu_of(load_floats(x + i)));
  if (i < n) store_last(y + i, gelu_of(load_last(x + i, n - i, 0)), n - i);
}

// Part `part` of a vector, kLanes of it.
template <typename V>
INLINE Floats lanes_of(V v, int64_t part) {
  Floats lanes;
  std::memcpy(&lanes, reinterpret_cast<const char*>(&v) + part * sizeof lanes, sizeof lanes);
  return lanes;
}

constexpr float kLowest = -3.402823466e38f;

// The order does not matter. Two at a time, since each comparison waits for the one before.
INLINE float largest_of(const float* x, int64_t n) {
  typename Vector<kAtOnce>::Floats one = kLowest - typename Vector<kAtOnce>::Floats{}, other = one;
  int64_t i = 0;
  for (; i + 2 * kAtOnce <= n; i += 2 * kAtOnce) {
    const auto v = load_floats<kAtOnce>(x + i), w = load_floats<kAtOnce>(x + i + kAtOnce);
    one = greater_of(v, one);
    other = greater_of(w, other);
  }
  one = greater_of(one, other);
  Floats top = lanes_of(one, 0);
  for (int64_t part = 1; part < kAtOnce / kLanes; ++part) {
    top = greater_of(lanes_of(one, part), top);
  }
  for (; i < n; i += kLanes) {
    top = greater_of(i + kLanes <= n ? load_floats(x + i) : load_last(x + i, n - i, kLowest), top);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) top[lane] = top[lane + half] > top[lane] ? top[lane + half] : top[lane];
  }
  return top[0];
}

// How all sums of a row end: each lane has added up by itself, and the lanes then do by halves.
INLINE float sum_of_lanes(Floats sums) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] = sums[lane] + sums[lane + half];
  }
  return sums[0];
}

TARGET inline void add(const float* a, const float* b, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) store_floats(y + i, load_floats<kAtOnce>(a + i) + load_floats<kAtOnce>(b + i));
  for (; i + kLanes <= n; i += kLanes) store_floats(y + i, load_floats(a + i) + load_floats(b + i));
  if (i < n) store_last(y + i, load_last(a + i, n - i, 0) + load_last(b + i, n - i, 0), n - i);
}

INLINE void scale(const float* x, float factor, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) store_floats(y + i, load_floats<kAtOnce>(x + i) * factor);
  for (; i + kLanes <= n; i += kLanes) store_floats(y + i, load_floats(x + i) * factor);
  if (i < n) store_last(y + i, load_last(x + i, n - i, 0) * factor, n - i);
}

// y = x * (units / max x).
TARGET inline void in_units_of_largest(const float* x, int64_t n, float units, float* y) {
  scale(x, units / largest_of(x, n), n, y);
}

// Of kRows rows side by side: each sum of a row waits for the one before it.
template <int64_t kRows>
INLINE void softmax_rows(float* rows, int64_t n) {
  const int64_t whole = n / kLanes * kLanes, last = n - whole;
  Floats sums[kRows];
  float largest[kRows];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r) {
    largest[r] = largest_of(rows + r * n, n);
    sums[r] = Floats{};
  }
  int64_t done = 0;
  for (; done + kAtOnce <= n; done += kAtOnce) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      float* const at = rows + r * n + done;
      const auto e = exponential<kAtOnce>(load_floats<kAtOnce>(at) - largest[r]);
      store_floats(at, e);
      for (int64_t part = 0; part < kAtOnce / kLanes; ++part) sums[r] = sums[r] + lanes_of(e, part);
    }
  }
  for (; done < whole; done += kLanes) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      float* const at = rows + r * n + done;
      const Floats e = exponential(load_floats(at) - largest[r]);
      store_floats(at, e);
      sums[r] = sums[r] + e;
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r) {
    float* const at = rows + r * n + whole;
    if (last > 0) {
      const Floats e = exponential(load_last(at, last, 0) - largest[r]);
      store_last(at, e, last);
      sums[r] = sums[r] + first_of(e, last);
    }
    scale(rows + r * n, 1.0f / sum_of_lanes(sums[r]), n, rows + r * n);
  }
}

// Rows one after the other, each row = softmax(row + mask), in place; `masks` may be null, or lie `stride` apart.
TARGET inline void softmax(float* rows, int64_t count, const float* masks, int64_t stride, int64_t n) {
  constexpr int64_t kTogether = 4;
  for (int64_t r = 0; masks != nullptr && r < count; ++r) add(rows + r * n, masks + r * stride, n, rows + r * n);
  int64_t r = 0;
  for (; r + kTogether <= count; r += kTogether) softmax_rows<kTogether>(rows + r * n, n);
  for (; r < count; ++r) softmax_rows<1>(rows + r * n, n);
}

// Of kRows rows side by side: each sum of a row waits for the one before it.
template <int64_t kRows>
INLINE void layer_norm_rows(const float* x, const float* weight, const float* bias, float epsilon, int64_t n, float* y) {
  const int64_t whole = n / kLanes * kLanes, last = n - whole;
  const float share = static_cast<float>(1.0 / static_cast<double>(n));
  Floats sums[kRows], squares[kRows];
  float mean[kRows], factor[kRows];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r) sums[r] = squares[r] = Floats{};
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) sums[r] = sums[r] + load_floats(x + r * n + i);
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r) {
    if (last > 0) sums[r] = sums[r] + load_last(x + r * n + whole, last, 0);
    mean[r] = sum_of_lanes(sums[r]) * share;
  }
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      const Floats difference = load_floats(x + r * n + i) - mean[r];
      store_floats(y + r * n + i, difference);
      squares[r] = squares[r] + difference * difference;
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRows; ++r) {
    if (last > 0) {
      store_last(y + r * n + whole, load_last(x + r * n + whole, last, 0) - mean[r], last);
      const Floats difference = load_last(y + r * n + whole, last, 0);
      squares[r] = squares[r] + difference * difference;
    }
    factor[r] = 1.0f / std::sqrt(sum_of_lanes(squares[r]) * share + epsilon);
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      float made = y[r * n + i] * factor[r];
      if (weight != nullptr) made = made * weight[i];
      if (bias != nullptr) made = made + bias[i];
      y[r * n + i] = made;
    }
  }
}

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias, row by row; `weight` and `bias` may be null.
TARGET inline void layer_norm(const float* x, int64_t rows, const float* weight, const float* bias, float epsilon, int64_t n,
                              float* y) {
  constexpr int64_t kTogether = 4;
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) layer_norm_rows<kTogether>(x + r * n, weight, bias, epsilon, n, y + r * n);
  for (; r < rows; ++r) layer_norm_rows<1>(x + r * n, weight, bias, epsilon, n, y + r * n);
}

TARGET inline int32_t sum(const uint8_t* codes, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += codes[i];
  return total;
}

}  // namespace
}  // namespace quantformer
