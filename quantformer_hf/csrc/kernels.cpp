#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>

#include "scratch.h"

namespace quantformer {
namespace {

// Rows of one task, where there are fewer panels than threads could share.
constexpr int64_t kTaskRows = 192;

// Tasks for each thread, so that one that is held up does not hold up the others.
constexpr int64_t kTasksPerThread = 4;

// `work(begin, end)` over 0 to `count` by torch's threads. An exception there must not cross the C boundary.
template <typename Work>
int share(int64_t count, int64_t threads, ParallelFor parallel_for, const Work& work) {
  struct Context {
    const Work& work;
    std::atomic<bool> failed{false};
  } context{work};
  auto call = [](int64_t begin, int64_t end, void* pointer) {
    auto& context = *static_cast<Context*>(pointer);
    try {
      context.work(begin, end);
    } catch (const std::exception&) {
      context.failed = true;
    }
  };
  if (threads > 1 && count > 1 && parallel_for != nullptr) {
    if (parallel_for(0, count, 1, call, &context) != 0) return -1;
  } else {
    call(0, count, &context);
  }
  return context.failed ? -1 : 0;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t padded(int64_t n) { return divide_up(n, 4) * 4; }

void quantize_rows(const Codes& job, int64_t begin, int64_t end) {
  const InstructionSet& set = current();
  const auto largest = static_cast<float>(job.largest);
  const int64_t stride = divide_up(job.channels, 16) * 16;
  thread_local Scratch scratch;
  scratch.reserve(job.channels * sizeof(float) + (2 * stride + 1) * kBlock);
  auto made = scratch.take<float>(job.channels);
  const auto quantize = [&](int64_t r, uint8_t* codes) {
    const float* x = job.x + r * job.channels;
    if (job.gelu) {
      set.gelu(x, job.channels, made);
      x = made;
    } else if (job.norm != nullptr) {
      set.layer_norm(x, job.norm->weight, job.norm->bias, job.norm->epsilon, job.channels, made);
      x = made;
    }
    set.quantize(x, job.offset, job.inverse, largest, job.channels, codes);
  };
  if (job.source == nullptr) {
    for (int64_t r = begin; r < end; ++r) quantize(r, job.codes + r * job.channels);
    return;
  }
  auto rows = scratch.take<uint8_t>(stride * kBlock), columns = scratch.take<uint8_t>((stride + 1) * kBlock);
  for (int64_t r = begin; r < end; r += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, end - r);
    for (int64_t i = 0; i < n; ++i) quantize(r + i, rows + i * stride);
    set.reorder({rows, stride, job.channels, job.source, job.positions, job.codes + r * job.positions, n, columns});
  }
}

void multiply_all(const Product& job, int64_t threads, ParallelFor parallel_for, int* status) {
  const InstructionSet& set = current();
  const Plan made = plan(job, set);
  const int64_t panels = divide_up(job.outputs, kPanel);
  if (panels == 0 || job.rows == 0) return;
  int64_t parts = std::max<int64_t>(1, std::min(job.rows / kTaskRows, divide_up(kTasksPerThread * threads, panels)));
  if (threads == 1) parts = 1;
  // Words are made of a part's codes: that memory is to stay small.
  if (made.words) parts = std::max(parts, divide_up(job.rows, kTaskRows));
  // Whole tiles in all parts but the last.
  const int64_t part_rows = divide_up(divide_up(job.rows, parts), set.tile_rows) * set.tile_rows;
  *status = share(panels * parts, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / parts, first = task % parts * part_rows;
      multiply(job, made, set, panel, panel + 1, std::min(first, job.rows), std::min(first + part_rows, job.rows));
    }
  });
}

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

// `probabilities`: `(queries, keys)`, of this head.
void probabilities_of_head(const Probabilities& job, int64_t b, int64_t h, float* probabilities) {
  const int64_t positions = padded(job.head_size);
  thread_local Scratch scratch;
  scratch.reserve((job.queries + job.keys) * positions + 2 * positions * sizeof(float) +
                  2 * job.keys * sizeof(float) + positions * sizeof(int32_t));
  auto query = scratch.take<uint8_t>(job.queries * positions), key = scratch.take<uint8_t>(job.keys * positions);
  auto offset = scratch.take<float>(positions), inverse = scratch.take<float>(positions);
  auto scale = scratch.take<float>(job.keys), bias = scratch.take<float>(job.keys);
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
  for (int64_t i = 0; i < job.queries; ++i) {
    current().softmax(p.y + i * job.keys, mask == nullptr ? nullptr : mask + i * job.mask_strides[2], job.keys);
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

// `work(begin, end)` over the rows.
template <typename Job, typename Work>
int by_rows(const Job& job, int64_t threads, ParallelFor parallel_for, const Work& work) {
  // A task is large enough to be worth a thread.
  const int64_t rows = divide_up(32768, std::max<int64_t>(1, job.channels) * kBlock) * kBlock;
  return share(divide_up(job.rows, rows), threads, parallel_for, [&](int64_t begin, int64_t end) {
    work(begin * rows, std::min(end * rows, job.rows));
  });
}

// `work(batch, head, place of its map among all)`.
template <typename Job, typename Work>
int by_head(const Job& job, int64_t threads, ParallelFor parallel_for, const Work& work) {
  return share(job.batch * job.heads, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i / job.heads, i % job.heads, i * job.queries * job.keys);
  });
}

// Not initialised.
template <typename T>
std::unique_ptr<T[]> buffer(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

int run_mlp(const Mlp& job, int64_t threads, ParallelFor parallel_for) {
  Product first = job.first, second = job.second;
  Codes between = job.between;
  const auto hidden = buffer<float>(first.rows * first.outputs);
  const auto codes = buffer<uint8_t>(first.rows * between.positions);
  first.y = hidden.get();
  between.x = hidden.get();
  between.codes = codes.get();
  second.x = codes.get();
  between.rows = second.rows = first.rows;
  if (quantformer_multiply(&first, threads, parallel_for) != 0) return -1;
  if (quantformer_quantize(&between, threads, parallel_for) != 0) return -1;
  return quantformer_multiply(&second, threads, parallel_for);
}

int run_attention_block(const AttentionBlock& job, int64_t threads, ParallelFor parallel_for) {
  Product output = job.output;
  Probabilities scores = job.scores;
  Mixed mix = job.mix;
  Codes between = job.between;
  const int64_t rows = job.query.rows, width = mix.heads * mix.head_size;
  // Query, key, value, and what is mixed of it.
  const auto operands = buffer<float>(4 * rows * width);
  const auto codes = buffer<uint8_t>(rows * between.positions);
  float* at = operands.get();
  for (const Product* linear : {&job.query, &job.key, &job.value}) {
    Product p = *linear;
    p.x = job.query.x;
    p.rows = rows;
    p.y = at;
    if (quantformer_multiply(&p, threads, parallel_for) != 0) return -1;
    at += rows * width;
  }
  const int64_t strides[3] = {mix.queries * width, mix.head_size, width};
  scores.query = operands.get();
  scores.key = scores.query + rows * width;
  mix.value = scores.key + rows * width;
  std::copy_n(strides, 3, scores.query_strides);
  std::copy_n(strides, 3, scores.key_strides);
  std::copy_n(strides, 3, mix.value_strides);
  mix.output = at;
  const auto attend = [&](int64_t b, int64_t h, int64_t) {
    thread_local Scratch scratch;
    scratch.reserve(mix.queries * mix.keys * sizeof(float));
    auto probabilities = scratch.take<float>(mix.queries * mix.keys);
    probabilities_of_head(scores, b, h, probabilities);
    mix_head(mix, b, h, probabilities);
  };
  if (by_head(mix, threads, parallel_for, attend) != 0) return -1;
  between.x = mix.output;
  between.rows = output.rows = rows;
  between.codes = codes.get();
  output.x = codes.get();
  if (quantformer_quantize(&between, threads, parallel_for) != 0) return -1;
  return quantformer_multiply(&output, threads, parallel_for);
}

}  // namespace
}  // namespace quantformer

int quantformer_quantize(const Codes* job, int64_t threads, ParallelFor parallel_for) {
  using namespace quantformer;
  return by_rows(*job, threads, parallel_for, [&](int64_t begin, int64_t end) { quantize_rows(*job, begin, end); });
}

int quantformer_layer_norm(const Norm* job, int64_t threads, ParallelFor parallel_for) {
  using namespace quantformer;
  return by_rows(*job, threads, parallel_for, [&](int64_t begin, int64_t end) {
    const LayerNorm& norm = job->norm;
    for (int64_t at = begin * job->channels; at < end * job->channels; at += job->channels) {
      current().layer_norm(job->x + at, norm.weight, norm.bias, norm.epsilon, job->channels, job->y + at);
    }
  });
}

int quantformer_multiply(const quantformer::Product* job, int64_t threads, ParallelFor parallel_for) {
  try {
    int status = 0;
    quantformer::multiply_all(*job, threads, parallel_for, &status);
    return status;
  } catch (const std::exception&) {
    return -1;
  }
}

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

int quantformer_mlp(const Mlp* job, int64_t threads, ParallelFor parallel_for) {
  try {
    return quantformer::run_mlp(*job, threads, parallel_for);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

int quantformer_attention_block(const AttentionBlock* job, int64_t threads, ParallelFor parallel_for) {
  try {
    return quantformer::run_attention_block(*job, threads, parallel_for);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

int64_t quantformer_job_bytes() {
  return sizeof(Codes) + sizeof(Norm) + sizeof(quantformer::Product) + sizeof(Probabilities) + sizeof(Mixed) + sizeof(Mlp) +
         sizeof(AttentionBlock);
}
