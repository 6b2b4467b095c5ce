// Softmax, GELU and LayerNorm, written once for all instruction sets in the vector extensions of GCC and Clang:
// TARGET, which the including file defines, says which instructions they become. One rounding an operation, in the order written here;
// `reference.py` does the same, so that all give the same bits.
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

// The last `count` floats of a row, less than kLanes, and `rest` in the lanes beyond.
INLINE Floats load_last(const float* p, int64_t count, float rest) {
  Floats v = rest - Floats{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

INLINE void store_last(float* p, Floats v, int64_t count) { std::memcpy(p, &v, count * sizeof(float)); }

// e^x for x <= 0, and 2^-124 for all that is less than that: 2^n 2^f, f within half of zero, by the polynomial of degree 5
// with the least relative error there. To within 2e-7 where x is small, and the last digit of x elsewhere.
template <int64_t kCount = kLanes, typename V = typename Vector<kCount>::Floats>
INLINE V exponential(V x) {
  x = x * 1.44269504088896341f;
  x = x > -124.0f ? x : -124.0f - V{};
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
  const V size = x < 0.0f ? -x : x;
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

INLINE float largest_lane(Floats v) {
  float largest = v[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

// How all sums of a row end: each lane has added up by itself, and the lanes then do by halves.
INLINE float sum_of_lanes(Floats sums) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] = sums[lane] + sums[lane + half];
  }
  return sums[0];
}

// row = softmax(row + mask), in place; `mask` may be null.
TARGET inline void softmax(float* row, const float* mask, int64_t n) {
  const float lowest = -3.402823466e38f;
  const int64_t whole = n / kLanes * kLanes, last = n - whole;
  if (mask != nullptr) {
    for (int64_t i = 0; i < n; ++i) row[i] = row[i] + mask[i];
  }
  Floats top = load_last(row + whole, last, lowest);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats v = load_floats(row + i);
    top = v > top ? v : top;
  }
  const float largest = largest_lane(top);

  int64_t done = 0;
  for (; done + kAtOnce <= n; done += kAtOnce) {
    store_floats(row + done, exponential<kAtOnce>(load_floats<kAtOnce>(row + done) - largest));
  }
  for (; done < whole; done += kLanes) store_floats(row + done, exponential(load_floats(row + done) - largest));
  Floats sums = Floats{};
  for (int64_t i = 0; i < whole; i += kLanes) sums = sums + load_floats(row + i);
  if (last > 0) {
    store_last(row + whole, exponential(load_last(row + whole, last, 0) - largest), last);
    sums = sums + load_last(row + whole, last, 0);
  }
  const float factor = 1.0f / sum_of_lanes(sums);
  for (int64_t i = 0; i < n; ++i) row[i] = row[i] * factor;
}

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias; `weight` and `bias` may be null.
TARGET inline void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int64_t n, float* y) {
  const int64_t whole = n / kLanes * kLanes, last = n - whole;
  const float share = static_cast<float>(1.0 / static_cast<double>(n));
  Floats sums = Floats{};
  for (int64_t i = 0; i < whole; i += kLanes) sums = sums + load_floats(x + i);
  if (last > 0) sums = sums + load_last(x + whole, last, 0);
  const float mean = sum_of_lanes(sums) * share;
  sums = Floats{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats difference = load_floats(x + i) - mean;
    store_floats(y + i, difference);
    sums = sums + difference * difference;
  }
  if (last > 0) {
    store_last(y + whole, load_last(x + whole, last, 0) - mean, last);
    const Floats difference = load_last(y + whole, last, 0);
    sums = sums + difference * difference;
  }
  const float factor = 1.0f / std::sqrt(sum_of_lanes(sums) * share + epsilon);
  for (int64_t i = 0; i < n; ++i) {
    float made = y[i] * factor;
    if (weight != nullptr) made = made * weight[i];
    if (bias != nullptr) made = made + bias[i];
    y[i] = made;
  }
}

}  // namespace
}  // namespace quantformer
