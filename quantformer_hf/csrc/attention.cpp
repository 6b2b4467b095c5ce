#include "attention.h"

#include <algorithm>

#include "scratch.h"
#include "threads.h"

namespace quantformer {
namespace {

int64_t padded(int64_t n) { return divide_up(n, 4) * 4; }

// One operand of an attention product as codes, `(rows, positions)`, padded with zeros.
void quantize_operand(const float* x, int64_t stride, int64_t rows, int64_t columns, int32_t largest,
                      const float* offset, const float* inverse, uint8_t* codes, int64_t positions) {
  for (int64_t r = 0; r < rows; ++r) {
    current().quantize(x + r * stride, offset, inverse, static_cast<float>(largest), columns, codes + r * positions);
    std::fill_n(codes + r * positions + columns, positions - columns, 0);
  }
}

int32_t sum(const uint8_t* codes, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += codes[i];
  return total;
}

// x times codes of one head, both unsigned and of `largest`: one group, whose scale the output's own takes in.
Product head_product(const uint8_t* x, int64_t rows, const uint8_t* codes, int64_t outputs, int64_t columns,
                     int64_t positions, int32_t largest, const int32_t* source, const int64_t* end, const float* one) {
  Product p = {};
  p.x = x;
  p.rows = rows;
  p.x_stride = p.code_stride = p.positions = positions;
  p.largest_x = p.largest_code = largest;
  p.codes = codes;
  p.outputs = outputs;
  p.columns = columns;
  p.bits = 8;
  p.multiplier = 1;
  p.source = source;
  p.group_ends = end;
  p.group_scales = one;
  p.groups = 1;
  return p;
}

void fill_source(int32_t* source, int64_t columns, int64_t positions) {
  for (int64_t k = 0; k < positions; ++k) source[k] = static_cast<int32_t>(std::min(k, columns));
}

}  // namespace

void probabilities_of_head(const Probabilities& job, int64_t b, int64_t h, float* probabilities) {
  const int64_t positions = padded(job.head_size);
  thread_local Scratch scratch;
  scratch.reserve((job.queries + job.keys) * positions + 2 * positions * sizeof(float) +
                  3 * job.keys * sizeof(float) + positions * sizeof(int32_t));
  auto query = scratch.take<uint8_t>(job.queries * positions), key = scratch.take<uint8_t>(job.keys * positions);
  auto offset = scratch.take<float>(positions), inverse = scratch.take<float>(positions);
  auto scale = scratch.take<float>(job.keys), bias = scratch.take<float>(job.keys);
  auto both = scratch.take<float>(job.keys);
  auto source = scratch.take<int32_t>(positions);
  const auto quantized = [&](const float* x, const int64_t* strides, int64_t rows, const Operand& operand,
                             uint8_t* codes) {
    std::fill_n(offset, positions, operand.offset);
    std::fill_n(inverse, positions, operand.inverse);
    quantize_operand(x + b * strides[0] + h * strides[1], strides[2], rows, job.head_size, job.largest, offset,
                     inverse, codes, positions);
  };
  quantized(job.query, job.query_strides, job.queries, job.operands[0], query);
  quantized(job.key, job.key_strides, job.keys, job.operands[1], key);
  // What is the same for all keys of a query is left out: it goes in the softmax.
  const float of_products = job.operands[0].scale * job.operands[1].scale * job.scaling;
  const float of_sums = job.operands[0].offset * job.operands[1].scale * job.scaling;
  for (int64_t j = 0; j < job.keys; ++j) {
    scale[j] = of_products;
    bias[j] = static_cast<float>(sum(key + j * positions, job.head_size)) * of_sums;
  }
  fill_source(source, job.head_size, positions);
  const float one = 1;
  Product p = head_product(query, job.queries, key, job.keys, job.head_size, positions, job.largest, source,
                           &positions, &one);
  p.scale = scale;
  p.bias = bias;
  p.y = probabilities;
  p.y_stride = job.keys;
  multiply(p, plan(p, current()), current(), 0, divide_up(p.outputs, kPanel), 0, p.rows);
  const float* mask = job.mask;
  if (mask != nullptr) mask += b * job.mask_strides[0] + h * job.mask_strides[1];
  const float* hidden = job.hidden;
  if (hidden != nullptr) hidden += b % job.windows * job.queries * job.keys;
  for (int64_t i = 0; i < job.queries; ++i) {
    const float* added = mask == nullptr ? nullptr : mask + i * job.mask_strides[2];
    if (hidden != nullptr) {
      for (int64_t j = 0; j < job.keys; ++j) both[j] = added[j] + hidden[i * job.keys + j];
      added = both;
    }
    current().softmax(p.y + i * job.keys, added, job.keys);
  }
}

void mix_head(const Mixed& job, int64_t b, int64_t h, const float* probabilities) {
  const int64_t positions = padded(job.keys), n = job.head_size;
  thread_local Scratch scratch;
  const int64_t longest = std::max(positions, n);
  scratch.reserve((job.queries + n) * positions + job.keys * n + 2 * longest * sizeof(float) +
                  (2 * n + job.queries) * sizeof(float) + positions * sizeof(int32_t));
  auto weights = scratch.take<uint8_t>(job.queries * positions), value = scratch.take<uint8_t>(n * positions);
  auto straight = scratch.take<uint8_t>(job.keys * n);
  auto offset = scratch.take<float>(longest), inverse = scratch.take<float>(longest);
  auto scale = scratch.take<float>(n), bias = scratch.take<float>(n), of_row = scratch.take<float>(job.queries);
  auto source = scratch.take<int32_t>(positions);

  const Operand &p_operand = job.operands[0], &v_operand = job.operands[1];
  std::fill_n(offset, n, v_operand.offset);
  std::fill_n(inverse, n, v_operand.inverse);
  quantize_operand(job.value + b * job.value_strides[0] + h * job.value_strides[1], job.value_strides[2], job.keys, n,
                   job.largest, offset, inverse, straight, n);
  const float of_products = p_operand.scale * v_operand.scale;
  const float of_columns = p_operand.offset * v_operand.scale, of_rows = p_operand.scale * v_operand.offset;
  const float constant = static_cast<float>(job.keys) * (p_operand.offset * v_operand.offset);
  for (int64_t d = 0; d < n; ++d) {
    uint8_t* column = value + d * positions;
    for (int64_t j = 0; j < job.keys; ++j) column[j] = straight[j * n + d];
    std::fill_n(column + job.keys, positions - job.keys, 0);
    scale[d] = of_products;
    bias[d] = static_cast<float>(sum(column, job.keys)) * of_columns + constant;
  }
  std::fill_n(offset, positions, p_operand.offset);
  std::fill_n(inverse, positions, p_operand.inverse);
  quantize_operand(probabilities, job.keys, job.queries, job.keys, job.largest, offset, inverse, weights, positions);
  for (int64_t i = 0; i < job.queries; ++i) {
    of_row[i] = static_cast<float>(sum(weights + i * positions, job.keys)) * of_rows;
  }
  fill_source(source, job.keys, positions);
  const float one = 1;
  Product p = head_product(weights, job.queries, value, n, job.keys, positions, job.largest, source, &positions, &one);
  p.scale = scale;
  p.bias = bias;
  p.y = job.output + (b * job.queries * job.heads + h) * n;
  p.y_stride = job.heads * n;
  multiply(p, plan(p, current()), current(), 0, divide_up(n, kPanel), 0, p.rows);
  for (int64_t i = 0; i < job.queries; ++i) {
    for (int64_t d = 0; d < n; ++d) p.y[i * p.y_stride + d] = p.y[i * p.y_stride + d] + of_row[i];
  }
}

}  // namespace quantformer

int quantformer_probabilities(const Probabilities* job, int64_t threads, ParallelFor parallel_for) {
  using namespace quantformer;
  return by_head(*job, threads, parallel_for, [&](int64_t b, int64_t h, int64_t place) {
    probabilities_of_head(*job, b, h, job->probabilities + place);
  });
}

int quantformer_mix(const Mixed* job, int64_t threads, ParallelFor parallel_for) {
  using namespace quantformer;
  return by_head(*job, threads, parallel_for, [&](int64_t b, int64_t h, int64_t place) {
    mix_head(*job, b, h, job->probabilities + place);
  });
}
