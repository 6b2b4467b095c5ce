#include "pairs.h"

#include <algorithm>
#include <vector>

#include "scratch.h"
#include "threads.h"
#include "writer.h"

namespace quantformer {
namespace {

// Rows of one task at least: each task unpacks its panel.
constexpr int64_t kTaskRows = 48;

std::vector<PairGroup> groups_of(const Product& p) {
  std::vector<PairGroup> groups;
  int64_t start = 0, largest = 0;  // of the sums so far
  for (int64_t g = 0; g < p.groups; start = p.group_ends[g++]) {
    if (p.group_ends[g] == start) continue;
    const int64_t pairs = (p.group_ends[g] - start) / 2, most = kLargestOfPair * pairs * p.multiplier;
    const int64_t multiple = p.multiples == nullptr ? 0 : p.multiples[g], own = most * multiple;
    if (own == 0 || own > kLargestWord || p.multiplier * multiple > kLargestFactor) {
      groups.push_back({pairs, p.group_scales[g], 1, true, true});
      largest = kLargestWord;
      continue;
    }
    const bool joins = !groups.empty() && groups.back().scale == p.units[g] && largest + own <= kLargestWord;
    if (joins) groups.back().last = false;
    largest = joins ? largest + own : own;
    groups.push_back({pairs, p.units[g], p.multiples[g], !joins, true});
  }
  return groups;
}

int64_t blocks_at(int64_t places, int64_t place) {
  return std::min<int64_t>(kPairBlocks, divide_up(places - place, kPairBlock));
}

// Codes of activations as tiles take them.
struct Rows {
  const uint8_t* x;
  int64_t stride;
  const int32_t* sums;
};

// Panels `begin` to `end`, rows `first` to `last`.
void look_up_panels(const Product& p, const Codes* then, const InstructionSet& set, const std::vector<PairGroup>& groups,
                    const Rows& x, int64_t begin, int64_t end, int64_t first, int64_t last) {
  thread_local Scratch scratch;
  const Pairs& pairs = *set.pairs;
  const int64_t tile_rows = pairs.tile_rows, tile_size = tile_rows * kPairPanel, places = places_of(p, then);
  scratch.reserve(x.stride * kPairPanel + tile_size * (sizeof(float) + 1 + sizeof(uint16_t)) +
                  Writer<kPairPanel>::scratch_bytes(tile_rows));
  auto panel = scratch.take<uint8_t>(x.stride * kPairPanel);
  auto sums = scratch.take<float>(tile_size);
  auto bytes = scratch.take<uint8_t>(tile_size);
  auto carry = scratch.take<uint16_t>(tile_size);
  Writer<kPairPanel> writer(p, then, set, tile_rows, scratch);
  const auto num_groups = static_cast<int64_t>(groups.size());
  for (int64_t n = begin; n < end; ++n) {
    const int64_t place = n * kPairPanel, blocks = blocks_at(places, place);
    writer.begin(place);
    pairs.unpack(p.ordered + place * x.stride / 2, x.stride, blocks, panel);
    for (int64_t row = first; row < last; row += tile_rows) {
      const int64_t rows = std::min(tile_rows, last - row);
      pairs.tiles[rows - 1][blocks - 1]({x.x + row * x.stride, x.stride, x.sums + row * num_groups, num_groups, groups.data(),
                                         panel, p.multiplier, writer.scale(), writer.bias(), writer.y(row),
                                         writer.y_stride(), sums, bytes, carry});
      writer.end(row, rows);
    }
  }
}

}  // namespace

bool takes_pairs(const Product& p, const InstructionSet& set) {
  if (set.pairs == nullptr || p.largest_x > 3 || p.bits > 2 || p.by_column || p.multiplier < 1 || p.multiplier > 2) {
    return false;
  }
  for (int64_t g = 0, start = 0; g < p.groups; start = p.group_ends[g++]) {
    if (p.group_ends[g] - start > 2 * kMostPairs) return false;
  }
  return true;
}

int64_t pairs_bytes(const Product& p, const Codes* then) {
  return divide_up(places_of(p, then), kPairBlock) * kPairBlock / 2 * (p.positions / 2);
}

void order_pairs(const Product& p, const Codes* then, uint8_t* ordered) {
  const int64_t places = places_of(p, then);
  const auto code = [&](int64_t place, int64_t position) -> int {
    const int64_t output = output_at(order_of(then), places, place), column = p.source[position];
    if (output >= p.outputs || column >= p.columns) return 0;
    return p.codes[output * p.code_stride + column * p.bits / 8] >> (column * p.bits % 8) & ((1 << p.bits) - 1);
  };
  const auto pair = [&](int64_t place, int64_t k) { return code(place, 2 * k) | code(place, 2 * k + 1) << 2; };
  for (int64_t panel = 0; panel < places; panel += kPairPanel) {
    for (int64_t k = 0; k < p.positions / 2; ++k) {
      for (int64_t block = 0; block < blocks_at(places, panel) * kPairBlock; block += kPairBlock) {
        for (int64_t i = 0; i < kPairBlock / 2; ++i) {
          const int64_t place = panel + block + i / 4 * 8 + i % 4;
          *ordered++ = static_cast<uint8_t>(pair(place, k) | pair(place + 4, k) << 4);
        }
      }
    }
  }
}

int look_up(const Product& p, const Codes* then, int64_t threads, ParallelFor parallel_for) {
  const InstructionSet& set = current();
  const std::vector<PairGroup> groups = groups_of(p);
  const int64_t stride = p.positions / 2, num_groups = static_cast<int64_t>(groups.size());
  const int64_t panels = divide_up(places_of(p, then), kPairPanel);
  if (panels == 0 || p.rows == 0) return 0;
  const auto x = Pool::take<uint8_t>(p.rows * stride);
  const auto sums = Pool::take<int32_t>(p.rows * num_groups);
  const int64_t parts = threads == 1 ? 1 : std::clamp<int64_t>(divide_up(kTasksPerThread * threads, panels), 1,
                                                               divide_up(p.rows, kTaskRows));
  // Whole tiles in all parts but the last.
  const int64_t tile_rows = set.pairs->tile_rows, part_rows = divide_up(divide_up(p.rows, parts), tile_rows) * tile_rows;
  const int prepared = share(parts, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * part_rows; row < std::min(end * part_rows, p.rows); ++row) {
      set.pairs->prepare(p.x + row * p.x_stride, groups.data(), num_groups, p.addend, x.get() + row * stride,
                         sums.get() + row * num_groups);
    }
  });
  if (prepared != 0) return -1;
  return share(panels * parts, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / parts, first = task % parts * part_rows;
      look_up_panels(p, then, set, groups, {x.get(), stride, sums.get()}, panel, panel + 1, std::min(first, p.rows),
                     std::min(first + part_rows, p.rows));
    }
  });
}

}  // namespace quantformer
