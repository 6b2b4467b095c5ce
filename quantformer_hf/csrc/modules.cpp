// Modules of a model in one call, made of the other kernels.
#include <algorithm>
#include <memory>
#include <new>

#include "attention.h"
#include "scratch.h"
#include "threads.h"

namespace quantformer {
namespace {

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

// y = a + b, `(rows, channels)`.
struct Sum {
  const float *a, *b;
  int64_t rows, channels;
  float* y;
};

int add(const Sum& sum, int64_t threads, ParallelFor parallel_for) {
  return by_rows(sum, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * sum.channels; i < end * sum.channels; ++i) sum.y[i] = sum.a[i] + sum.b[i];
  });
}

int run_block(const Block& job, int64_t threads, ParallelFor parallel_for) {
  Codes before = job.before, after = job.after;
  AttentionBlock attention = job.attention;
  Mlp mlp = job.mlp;
  const int64_t rows = before.rows, width = before.channels;
  const auto codes = buffer<uint8_t>(rows * std::max(before.positions, after.positions));
  const auto hidden = buffer<float>(rows * width);
  float* const y = mlp.second.y;

  before.norm = &job.norm_before;
  before.codes = codes.get();
  attention.query.x = codes.get();
  attention.query.rows = rows;
  attention.output.y = hidden.get();
  if (quantformer_quantize(&before, threads, parallel_for) != 0) return -1;
  if (run_attention_block(attention, threads, parallel_for) != 0) return -1;
  if (add({hidden.get(), before.x, rows, width, hidden.get()}, threads, parallel_for) != 0) return -1;

  after.norm = &job.norm_after;
  after.x = hidden.get();
  after.rows = rows;
  after.codes = codes.get();
  mlp.first.x = codes.get();
  mlp.first.rows = rows;
  if (quantformer_quantize(&after, threads, parallel_for) != 0) return -1;
  if (run_mlp(mlp, threads, parallel_for) != 0) return -1;
  return add({y, hidden.get(), rows, width, y}, threads, parallel_for);
}

// What runs out of memory there must not cross the C boundary.
template <typename Job>
int guarded(int (*run)(const Job&, int64_t, ParallelFor), const Job* job, int64_t threads, ParallelFor parallel_for) {
  try {
    return run(*job, threads, parallel_for);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

}  // namespace
}  // namespace quantformer

int quantformer_mlp(const Mlp* job, int64_t threads, ParallelFor parallel_for) {
  return quantformer::guarded(quantformer::run_mlp, job, threads, parallel_for);
}

int quantformer_attention_block(const AttentionBlock* job, int64_t threads, ParallelFor parallel_for) {
  return quantformer::guarded(quantformer::run_attention_block, job, threads, parallel_for);
}

int quantformer_block(const Block* job, int64_t threads, ParallelFor parallel_for) {
  return quantformer::guarded(quantformer::run_block, job, threads, parallel_for);
}
