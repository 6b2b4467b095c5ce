// Products of activations and weights of two bits each, by look-up. Two activations say which of 16 tables of 16 sums is meant,
// and two weights which sum of it: one shuffle of bytes looks up those of 32 outputs, where a multiplication of bytes has 16
// outputs of two. Sums of codes stay below 256 for a while, so that bytes hold them.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace quantformer {

struct InstructionSet;

// Outputs whose weights lie together, and of a panel, which the last one may have fewer blocks of.
constexpr int kPairBlock = 32;
constexpr int kPairBlocks = 3;
constexpr int kPairPanel = kPairBlock * kPairBlocks;

// The sum of a pair of products of codes up to 3, and how many such sums a byte holds.
constexpr int64_t kLargestOfPair = 18;
constexpr int64_t kPairsInByte = 255 / kLargestOfPair;

// Of a group, such that 16 bits hold twice its sum.
constexpr int64_t kLargestWord = 65535;
constexpr int64_t kMostPairs = kLargestWord / (2 * kLargestOfPair);

// Of the sums of two bytes, which become a word together, that may be negative.
constexpr int64_t kLargestFactor = 32767 / (2 * kPairsInByte * kLargestOfPair);

// A group of channels that is not empty. Groups whose scales are multiples of a unit add up as words, one after the other, as
// long as words hold it.
struct PairGroup {
  int64_t pairs;     // even, at most kMostPairs
  float scale;       // of the group, or the unit
  int multiple;      // of it
  bool first, last;  // of those that add up
};

// Rows of activations against one panel. What is made is what `Tile` says.
struct PairTile {
  const uint8_t* x;  // of each row and pair, 16 * (first code + 4 * second code)
  int64_t x_stride;
  const int32_t* row_sums;  // of each row and group, the sum of its codes times the weights' addend, and of those before it
  int64_t num_groups;
  const PairGroup* groups;
  const uint8_t* panel;  // `[pair][blocks][kPairBlock]`, see `unpack`
  int multiplier;        // 1 or 2
  const float *scale, *bias;  // of each output
  float* y;
  int64_t y_stride;
  float* sums;      // `[rows][outputs]`, scratch
  uint8_t* bytes;   // the same, for groups of more than kPairsInByte pairs
  uint16_t* carry;  // the same, for groups of more than twice as many, and for those that add up
};

struct Pairs {
  int tile_rows;
  // One row of codes to `x` and `row_sums` of a tile.
  void (*prepare)(const uint8_t* codes, const PairGroup* groups, int64_t num_groups, int addend, uint8_t* x,
                  int32_t* row_sums);
  // A panel of weights in order, `[pair][blocks][16]`, with two outputs a byte: to a byte each, first code + 4 * second code.
  // In a block of 32 the low halves come first. Output 8 i + j of a block lies at byte 4 i + j, j < 4, and 4 i + j + 12 else.
  void (*unpack)(const uint8_t* ordered, int64_t pairs, int64_t blocks, uint8_t* panel);
  void (*const (*tiles)[kPairBlocks])(const PairTile&);  // by rows and blocks, from 1
};

// Those of AVX2, which avx2.cpp offers.
const Pairs* avx2_pairs();

// Whether the product can be looked up on this set, and is worth it.
bool takes_pairs(const Product& product, const InstructionSet& set);

// Bytes of weights in that order, and the weights.
int64_t pairs_bytes(const Product& product, const Codes* then);
void order_pairs(const Product& product, const Codes* then, uint8_t* ordered);

// As `quantformer_multiply_to_codes`, of weights in pairs.
int look_up(const Product& product, const Codes* then, int64_t threads, ParallelFor parallel_for);

}  // namespace quantformer
