#include "product.h"

#include <algorithm>
#include <cstdlib>

#include "panels.h"
#include "scratch.h"
#include "threads.h"
#include "writer.h"

namespace quantformer {
namespace {

// Below this many positions a flush would cost more than wider sums do.
constexpr int64_t kShortestSegment = 32;

// What becomes floating point by itself: each group, or all groups of a unit, whose sums or weights are multiplied before.
enum class Sums { kOfGroups, kOfMultiples, kOfUnits };

// Steps of 4 positions that any product may have where sums are wide.
constexpr int64_t kAnySteps = int64_t{1} << 40;

// Segments of at most `most` steps. One whose weights are multiplied before counts so often.
std::vector<Segment> segments_of(const Product& p, int64_t most, Sums sums) {
  std::vector<Segment> segments;
  int64_t at = 0, begin = 0, left = most;
  bool first = true;
  for (int64_t g = 0; g < p.groups; ++g) {
    int64_t next = g + 1;
    while (next < p.groups && p.group_ends[next] == p.group_ends[g]) ++next;
    const bool goes_on = sums != Sums::kOfGroups && next < p.groups && p.units[next] == p.units[g];
    const int64_t end = p.group_ends[g], count = sums == Sums::kOfUnits ? p.multiples[g] : 1;
    const auto close = [&](bool last) {
      const int multiple = sums == Sums::kOfMultiples ? p.multiples[g] : 1;
      segments.push_back({at - begin, first, last, sums == Sums::kOfGroups ? p.group_scales[g] : p.units[g], multiple});
      begin = at;
      first = last;
      left = most;
    };
    if (at == end) continue;
    for (;;) {
      const int64_t steps = std::min(left / count, (end - at) / 4);
      at += 4 * steps;
      left -= count * steps;
      if (at == end) break;
      close(false);
    }
    if (sums != Sums::kOfUnits || !goes_on) close(!goes_on);
  }
  return segments;
}

}  // namespace

void order_panels(const Product& p, const Codes* then, uint8_t* ordered) {
  const InstructionSet& set = current().unpack_bytes == nullptr ? *plain() : current();
  const int64_t places = places_of(p, then), bits = p.ordered_bits, run = 8 * bits;
  std::vector<uint8_t> scratch(panel_scratch_bytes(p.columns));
  std::vector<int8_t> panel(p.positions * kPanel);
  for (int64_t place = 0; place < places; place += kPanel) {
    const uint8_t* rows[kPanel];
    set.unpack_bytes(panel_at(p, order_of(then), places, place, rows, scratch.data()), panel.data());
    for (const int8_t* w = panel.data(); w != panel.data() + panel.size(); w += 4 * kPanel, ordered += run) {
      std::fill_n(ordered, run, 0);
      for (int i = 0; i < 4 * kPanel; ++i) {
        // What means nothing may be any weight.
        const int code = (w[i] - p.addend) / p.multiplier & ((1 << bits) - 1);
        ordered[i % run] |= static_cast<uint8_t>(code << i / run * bits);
      }
    }
  }
}

Plan plan(const Product& p, const Codes* then, const InstructionSet& set) {
  const int64_t lowest = p.addend, highest = int64_t{p.largest_code} * p.multiplier + p.addend;
  const int64_t largest_weight = std::max(std::abs(lowest), std::abs(highest));
  Plan made{lowest < -128 || highest > 127 || p.largest_x > set.largest_byte, false, {}};
  // 16 bits hold the sums of pairs; four positions are two pairs, in two sums.
  const int64_t most = set.narrow_sums ? 32767 / std::max<int64_t>(1, 2 * p.largest_x * largest_weight) : kAnySteps;
  made.words = made.words || most < std::min(kShortestSegment, p.positions) / 4;
  if (made.words) {
    made.segments = segments_of(p, kAnySteps, Sums::kOfGroups);
    return made;
  }
  made.segments = segments_of(p, most, p.multiples != nullptr && set.narrow_sums ? Sums::kOfMultiples : Sums::kOfGroups);
  if (p.multiples == nullptr || !in_order(p, then)) return made;
  if (most < *std::max_element(p.multiples, p.multiples + p.groups)) return made;
  auto merged = segments_of(p, most, Sums::kOfUnits);
  if (merged.size() < made.segments.size()) {
    made.merged = true;
    made.segments = std::move(merged);
  }
  return made;
}

void multiply(const Product& p, const Codes* then, const Plan& plan, const InstructionSet& set, int64_t begin,
              int64_t end, int64_t first, int64_t last) {
  thread_local Scratch scratch;
  const int64_t tile_rows = set.tile_rows, tile_size = tile_rows * kPanel, wide_rows = plan.words ? last - first : 0;
  scratch.reserve(Panels::scratch_bytes(p, 1) + wide_rows * p.positions * sizeof(int16_t) +
                  tile_size * (sizeof(float) + sizeof(int32_t)) +
                  Writer<kPanel>::scratch_bytes(tile_rows));
  Panels panels(p, then, plan, set, 1, scratch);
  auto wide = scratch.take<int16_t>(wide_rows * p.positions);
  auto sums = scratch.take<float>(tile_size);
  auto carry = scratch.take<int32_t>(tile_size);
  Writer<kPanel> writer(p, then, set, tile_rows, scratch);

  if (plan.words) {
    for (int64_t r = first; r < last; ++r) {
      std::copy_n(p.x + r * p.x_stride, p.positions, wide + (r - first) * p.positions);
    }
  }
  for (int64_t n = begin; n < end; ++n) {
    writer.begin(n * kPanel);
    const void* panel = panels.unpack(n);
    Tile tile = {plan.words ? static_cast<const void*>(wide) : p.x + first * p.x_stride,
                 plan.words ? p.positions : p.x_stride, panel, plan.segments.data(),
                 static_cast<int64_t>(plan.segments.size()), writer.scale(), writer.bias(), nullptr, writer.y_stride(), sums,
                 carry};
    const int64_t x_step = tile_rows * tile.x_stride * (plan.words ? sizeof(int16_t) : 1);
    const int64_t tiles = divide_up(last - first, tile_rows);
    for (int64_t row = first; row < last; row += tile_rows) {
      panels.fetch(n + 1, 1, (row - first) / tile_rows, tiles);
      const int64_t rows = std::min(tile_rows, last - row);
      tile.y = writer.y(row);
      (plan.words ? set.words : set.bytes)[rows - 1](tile);
      tile.x = static_cast<const uint8_t*>(tile.x) + x_step;
      writer.end(row, rows);
    }
  }
}

}  // namespace quantformer
