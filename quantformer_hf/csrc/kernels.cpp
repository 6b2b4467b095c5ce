#include "kernels.h"

#include <algorithm>
#include <exception>
#include <new>

#include "matrices.h"
#include "pairs.h"
#include "scratch.h"
#include "threads.h"
#include "writer.h"

namespace quantformer {
namespace {

// Rows of one task, where there are fewer panels than threads could share.
constexpr int64_t kTaskRows = 192;

// Bits of a weight up to which it lies in the order of the kernels too. More would take more memory than the time that it saves
// is worth; one of 3 bits takes 4.
constexpr int kMostOrderedBits = 4;

// Rows that are made together, before they become codes.
constexpr int64_t kMadeRows = 4;

void quantize_rows(const Codes& job, int64_t begin, int64_t end) {
  const InstructionSet& set = current();
  const Levels levels = levels_up_to(job.largest, job.knee);
  const int64_t stride = divide_up(job.channels, 16) * 16;
  thread_local Scratch scratch;
  scratch.reserve(kMadeRows * job.channels * sizeof(float) + (2 * stride + 1) * kBlock);
  auto made = scratch.take<float>(kMadeRows * job.channels);
  const auto quantize = [&](int64_t first, int64_t last, uint8_t* codes, int64_t codes_stride) {
    for (int64_t r = first; r < last; r += kMadeRows) {
      const int64_t rows = std::min(kMadeRows, last - r);
      const float* x = job.x + r * job.channels;
      if (job.gelu) {
        set.gelu(x, rows * job.channels, made);
        x = made;
      } else if (job.norm != nullptr) {
        set.layer_norm(x, rows, job.norm->weight, job.norm->bias, job.norm->epsilon, job.channels, made);
        x = made;
      }
      for (int64_t i = 0; i < rows; ++i, codes += codes_stride) {
        set.quantize(x + i * job.channels, job.offset, job.inverse, levels, job.channels, codes);
      }
    }
  };
  if (job.source == nullptr) {
    quantize(begin, end, job.codes + begin * job.channels, job.channels);
    return;
  }
  auto rows = scratch.take<uint8_t>(stride * kBlock), columns = scratch.take<uint8_t>((stride + 1) * kBlock);
  for (int64_t r = begin; r < end; r += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, end - r);
    quantize(r, r + n, rows, stride);
    set.reorder({rows, stride, job.channels, job.source, job.positions, job.codes + r * job.positions, n, columns});
  }
}

// All rows alike.
int multiply_rows(const Product& job, const Codes* then, int64_t threads, ParallelFor parallel_for) {
  const InstructionSet& set = current();
  const bool in_pairs = job.ordered != nullptr && job.ordered_bits == 0 && job.output_order == order_of(then);
  if (in_pairs && takes_pairs(job, set)) return look_up(job, then, threads, parallel_for);
  const Plan made = plan(job, then, set);
  if (takes_matrices(job, made, set)) return multiply_matrices(job, then, made, threads, parallel_for);
  const int64_t panels = divide_up(places_of(job, then), kPanel);
  if (panels == 0 || job.rows == 0) return 0;
  int64_t parts = std::max<int64_t>(1, std::min(job.rows / kTaskRows, divide_up(kTasksPerThread * threads, panels)));
  if (threads == 1) parts = 1;
  // Words are made of a part's codes: that memory is to stay small.
  if (made.words) parts = std::max(parts, divide_up(job.rows, kTaskRows));
  // Whole tiles in all parts but the last.
  const int64_t part_rows = divide_up(divide_up(job.rows, parts), set.tile_rows) * set.tile_rows;
  return share(panels * parts, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / parts, first = task % parts * part_rows;
      multiply(job, then, made, set, panel, panel + 1, std::min(first, job.rows), std::min(first + part_rows, job.rows));
    }
  });
}

// All rows alike, and then those of the class token over again: what was made of them first is of no use.
int multiply_all(const Product& job, const Codes* then, int64_t threads, ParallelFor parallel_for) {
  if (multiply_rows(job, then, threads, parallel_for) != 0) return -1;
  if (job.first == nullptr || job.rows == 0) return 0;
  for (int64_t token = 0; token < std::min(job.first_rows, job.image_rows); ++token) {
    Product own = *job.first;
    own.x = job.x + token * job.x_stride;
    own.x_stride = job.x_stride * job.image_rows;
    own.y = job.y == nullptr ? nullptr : job.y + token * job.y_stride;
    own.y_stride = job.y_stride * job.image_rows;
    own.rows = job.rows / job.image_rows;
    Codes codes = {};
    if (then != nullptr) {
      codes = then->first == nullptr ? *then : *then->first;
      codes.codes = then->codes + token * then->positions;
      codes.stride = then->positions * job.image_rows;
    }
    if (multiply_rows(own, then == nullptr ? nullptr : &codes, threads, parallel_for) != 0) return -1;
  }
  return 0;
}

int quantize_all(const Codes& job, int64_t threads, ParallelFor parallel_for) {
  return over_rows(job.rows, job.channels, threads, parallel_for, [&](int64_t begin, int64_t end) { quantize_rows(job, begin, end); });
}

}  // namespace
}  // namespace quantformer

int quantformer_quantize(const Codes* job, int64_t threads, ParallelFor parallel_for) {
  using namespace quantformer;
  if (quantize_all(*job, threads, parallel_for) != 0) return -1;
  for (int64_t row = 0; job->first != nullptr && row < job->rows; row += job->image_rows) {
    Codes own = *job->first;
    own.x = job->x + row * job->channels;
    own.codes = job->codes + row * job->positions;
    own.norm = job->norm;
    own.rows = std::min(job->first_rows, job->image_rows);
    if (quantize_all(own, 1, nullptr) != 0) return -1;
  }
  return 0;
}

int quantformer_layer_norm(const Norm* job, int64_t threads, ParallelFor parallel_for) {
  using namespace quantformer;
  return over_rows(job->rows, job->channels, threads, parallel_for, [&](int64_t begin, int64_t end) {
    const LayerNorm& norm = job->norm;
    const int64_t at = begin * job->channels;
    current().layer_norm(job->x + at, end - begin, norm.weight, norm.bias, norm.epsilon, job->channels, job->y + at);
  });
}

int quantformer_multiply(const quantformer::Product* job, int64_t threads, ParallelFor parallel_for) {
  return quantformer_multiply_to_codes(job, nullptr, threads, parallel_for);
}

int quantformer_multiply_to_codes(const quantformer::Product* job, const Codes* then, int64_t threads,
                                  ParallelFor parallel_for) {
  try {
    return quantformer::multiply_all(*job, then, threads, parallel_for);
  } catch (const std::exception&) {
    return -1;
  }
}

int64_t quantformer_plan_order(quantformer::Product* job, const Codes* then) {
  using namespace quantformer;
  if (job->bits > kMostOrderedBits) return 0;
  job->output_order = order_of(then);
  job->ordered_bits = takes_pairs(*job, current()) ? 0 : job->bits <= 2 ? 2 : kMostOrderedBits;
  if (job->ordered_bits == 0) return pairs_bytes(*job, then);
  return divide_up(places_of(*job, then), kPanel) * kPanel * job->positions * job->ordered_bits / 8;
}

int quantformer_order_weights(const quantformer::Product* job, const Codes* then, uint8_t* ordered) {
  try {
    (job->ordered_bits == 0 ? quantformer::order_pairs : quantformer::order_panels)(*job, then, ordered);
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

int64_t quantformer_job_bytes() {
  return kMeaning + sizeof(Codes) + sizeof(Norm) + sizeof(quantformer::Product) + sizeof(Probabilities) + sizeof(Mixed) +
         sizeof(Mlp) + sizeof(AttentionBlock) + sizeof(Block) + sizeof(Blocks) + sizeof(Linear) + sizeof(Tokens) + sizeof(Mean) +
         sizeof(Step) + sizeof(Model);
}
