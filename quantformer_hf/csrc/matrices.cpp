#include "matrices.h"

#include <algorithm>
#include <vector>

#include "panels.h"
#include "scratch.h"
#include "threads.h"
#include "writer.h"

namespace quantformer {
namespace {

// With fewer rows most of a matrix would be zeros, with fewer positions in the mean most of a step.
constexpr int64_t kFewestRows = 8, kFewestPositions = 16;

// Blocks of rows of one task at least: each task unpacks its panel.
constexpr int64_t kTaskBlocks = 6;

// Outputs of the panels that are held.
constexpr int64_t kWidth = kMatrixPanels * kPanel;

int64_t steps_in(int64_t positions) { return divide_up(positions, kMatrixPositions); }

std::vector<MatrixStep> steps_of(const Plan& plan) {
  std::vector<MatrixStep> steps;
  int64_t first = 0;
  for (const Segment& group : plan.segments) {
    for (int64_t left = group.positions; left > 0; left -= kMatrixPositions) {
      steps.push_back({first, std::min<int64_t>(kMatrixPositions, left), left <= kMatrixPositions});
      first += steps.back().positions;
    }
  }
  return steps;
}

// What all tasks share. Each has kMatrixPanels panels, and a part of the blocks of rows.
struct Work {
  const Product& p;
  const Codes* then;
  const InstructionSet& set;
  const Plan& plan;
  std::vector<MatrixStep> steps;
  std::vector<float> group_scales;
  const uint8_t* x;
  int64_t parts, part_blocks;
};

// What a thread does when a block of rows has been made.
struct RowBlock {
  Writer<kWidth>& writer;
  const Panels& panels;
  int64_t first_row, rows, next_panel, count;

  void made(int64_t row) {
    writer.end(first_row + row, std::min<int64_t>(kMatrixRows, rows - row));
    panels.fetch(next_panel, kMatrixPanels, row / kMatrixRows, count);
  }
};

void run_tasks(const Work& work, int64_t begin, int64_t end) {
  const Product& p = work.p;
  thread_local Scratch scratch;
  scratch.reserve(Panels::scratch_bytes(p, kMatrixPanels) + Writer<kWidth>::scratch_bytes(kMatrixRows));
  Panels panels(p, work.then, work.plan, work.set, kMatrixPanels, scratch);
  Writer<kWidth> writer(p, work.then, work.set, kMatrixRows, scratch);
  const auto num_steps = static_cast<int64_t>(work.steps.size()), num_groups = static_cast<int64_t>(work.group_scales.size());
  const int64_t places = places_of(p, work.then);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / work.parts * kMatrixPanels, first_block = task % work.parts * work.part_blocks;
    const int64_t first_row = first_block * kMatrixRows, rows = std::min(work.part_blocks * kMatrixRows, p.rows - first_row);
    if (rows <= 0) continue;
    const int64_t held = std::min<int64_t>(kMatrixPanels, divide_up(places - n * kPanel, kPanel));
    writer.begin(n * kPanel);
    const auto first_panel = static_cast<const int8_t*>(panels.unpack(n));
    for (int64_t at = 1; at < held; ++at) panels.unpack(n + at, at);
    RowBlock block = {writer, panels, first_row, rows, n + kMatrixPanels, divide_up(rows, kMatrixRows)};
    const auto made = [](void* block, int64_t row) { static_cast<RowBlock*>(block)->made(row); };
    float* const y = writer.y(first_row);
    const int64_t y_step = writer.y(first_row + kMatrixRows) - y;
    work.set.matrices->multiply({work.x + first_block * num_steps * kMatrixBytes, rows, first_panel, panels.step(), held,
                                 work.steps.data(), num_steps, num_groups, work.group_scales.data(), writer.scale(),
                                 writer.bias(), y, writer.y_stride(), y_step, made, &block});
  }
}

}  // namespace

bool takes_matrices(const Product& p, const Plan& plan, const InstructionSet& set) {
  if (set.matrices == nullptr || plan.words || p.rows < kFewestRows) return false;
  int64_t steps = 0;
  for (const Segment& group : plan.segments) steps += steps_in(group.positions);
  return steps > 0 && p.positions >= kFewestPositions * steps;
}

int multiply_matrices(const Product& p, const Codes* then, const Plan& plan, int64_t threads, ParallelFor parallel_for) {
  const InstructionSet& set = current();
  const Matrices& matrices = *set.matrices;
  Work work = {p, then, set, plan, steps_of(plan), {}, nullptr, 1, 0};
  for (const Segment& group : plan.segments) {
    if (group.positions > 0) work.group_scales.push_back(group.scale);
  }
  const int64_t blocks = divide_up(p.rows, kMatrixRows), columns = divide_up(places_of(p, then), kWidth);
  const auto num_steps = static_cast<int64_t>(work.steps.size()), block_bytes = num_steps * kMatrixBytes;
  const auto x = Pool::take<uint8_t>(blocks * block_bytes);
  work.x = x.get();
  if (threads > 1) {
    work.parts = std::clamp<int64_t>(divide_up(kTasksPerThread * threads, columns), 1, divide_up(blocks, kTaskBlocks));
  }
  work.part_blocks = divide_up(blocks, work.parts);
  const int prepared = share(work.parts, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin * work.part_blocks; block < std::min(end * work.part_blocks, blocks); ++block) {
      const int64_t row = block * kMatrixRows;
      matrices.prepare(p.x + row * p.x_stride, p.x_stride, std::min<int64_t>(kMatrixRows, p.rows - row), work.steps.data(),
                       num_steps, x.get() + block * block_bytes);
    }
  });
  if (prepared != 0) return -1;
  return share(columns * work.parts, threads, parallel_for, [&](int64_t begin, int64_t end) {
    matrices.begin();
    run_tasks(work, begin, end);
    matrices.end();
  });
}

}  // namespace quantformer
