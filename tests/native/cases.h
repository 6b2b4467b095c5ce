// Random layers and what they must give: sums of products in integers of 64 bits, all else one rounding an operation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace cases {

// Memory of just this size, so that the address sanitizer sees each byte that is read beyond it; not initialized.
template <typename T>
struct Exact {
  explicit Exact(int64_t n) : size(n), memory(new T[n]) {}
  operator T*() const { return memory.get(); }
  T* begin() const { return memory.get(); }
  T* end() const { return memory.get() + size; }
  int64_t size;
  std::unique_ptr<T[]> memory;
};

template <typename T>
bool same_bits(const Exact<T>& a, const Exact<T>& b) {
  return a.size == b.size && (a.size == 0 || std::memcmp(a, b, a.size * sizeof(T)) == 0);
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(engine_); }
  Exact<float> reals(int64_t n, float low, float high) {
    Exact<float> made(n);
    for (float& x : made) x = real(low, high);
    return made;
  }

 private:
  std::mt19937 engine_;
};

// Channels in groups, each padded to a multiple of 4 positions. Groups may be empty.
struct Layout {
  Layout(Random& random, int64_t columns, int64_t groups) : columns(columns) {
    std::vector<int64_t> group_of(columns);
    for (auto& g : group_of) g = random.integer(0, groups - 1);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t c = 0; c < columns; ++c) {
        if (group_of[c] == g) order.push_back(static_cast<int32_t>(c));
      }
      while (order.size() % 4) order.push_back(static_cast<int32_t>(columns));
      ends.push_back(static_cast<int64_t>(order.size()));
    }
  }
  Exact<int32_t> source() const {
    Exact<int32_t> made(positions());
    std::copy(order.begin(), order.end(), made.begin());
    return made;
  }
  int64_t positions() const { return static_cast<int64_t>(order.size()); }
  int64_t columns;
  std::vector<int32_t> order;
  std::vector<int64_t> ends;
};

// A weight of `bits`, on the grid of integers (multiplier 1) or the half-shifted one (2), packed as in packing.py.
struct Weight {
  Weight(Random& random, int64_t outputs, int64_t columns, int bits, int multiplier, bool largest = false)
      : outputs(outputs), columns(columns), width((columns * bits + 7) / 8), bits(bits), multiplier(multiplier),
        addend(multiplier == 1 ? -(1 << (bits - 1)) : 1 - (1 << bits)), codes(outputs * columns),
        packed(outputs * width) {
    std::fill(packed.begin(), packed.end(), 0);
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t c = 0; c < columns; ++c) {
        // The ends of the range more often than by chance: there sums overflow.
        const int64_t code = largest ? 1 << bits : random.integer(-2, (1 << bits) + 1);
        codes[o * columns + c] = static_cast<int>(std::min<int64_t>(std::max<int64_t>(code, 0), (1 << bits) - 1));
        for (int b = 0; b < bits; ++b) {
          const int64_t at = c * bits + b;
          packed[o * width + at / 8] |= static_cast<uint8_t>((codes[o * columns + c] >> b & 1) << (at % 8));
        }
      }
    }
  }
  int64_t at(int64_t output, int64_t column) const {
    return int64_t{codes[output * columns + column]} * multiplier + addend;
  }
  int64_t outputs, columns, width;
  int bits, multiplier, addend;
  std::vector<int> codes;
  Exact<uint8_t> packed;
};

// Codes of activations, zero where a group was padded.
inline Exact<uint8_t> activations(Random& random, const Layout& layout, int64_t rows, int largest, bool all = false) {
  Exact<uint8_t> x(rows * layout.positions());
  for (int64_t i = 0; i < x.size; ++i) {
    const bool padding = layout.order[i % layout.positions()] == layout.columns;
    const int64_t code = all ? largest : std::min<int64_t>(random.integer(0, largest + largest / 4), largest);
    x[i] = static_cast<uint8_t>(padding ? 0 : code);
  }
  return x;
}

// One output of the formula of instruction_set.h.
inline float output(const Layout& layout, const Weight& weight, const uint8_t* x, int64_t o, const float* group_scales,
                    float scale, float bias) {
  float sum = 0;
  int64_t k = 0;
  for (size_t g = 0; g < layout.ends.size(); ++g) {
    int64_t integers = 0;
    const bool empty = k == layout.ends[g];
    for (; k < layout.ends[g]; ++k) {
      if (layout.order[k] < layout.columns) integers += x[k] * weight.at(o, layout.order[k]);
    }
    if (empty) continue;
    const float part = static_cast<float>(integers) * group_scales[g];
    sum = sum + part;
  }
  const float scaled = sum * scale;
  return scaled + bias;
}

inline uint8_t code(float x, float offset, float inverse, int largest) {
  const float difference = x - offset;
  const float position = difference * inverse;
  if (std::isnan(position)) return 0;
  return static_cast<uint8_t>(std::nearbyint(std::fmin(std::fmax(position, 0.0f), static_cast<float>(largest))));
}

// The level of `levels`, in ascending order, that is nearest, of two the one with the even number; `code` makes zero of no number.
inline uint8_t nearest(float x, float offset, float inverse, const std::vector<int>& levels) {
  const float difference = x - offset;
  const float position = difference * inverse;
  size_t best = 0;
  for (size_t i = 1; i < levels.size() && !std::isnan(position); ++i) {
    const double middle = (levels[i - 1] + levels[i]) / 2.0;
    if (position > middle || (position == middle && i % 2 == 0)) best = i;
  }
  return static_cast<uint8_t>(levels[best]);
}

// The formulas of pointwise.h, one number at a time.
inline float exponential(float x) {
  x = x * 1.44269504088896341f;
  x = x > -124.0f ? x : -124.0f;
  const float n = std::nearbyint(x), f = x - n;
  float p = 1.3276471771e-3f;
  for (float c : {9.6755413327e-3f, 5.5507132742e-2f, 2.4022119724e-1f, 6.9314696706e-1f, 1.0f}) {
    p = p * f;
    p = p + c;
  }
  return std::ldexp(p, static_cast<int>(n));
}

inline float gelu(float x) {
  const float size = std::fabs(x);
  float p = 5.3829750000e-6f;
  for (float c : {4.8890635643e-5f, 3.8003575000e-5f, 3.2776263241e-3f, 2.1141006150e-2f, 4.9867346967e-2f, 1.0f}) {
    p = p * size;
    p = p + c;
  }
  for (int i = 0; i < 4; ++i) p = p * p;
  const float tail = 0.5f / p;
  return x * (x < 0 ? tail : 1.0f - tail);
}

inline float sum_of_lanes(const float* lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// In place; `weight` and `bias` may be null.
inline void layer_norm(float* row, const float* weight, const float* bias, float epsilon, int64_t n) {
  const float share = static_cast<float>(1.0 / static_cast<double>(n));
  float lanes[8] = {}, squares[8] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i % 8] += row[i];
  const float mean = sum_of_lanes(lanes) * share;
  for (int64_t i = 0; i < n; ++i) {
    row[i] = row[i] - mean;
    const float square = row[i] * row[i];
    squares[i % 8] += square;
  }
  const float variance = sum_of_lanes(squares) * share, factor = 1.0f / std::sqrt(variance + epsilon);
  for (int64_t i = 0; i < n; ++i) {
    row[i] = row[i] * factor;
    if (weight != nullptr) row[i] = row[i] * weight[i];
    if (bias != nullptr) row[i] = row[i] + bias[i];
  }
}

// Of `n` scores with the mask added.
inline void softmax(float* row, int64_t n) {
  float largest = row[0], lanes[8] = {};
  for (int64_t i = 1; i < n; ++i) largest = std::fmax(largest, row[i]);
  for (int64_t i = 0; i < n; ++i) {
    row[i] = exponential(row[i] - largest);
    lanes[i % 8] += row[i];
  }
  const float factor = 1.0f / sum_of_lanes(lanes);
  for (int64_t i = 0; i < n; ++i) row[i] = row[i] * factor;
}

// Values of an operand and, among them, all that is special: halves between codes, infinities, NaN.
inline Exact<float> values(Random& random, int64_t n) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float special[] = {0.0f, -0.0f, 0.5f, 1.5f, 2.5f, 1e30f, -1e30f, kInfinity, -kInfinity, std::nanf("")};
  Exact<float> made(n);
  for (float& x : made) x = random.integer(0, 3) ? random.real(-4, 300) : special[random.integer(0, 9)];
  return made;
}

}  // namespace cases
