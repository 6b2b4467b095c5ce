// Modules of a model in one call, made of the other kernels.
#include <algorithm>
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
  then.largest = then.knee = largest;
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
      project_to(job.value, *mix.operand, mix.keys, value) != 0) {
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

// Images of a block, and windows of each, that are worked on together. Without windows an image counts as one.
struct Extent {
  int64_t images, windows;

  int64_t count() const { return images * windows; }
};

Extent extent_of(const Block& job) {
  const int64_t windows = job.order == nullptr ? 1 : job.image_tokens / job.attention.mix.keys;
  return {job.attention.mix.batch / windows, windows};
}

// How much longer than an even share the threads' parts may take, in halves: waiting for each other costs a fourth and more.
constexpr int64_t kMostUnevenHalves = 3;

int64_t count_parts(const Extent& all, const Extent& part) {
  return divide_up(all.images, part.images) * divide_up(all.windows, part.windows);
}

// Those of each part: some images, or some windows of one; all, where the threads would have too uneven shares.
Extent part_of(const Block& job, int64_t threads) {
  const Extent all = extent_of(job);
  const int64_t parts = parts_of(all.count() * job.attention.mix.keys, threads), images = std::max<int64_t>(1, all.images);
  Extent part = {divide_up(images, parts), all.windows};
  if (parts > images) part = {1, divide_up(all.windows, divide_up(parts, images))};
  const int64_t longest = divide_up(count_parts(all, part), threads) * part.count();
  return 2 * longest * threads > kMostUnevenHalves * all.count() ? Extent{images, all.windows} : part;
}

// The block of part `i`.
Block block_of(const Block& job, const Extent& part, int64_t i) {
  const Extent all = extent_of(job);
  const int64_t of_image = divide_up(all.windows, part.windows);
  const int64_t image = i / of_image * part.images, window = i % of_image * part.windows;
  const Extent own = {std::min(part.images, all.images - image), std::min(part.windows, all.windows - window)};
  Block block = job;
  Probabilities& scores = block.attention.scores;
  Mixed& mix = block.attention.mix;
  const int64_t rows = job.order == nullptr ? mix.keys : job.image_rows, width = job.before.channels;
  const int64_t rows_put_out = job.order == nullptr ? mix.queries : job.image_rows;
  block.x += image * rows * width;
  block.mlp.second.y += image * rows_put_out * width;
  if (job.order != nullptr) block.order += window * mix.keys;
  block.image_tokens = own.windows * mix.keys;
  scores.batch = mix.batch = own.count();
  if (scores.mask != nullptr) scores.mask += (image * all.windows + window) * scores.mask_strides[0];
  if (scores.hidden != nullptr) scores.hidden += window * mix.queries * mix.keys;
  return block;
}

// Where a row that is put out is in what attention puts out and reads, and in `y`.
struct Place {
  int64_t attended, x, y;
};

// The row of `job.x` of a token that attention reads, -1 for padding.
int64_t row_of(const Block& job, int64_t token) {
  const int64_t row = job.order[token % job.image_tokens];
  return row < 0 ? -1 : row + token / job.image_tokens * job.image_rows;
}

std::vector<Place> places_of(const Block& job) {
  const Mixed& mix = job.attention.mix;
  std::vector<Place> places;
  places.reserve(mix.batch * mix.queries);
  for (int64_t i = 0; i < mix.batch * mix.queries; ++i) {
    if (job.order == nullptr) {
      places.push_back({i, i / mix.queries * mix.keys + i % mix.queries, i});
    } else if (const int64_t row = row_of(job, i); row >= 0) {
      places.push_back({i, i, row});
    }
  }
  return places;
}

// Rows of `job.x` in the order in which attention reads them.
int gather(const Block& job, int64_t threads, ParallelFor parallel_for, float* x) {
  const int64_t width = job.before.channels, tokens = job.attention.mix.batch * job.attention.mix.keys;
  return each_row(tokens, width, threads, parallel_for, [&](int64_t token) {
    const int64_t row = row_of(job, token);
    if (row < 0) {
      std::fill_n(x + token * width, width, 0.0f);
    } else {
      std::copy_n(job.x + row * width, width, x + token * width);
    }
  });
}

// Padding is zero after the norm.
int put_padding(const Block& job, uint8_t* codes) {
  const int64_t positions = job.before.positions;
  const std::vector<float> zeros(job.before.channels);
  std::vector<uint8_t> padding(positions);
  Codes of_padding = job.before;
  of_padding.x = zeros.data();
  of_padding.rows = 1;
  of_padding.codes = padding.data();
  if (quantformer_quantize(&of_padding, 1, nullptr) != 0) return -1;
  for (int64_t token = 0; token < job.attention.mix.batch * job.attention.mix.keys; ++token) {
    if (row_of(job, token) < 0) std::copy_n(padding.data(), positions, codes + token * positions);
  }
  return 0;
}

int run_part(const Block& job, int64_t threads, ParallelFor parallel_for) {
  AttentionBlock attention = job.attention;
  const int64_t queries = attention.mix.queries, image_rows = attention.mix.keys;
  const bool all = queries == image_rows;
  Codes before = job.before, after = all ? job.after : of_first(job.after);
  Mlp mlp = job.mlp;
  if (!all) mlp = {of_first(mlp.first), of_first(mlp.between), of_first(mlp.second)};
  const std::vector<Place> places = places_of(job);
  const int64_t width = before.channels, tokens = attention.mix.batch * image_rows, kept = places.size();
  const auto codes = Pool::take<uint8_t>(std::max(tokens * before.positions, kept * after.positions));
  const auto gathered = Pool::take<float>(job.order == nullptr ? 0 : tokens * width);
  const auto made = Pool::take<float>((all ? tokens : kept) * width), hidden = Pool::take<float>(kept * width);

  attention.query.rows = before.rows = tokens;
  before.x = job.x;
  if (job.order != nullptr) {
    if (gather(job, threads, parallel_for, gathered.get()) != 0) return -1;
    before.x = gathered.get();
  }
  before.norm = &job.norm_before;
  before.codes = codes.get();
  before.image_rows = after.image_rows = mlp.first.image_rows = image_rows;
  if (quantformer_quantize(&before, threads, parallel_for) != 0) return -1;
  if (job.order != nullptr && kept < tokens && put_padding(job, codes.get()) != 0) return -1;
  attention.query.x = codes.get();
  attention.output.y = made.get();
  if (run_attention_block(attention, threads, parallel_for) != 0) return -1;
  const auto add_attended = [&](int64_t row) {
    const Place& at = places[row];
    current().add(made.get() + at.attended * width, before.x + at.x * width, width, hidden.get() + row * width);
  };
  if (each_row(kept, width, threads, parallel_for, add_attended) != 0) return -1;

  after.norm = &job.norm_after;
  after.x = hidden.get();
  after.codes = codes.get();
  mlp.first.x = codes.get();
  after.rows = mlp.first.rows = kept;
  mlp.second.y = made.get();
  if (quantformer_quantize(&after, threads, parallel_for) != 0) return -1;
  if (run_mlp(mlp, threads, parallel_for) != 0) return -1;
  float* const y = job.mlp.second.y;
  return each_row(kept, width, threads, parallel_for, [&](int64_t row) {
    current().add(made.get() + row * width, hidden.get() + row * width, width, y + places[row].y * width);
  });
}

int run_block(const Block& job, int64_t threads, ParallelFor parallel_for) {
  const Extent part = part_of(job, threads);
  const int64_t parts = count_parts(extent_of(job), part);
  return over_parts(parts, threads, parallel_for, [&](int64_t i, int64_t threads, ParallelFor parallel_for) {
    return run_part(block_of(job, part, i), threads, parallel_for);
  });
}

// In place but for the first block, and a last one that puts out fewer rows.
int run_blocks(const Blocks& job, int64_t threads, ParallelFor parallel_for) {
  const Mixed& last = job.blocks[job.count - 1]->attention.mix;
  const bool all = last.queries == last.keys;
  const auto between = Pool::take<float>(all ? 0 : last.batch * last.keys * job.blocks[0]->before.channels);
  float* const y = all ? job.y : between.get();
  for (int64_t i = 0; i < job.count; ++i) {
    Block block = *job.blocks[i];
    block.x = i == 0 ? job.x : y;
    block.mlp.second.y = i + 1 == job.count ? job.y : y;
    if (run_block(block, threads, parallel_for) != 0) return -1;
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
