#include "attention.h"

#include <algorithm>
#include <new>

#include "scratch.h"

namespace quantformer {
namespace {

int64_t padded(int64_t n) { return divide_up(n, 4) * 4; }

// One operand of an attention product: floating point, or where that is null, codes.
struct Rows {
  const float* x;
  const uint8_t* codes;
  int64_t stride, rows, columns;
};

// Tokens `first` to `last` of a head, by the strides of batch, head and token.
Rows rows_of_head(const float* x, const uint8_t* codes, const int64_t* strides, const Queries& tokens, int64_t columns) {
  const int64_t at = tokens.b * strides[0] + tokens.h * strides[1] + tokens.first * strides[2];
  return {x == nullptr ? nullptr : x + at, codes == nullptr ? nullptr : codes + at, strides[2], tokens.count(), columns};
}

// Codes, `(rows, stride)`.
struct OperandCodes {
  const uint8_t* codes;
  int64_t stride;
};

// The codes of an operand: as they lie where they need no padding to `width`, else in `memory`, `(rows, width)`, with zeros
// beyond the columns. `constants` has room for 2 * width.
OperandCodes codes_of(const Rows& from, int32_t largest, const Operand& operand, float* constants, uint8_t* memory,
                      int64_t width) {
  if (from.x == nullptr && from.columns == width) return {from.codes, from.stride};
  float *offset = constants, *inverse = constants + width;
  std::fill_n(offset, width, operand.offset);
  std::fill_n(inverse, width, operand.inverse);
  for (int64_t r = 0; r < from.rows; ++r) {
    uint8_t* row = memory + r * width;
    if (from.x == nullptr) {
      std::copy_n(from.codes + r * from.stride, from.columns, row);
    } else {
      current().quantize(from.x + r * from.stride, offset, inverse, {largest, largest}, from.columns, row);
    }
    std::fill_n(row + from.columns, width - from.columns, 0);
  }
  return {memory, width};
}

// What is taken off the codes of one operand of a product, its middle: they are then signed bytes, and its offset is
// greater by so many scales.
int32_t middle_of(int32_t largest) { return (largest + 1) / 2; }

// x times codes of one head less their middle, both of `largest`: one group, whose scale the output's own takes in.
Product head_product(const OperandCodes& x, int64_t rows, const OperandCodes& codes, int64_t outputs, int64_t columns,
                     int64_t positions, int32_t largest, const int32_t* source, const int64_t* end, const float* one) {
  Product p = {};
  p.x = x.codes;
  p.x_stride = x.stride;
  p.rows = rows;
  p.positions = positions;
  p.largest_x = p.largest_code = largest;
  p.codes = codes.codes;
  p.code_stride = codes.stride;
  p.outputs = outputs;
  p.columns = columns;
  p.bits = 8;
  p.multiplier = 1;
  p.addend = -middle_of(largest);
  p.source = source;
  p.group_ends = end;
  p.group_scales = one;
  p.groups = 1;
  return p;
}

// On this thread, which is one of several at work.
void multiply_here(const Product& p) {
  if (quantformer_multiply(&p, 1, nullptr) != 0) throw std::bad_alloc();
}

// Of the first of these queries, in `(batch, heads, queries, keys)`.
template <typename Job>
int64_t place_of(const Job& job, const Queries& queries) {
  return ((queries.b * job.heads + queries.h) * job.queries + queries.first) * job.keys;
}

void fill_source(int32_t* source, int64_t columns, int64_t positions) {
  for (int64_t k = 0; k < positions; ++k) source[k] = static_cast<int32_t>(std::min(k, columns));
}

}  // namespace

void probabilities_of_queries(const Probabilities& job, const Queries& queries, float* probabilities) {
  const int64_t b = queries.b, h = queries.h, rows = queries.count();
  const int64_t positions = padded(job.head_size);
  thread_local Scratch scratch;
  scratch.reserve((rows + job.keys) * positions + 2 * positions * sizeof(float) +
                  (2 + (job.hidden == nullptr ? 0 : rows)) * job.keys * sizeof(float) + positions * sizeof(int32_t));
  auto query_memory = scratch.take<uint8_t>(rows * positions), key_memory = scratch.take<uint8_t>(job.keys * positions);
  auto constants = scratch.take<float>(2 * positions);
  auto scale = scratch.take<float>(job.keys), bias = scratch.take<float>(job.keys);
  auto both = scratch.take<float>(job.hidden == nullptr ? 0 : rows * job.keys);
  auto source = scratch.take<int32_t>(positions);
  const int64_t n = job.head_size;
  const OperandCodes query = codes_of(rows_of_head(job.query, job.query_codes, job.query_strides, queries, n), job.largest,
                                      job.operands[0], constants, query_memory, positions);
  const OperandCodes key = codes_of(rows_of_head(job.key, job.key_codes, job.key_strides, {b, h, 0, job.keys}, n), job.largest,
                                    job.operands[1], constants, key_memory, positions);
  // What is the same for all keys of a query is left out: it goes in the softmax.
  const float of_products = job.operands[0].scale * job.operands[1].scale * job.scaling;
  const float of_sums = job.operands[0].offset * job.operands[1].scale * job.scaling;
  const int64_t middles = job.head_size * middle_of(job.largest);
  for (int64_t j = 0; j < job.keys; ++j) {
    scale[j] = of_products;
    bias[j] = static_cast<float>(current().sum(key.codes + j * key.stride, n) - middles) * of_sums;
  }
  fill_source(source, job.head_size, positions);
  const float one = 1;
  Product p = head_product(query, rows, key, job.keys, n, positions, job.largest, source, &positions, &one);
  p.scale = scale;
  p.bias = bias;
  p.y = probabilities;
  p.y_stride = job.keys;
  multiply_here(p);
  const float* mask = job.mask;
  if (mask != nullptr) mask += b * job.mask_strides[0] + h * job.mask_strides[1];
  int64_t stride = job.mask_strides[2];
  if (mask != nullptr) mask += queries.first * stride;
  if (job.hidden != nullptr) {
    const float* const hidden = job.hidden + (b % job.windows * job.queries + queries.first) * job.keys;
    for (int64_t i = 0; i < rows; ++i) {
      current().add(mask + i * stride, hidden + i * job.keys, job.keys, both + i * job.keys);
    }
    mask = both;
    stride = job.keys;
  }
  current().softmax(probabilities, rows, mask, stride, job.keys);
}

void mix_queries(const Mixed& job, const Queries& queries, const float* probabilities) {
  const int64_t b = queries.b, h = queries.h, rows = queries.count();
  const int64_t positions = padded(job.keys), n = job.head_size;
  // The value as it lies, token by token: columns of a weight, of whole panels.
  const int64_t value_width = divide_up(n, kPanel) * kPanel, constants_size = 2 * std::max(positions, value_width);
  thread_local Scratch scratch;
  scratch.reserve(rows * positions + job.keys * value_width + (constants_size + 2 * n + rows + job.keys) * sizeof(float) +
                  positions * sizeof(int32_t));
  auto codes = scratch.take<uint8_t>(rows * positions), value_memory = scratch.take<uint8_t>(job.keys * value_width);
  auto constants = scratch.take<float>(constants_size);
  auto scale = scratch.take<float>(n), bias = scratch.take<float>(n), share = scratch.take<float>(rows);
  auto in_units = scratch.take<float>(job.keys);
  auto source = scratch.take<int32_t>(positions);

  const OperandCodes value = codes_of(rows_of_head(job.value, job.value_codes, job.value_strides, {b, h, 0, job.keys}, n),
                                      job.largest, *job.operand, constants, value_memory, value_width);
  std::fill_n(scale, n, job.operand->scale);
  std::fill_n(bias, n, 0.0f);
  float *const zeros = constants, *const ones = zeros + positions;
  std::fill_n(zeros, job.keys, 0.0f);
  std::fill_n(ones, job.keys, 1.0f);
  for (int64_t i = 0; i < rows; ++i) {
    uint8_t* const of_row = codes + i * positions;
    current().in_units_of_largest(probabilities + i * job.keys, job.keys, static_cast<float>(job.largest), in_units);
    current().quantize(in_units, zeros, ones, {job.largest, job.largest}, job.keys, of_row);
    std::fill_n(of_row + job.keys, positions - job.keys, 0);
    share[i] = 1.0f / static_cast<float>(current().sum(of_row, job.keys));
  }
  fill_source(source, job.keys, positions);
  const float one = 1;
  Product p = head_product({codes, positions}, rows, value, n, job.keys, positions, job.largest, source, &positions, &one);
  p.by_column = 1;
  p.scale = scale;
  p.bias = bias;
  p.y = job.output + ((b * job.queries + queries.first) * job.heads + h) * n;
  p.y_stride = job.heads * n;
  multiply_here(p);
  // Shares add up to one, so that the value's offset is the output's.
  const float offset = job.operand->offset + static_cast<float>(middle_of(job.largest)) * job.operand->scale;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < n; ++d) p.y[i * p.y_stride + d] = p.y[i * p.y_stride + d] * share[i] + offset;
  }
}

}  // namespace quantformer

int quantformer_probabilities(const Probabilities* job, int64_t threads, ParallelFor parallel_for) {
  using namespace quantformer;
  return by_queries(*job, threads, parallel_for, [&](const Queries& queries) {
    probabilities_of_queries(*job, queries, job->probabilities + place_of(*job, queries));
  });
}

int quantformer_mix(const Mixed* job, int64_t threads, ParallelFor parallel_for) {
  using namespace quantformer;
  return by_queries(*job, threads, parallel_for, [&](const Queries& queries) {
    mix_queries(*job, queries, job->probabilities + place_of(*job, queries));
  });
}
