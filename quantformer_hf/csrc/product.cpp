#include "product.h"

#include <algorithm>
#include <cstdlib>

#include "scratch.h"

namespace quantformer {
namespace {

// Below this many positions a flush would cost more than wider sums do.
constexpr int64_t kShortestSegment = 32;

}  // namespace

Plan plan(const Product& p, const InstructionSet& set) {
  const int64_t lowest = p.addend, highest = int64_t{p.largest_code} * p.multiplier + p.addend;
  const int64_t largest_weight = std::max(std::abs(lowest), std::abs(highest));
  Plan made{lowest < -128 || highest > 127 || p.largest_x > set.largest_byte, {}};
  int64_t longest = p.positions;
  if (set.narrow_sums && !made.words) {
    // 16 bits hold the sums of pairs; four positions are two pairs, in two sums.
    longest = 32767 / std::max<int64_t>(1, 2 * p.largest_x * largest_weight) * 4;
    made.words = longest < kShortestSegment;
    if (made.words) longest = p.positions;
  }
  int64_t at = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    for (bool first = true; at < p.group_ends[g]; first = false) {
      const int64_t length = std::min(longest, p.group_ends[g] - at);
      at += length;
      made.segments.push_back({length, first, at == p.group_ends[g], p.group_scales[g]});
    }
  }
  return made;
}

void multiply(const Product& p, const Plan& plan, const InstructionSet& set, int64_t begin, int64_t end, int64_t first,
              int64_t last) {
  thread_local Scratch scratch;
  const int64_t tile_rows = set.tile_rows, wide_rows = plan.words ? last - first : 0;
  scratch.reserve(p.positions * kPanel * sizeof(int16_t) + panel_scratch_bytes(p.columns) +
                  wide_rows * p.positions * sizeof(int16_t) +
                  tile_rows * kPanel * (2 * sizeof(float) + sizeof(int32_t)) + 2 * kPanel * sizeof(float));
  auto panel = scratch.take<int16_t>(p.positions * kPanel);
  auto unpacking = scratch.take<uint8_t>(panel_scratch_bytes(p.columns));
  auto wide = scratch.take<int16_t>(wide_rows * p.positions);
  auto sums = scratch.take<float>(tile_rows * kPanel);
  auto carry = scratch.take<int32_t>(tile_rows * kPanel);
  auto narrow = scratch.take<float>(tile_rows * kPanel);
  auto scale = scratch.take<float>(kPanel);
  auto bias = scratch.take<float>(kPanel);

  if (plan.words) {
    for (int64_t r = first; r < last; ++r) {
      std::copy_n(p.x + r * p.x_stride, p.positions, wide + (r - first) * p.positions);
    }
  }
  for (int64_t n = begin; n < end; ++n) {
    const int64_t output = n * kPanel, outputs = std::min<int64_t>(kPanel, p.outputs - output);
    const Panel packed = {p.codes + output * p.code_stride, p.code_stride, outputs, p.columns, p.bits, p.multiplier,
                          p.addend, p.source, p.positions, unpacking};
    if (plan.words) {
      set.unpack_words(packed, panel);
    } else {
      set.unpack_bytes(packed, reinterpret_cast<int8_t*>(panel));
    }
    // The last panel may be narrower than a tile, which then works beside its place.
    const bool whole = outputs == kPanel;
    std::copy_n(p.scale + output, outputs, scale);
    std::copy_n(p.bias + output, outputs, bias);
    Tile tile = {plan.words ? static_cast<const void*>(wide) : p.x + first * p.x_stride,
                 plan.words ? p.positions : p.x_stride, panel, plan.segments.data(),
                 static_cast<int64_t>(plan.segments.size()), scale, bias, whole ? p.y + first * p.y_stride + output : narrow,
                 whole ? p.y_stride : kPanel, sums, carry};
    const int64_t x_step = tile_rows * tile.x_stride * (plan.words ? sizeof(int16_t) : 1);
    for (int64_t row = first; row < last; row += tile_rows) {
      const int64_t rows = std::min(tile_rows, last - row);
      (plan.words ? set.words : set.bytes)[rows - 1](tile);
      tile.x = static_cast<const uint8_t*>(tile.x) + x_step;
      if (whole) {
        tile.y += tile_rows * p.y_stride;
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(narrow + r * kPanel, outputs, p.y + (row + r) * p.y_stride + output);
        }
      }
    }
  }
}

}  // namespace quantformer
