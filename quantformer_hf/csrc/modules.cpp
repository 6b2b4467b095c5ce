// Modules of a model in one call, made of the other kernels.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "scratch.h"
#include "threads.h"

namespace quantformer {
namespace {

int run_mlp(const Mlp& job, int64_t threads, ParallelFor parallel_for) {
  Product second = job.second;
  Codes between = job.between;
  const auto codes = Pool::take<uint8_t>(job.first.rows * between.positions);
  between.codes = codes.get();
  second.x = codes.get();
  second.rows = job.first.rows;
  between.image_rows = second.image_rows = job.first.image_rows;
  if (quantformer_multiply_to_codes(&job.first, &between, threads, parallel_for) != 0) return -1;
  return quantformer_multiply(&second, threads, parallel_for);
}

// Where only the first rows of each image are worked on: as these are.
template <typename Job>
Job of_first(const Job& job) {
  Job own = job.first == nullptr ? job : *job.first;
  own.first = nullptr;
  return own;
}

// One operand of attention, as codes in the order of its channels: of the first `kept` rows of each image.
int project(const AttentionBlock& job, Product linear, const Operand& operand, int32_t largest, int64_t kept,
            uint8_t* codes, int64_t threads, ParallelFor parallel_for) {
  const int64_t width = linear.outputs, image_rows = job.mix.keys;
  const std::vector<float> offset(width, operand.offset), inverse(width, operand.inverse);
  Codes then = {};
  then.channels = then.positions = width;
  then.offset = offset.data();
  then.inverse = inverse.data();
  then.largest = largest;
  then.codes = codes;
  linear.x = job.query.x;
  linear.rows = job.query.rows;
  linear.image_rows = image_rows;
  if (kept == image_rows) return quantformer_multiply_to_codes(&linear, &then, threads, parallel_for);
  then.stride = kept * width;
  for (int64_t row = 0; row < kept; ++row) {
    Product one = of_first(linear);
    one.x = linear.x + row * linear.x_stride;
    one.x_stride = image_rows * linear.x_stride;
    one.rows = job.mix.batch;
    then.codes = codes + row * width;
    if (quantformer_multiply_to_codes(&one, &then, threads, parallel_for) != 0) return -1;
  }
  return 0;
}

int run_attention_block(const AttentionBlock& job, int64_t threads, ParallelFor parallel_for) {
  Probabilities scores = job.scores;
  Mixed mix = job.mix;
  const bool all = mix.queries == mix.keys;
  Product output = all ? job.output : of_first(job.output);
  Codes between = all ? job.between : of_first(job.between);
  const int64_t rows = job.query.rows, kept = mix.batch * mix.queries, width = mix.heads * mix.head_size;
  const auto operands = Pool::take<uint8_t>(3 * rows * width);
  const auto mixed = Pool::take<float>(kept * width);
  const auto codes = Pool::take<uint8_t>(kept * between.positions);
  uint8_t *const query = operands.get(), *const key = query + rows * width, *const value = key + rows * width;
  const auto project_to = [&](const Product& linear, const Operand& operand, int64_t kept, uint8_t* codes) {
    return project(job, linear, operand, mix.largest, kept, codes, threads, parallel_for);
  };
  if (project_to(job.query, scores.operands[0], mix.queries, query) != 0 ||
      project_to(job.key, scores.operands[1], mix.keys, key) != 0 ||
      project_to(job.value, mix.operands[1], mix.keys, value) != 0) {
    return -1;
  }
  scores.query_codes = query;
  scores.key_codes = key;
  mix.value_codes = value;
  const int64_t strides[3] = {mix.keys * width, mix.head_size, width};
  for (auto of : {scores.query_strides, scores.key_strides, mix.value_strides}) std::copy_n(strides, 3, of);
  scores.query_strides[0] = mix.queries * width;
  mix.output = mixed.get();
  const auto attend = [&](const Queries& queries) {
    thread_local Scratch scratch;
    scratch.reserve(queries.count() * mix.keys * sizeof(float));
    auto probabilities = scratch.take<float>(queries.count() * mix.keys);
    probabilities_of_queries(scores, queries, probabilities);
    mix_queries(mix, queries, probabilities);
  };
  if (by_queries(mix, threads, parallel_for, attend) != 0) return -1;
  between.x = mix.output;
  between.rows = output.rows = kept;
  between.image_rows = output.image_rows = mix.queries;
  between.codes = codes.get();
  output.x = codes.get();
  output.y = job.output.y;
  if (quantformer_quantize(&between, threads, parallel_for) != 0) return -1;
  return quantformer_multiply(&output, threads, parallel_for);
}

// `work(row)` for each of `rows` rows of `channels`.
template <typename Work>
int each_row(int64_t rows, int64_t channels, int64_t threads, ParallelFor parallel_for, const Work& work) {
  return over_rows(rows, channels, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
  });
}

// The row of `job.x` of a token that attention reads, -1 for padding.
int64_t row_of(const Block& job, int64_t token) {
  if (job.order == nullptr) return token;
  const int64_t row = job.order[token % job.image_tokens];
  return row < 0 ? -1 : row + token / job.image_tokens * job.image_rows;
}

// Codes of tokens in the order in which attention reads them, from those of rows.
int gather(const Block& job, const uint8_t* codes, int64_t threads, ParallelFor parallel_for, uint8_t* tokens) {
  const int64_t positions = job.before.positions;
  const auto zeros = std::make_unique<float[]>(job.before.channels);
  const auto padding = Pool::take<uint8_t>(positions);
  Codes of_padding = job.before;
  of_padding.x = zeros.get();
  of_padding.rows = 1;
  of_padding.codes = padding.get();
  if (quantformer_quantize(&of_padding, 1, nullptr) != 0) return -1;
  return each_row(job.attention.query.rows, positions, threads, parallel_for, [&](int64_t token) {
    const int64_t row = row_of(job, token);
    std::copy_n(row < 0 ? padding.get() : codes + row * positions, positions, tokens + token * positions);
  });
}

int run_block(const Block& job, int64_t threads, ParallelFor parallel_for) {
  AttentionBlock attention = job.attention;
  const int64_t queries = attention.mix.queries, image_rows = attention.mix.keys;
  const bool all = queries == image_rows;
  Codes before = job.before, after = all ? job.after : of_first(job.after);
  Mlp mlp = job.mlp;
  if (!all) mlp = {of_first(mlp.first), of_first(mlp.between), of_first(mlp.second)};
  const int64_t width = before.channels;
  // Of `before`, of attention, and of what comes after it.
  const int64_t rows = before.rows, tokens = attention.query.rows, kept = all ? rows : attention.mix.batch * queries;
  const auto codes = Pool::take<uint8_t>(std::max(rows * before.positions, kept * after.positions));
  const auto ordered = Pool::take<uint8_t>(job.order == nullptr ? 0 : tokens * before.positions);
  const auto attended = Pool::take<float>((all ? tokens : kept) * width), hidden = Pool::take<float>(kept * width);
  float* const y = job.mlp.second.y;
  mlp.second.y = y;

  before.x = job.x;
  before.norm = &job.norm_before;
  before.codes = codes.get();
  before.image_rows = after.image_rows = mlp.first.image_rows = image_rows;
  if (quantformer_quantize(&before, threads, parallel_for) != 0) return -1;
  if (job.order != nullptr && gather(job, codes.get(), threads, parallel_for, ordered.get()) != 0) return -1;
  attention.query.x = job.order == nullptr ? codes.get() : ordered.get();
  attention.output.y = attended.get();
  if (run_attention_block(attention, threads, parallel_for) != 0) return -1;
  // Each row is one token's.
  const auto add_attended = [&](int64_t token) {
    const int64_t row = row_of(job, token);
    if (row >= 0) current().add(attended.get() + token * width, job.x + row * width, width, hidden.get() + row * width);
  };
  const auto add_to_kept = [&](int64_t row) {
    const float* x = job.x + (row / queries * image_rows + row % queries) * width;
    current().add(attended.get() + row * width, x, width, hidden.get() + row * width);
  };
  const int added = all ? each_row(tokens, width, threads, parallel_for, add_attended)
                        : each_row(kept, width, threads, parallel_for, add_to_kept);
  if (added != 0) return -1;

  after.norm = &job.norm_after;
  after.x = hidden.get();
  after.codes = codes.get();
  mlp.first.x = codes.get();
  after.rows = mlp.first.rows = kept;
  if (quantformer_quantize(&after, threads, parallel_for) != 0) return -1;
  if (run_mlp(mlp, threads, parallel_for) != 0) return -1;
  return each_row(kept, width, threads, parallel_for, [&](int64_t row) {
    current().add(y + row * width, hidden.get() + row * width, width, y + row * width);
  });
}

int run_blocks(const Blocks& job, int64_t threads, ParallelFor parallel_for) {
  const float* x = job.x;
  Pool::Buffer<float> between[2];
  for (int64_t i = 0; i < job.count; ++i) {
    Block block = *job.blocks[i];
    block.x = x;
    block.attention.query.rows = block.attention.mix.batch * block.attention.mix.keys;
    if (i + 1 == job.count) {
      block.mlp.second.y = job.y;
    } else {
      between[i % 2] = Pool::take<float>(block.before.rows * block.before.channels);
      block.mlp.second.y = between[i % 2].get();
    }
    if (run_block(block, threads, parallel_for) != 0) return -1;
    x = block.mlp.second.y;
  }
  return 0;
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

int quantformer_blocks(const Blocks* job, int64_t threads, ParallelFor parallel_for) {
  return quantformer::guarded(quantformer::run_blocks, job, threads, parallel_for);
}
