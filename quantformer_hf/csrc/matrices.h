// Products by instructions that multiply whole matrices of bytes: 16 rows by 64 positions of a panel's 16 outputs at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace quantformer {

struct InstructionSet;
struct Plan;

constexpr int kMatrixRows = 16;
constexpr int kMatrixPositions = 64;
constexpr int64_t kMatrixBytes = kMatrixRows * kMatrixPositions;

// Positions of one group that are multiplied together.
struct MatrixStep {
  int64_t first, positions;  // a multiple of 4; at most kMatrixPositions
  bool last;                 // of its group
};

// Panels that the same rows are multiplied by while they are in cache.
constexpr int kMatrixPanels = 2;

// Rows against some panels. What is made is what `Tile` says.
struct MatrixProduct {
  const uint8_t* x;  // `[blocks of kMatrixRows rows][steps][kMatrixRows][kMatrixPositions]`, zero where there is none
  int64_t rows;
  const int8_t* panels;  // as of `Tile`; of kMatrixPositions positions from the first one of a step bytes may be read
  int64_t panel_step;    // bytes from panel to panel
  int64_t num_panels;
  const MatrixStep* steps;
  int64_t num_steps, num_groups;  // of groups that are not empty; one at least
  const float* group_scales;
  const float *scale, *bias;  // `[num_panels * kPanel]`
  float* y;                   // of the first block
  int64_t y_stride, y_step;   // elements from row to row, and from block to block
  void (*made)(void* context, int64_t first_row);  // called when a block has been made; null: nobody waits for it
  void* context;
};

struct Matrices {
  // One block of at most kMatrixRows rows to `[steps][kMatrixRows][kMatrixPositions]`.
  void (*prepare)(const uint8_t* codes, int64_t stride, int64_t rows, const MatrixStep* steps, int64_t num_steps, uint8_t* x);
  // What a thread does before and after it multiplies.
  void (*begin)();
  void (*end)();
  void (*multiply)(const MatrixProduct&);
};

// Whether this set has such instructions, and they are worth it here.
bool takes_matrices(const Product& product, const Plan& plan, const InstructionSet& set);

// As `quantformer_multiply_to_codes`.
int multiply_matrices(const Product& product, const Codes* then, const Plan& plan, int64_t threads, ParallelFor parallel_for);

}  // namespace quantformer
