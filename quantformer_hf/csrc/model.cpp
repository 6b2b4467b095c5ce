// A whole model in one call, from pixels to logits.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <utility>

#include "instruction_set.h"
#include "kernels.h"
#include "scratch.h"
#include "threads.h"

namespace quantformer {
namespace {

// Rows `first` to `last`.
int run_rows(const Linear& job, int64_t first, int64_t last, const float* x, float* y, int64_t threads,
             ParallelFor parallel_for) {
  const Runs& runs = job.runs;
  const int64_t rows = last - first;
  Codes codes = job.codes;
  Product product = job.product;
  const auto gathered = Pool::take<float>(runs.starts == nullptr ? 0 : rows * codes.channels);
  const auto made = Pool::take<uint8_t>(rows * codes.positions);
  codes.x = x + first * codes.channels;
  if (runs.starts != nullptr) {
    const auto gather = [&](int64_t begin, int64_t end) {
      float* to = gathered.get() + begin * codes.channels;
      for (int64_t row = first + begin; row < first + end; ++row) {
        const float* const image = x + row / runs.rows * runs.image_size;
        const int32_t* const starts = runs.starts + row % runs.rows * runs.count;
        for (int64_t run = 0; run < runs.count; ++run) to = std::copy_n(image + starts[run], runs.length, to);
      }
    };
    if (over_rows(rows, codes.channels, threads, parallel_for, gather) != 0) return -1;
    codes.x = gathered.get();
  }
  codes.norm = job.norm;
  codes.codes = made.get();
  product.x = made.get();
  codes.rows = product.rows = rows;
  product.y = y + first * product.y_stride;
  if (quantformer_quantize(&codes, threads, parallel_for) != 0) return -1;
  return quantformer_multiply(&product, threads, parallel_for);
}

int run_linear(const Linear& job, const float* x, float* y, int64_t threads, ParallelFor parallel_for) {
  const int64_t rows = job.codes.rows, parts = parts_of(rows, threads), step = divide_up(rows, parts);
  return over_parts(parts, threads, parallel_for, [&](int64_t part, int64_t threads, ParallelFor parallel_for) {
    const int64_t first = std::min(part * step, rows);
    return run_rows(job, first, std::min(first + step, rows), x, y, threads, parallel_for);
  });
}

int run_tokens(const Tokens& job, const float* x, float* y, int64_t threads, ParallelFor parallel_for) {
  const int64_t all = job.leading + job.rows, width = job.channels;
  return over_rows(job.batch * all, width, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = row % all, given = row / all * job.rows + token - job.leading;
      const float* const from = token < job.leading ? job.lead[token] : x + given * width;
      current().add(from, job.positions + token * width, width, y + row * width);
    }
  });
}

int run_norm(const Norm& job, const float* x, float* y, int64_t threads, ParallelFor parallel_for) {
  Norm own = job;
  own.x = x;
  own.y = y;
  return quantformer_layer_norm(&own, threads, parallel_for);
}

// As `sum_of_lanes` of pointwise.h, of each channel.
int run_mean(const Mean& job, const float* x, float* y) {
  constexpr int64_t kSums = 8;
  const int64_t width = job.channels;
  const float share = static_cast<float>(1.0 / static_cast<double>(job.rows));
  const auto sums = Pool::take<float>(kSums * width);
  for (int64_t image = 0; image < job.batch; ++image, y += width) {
    std::fill_n(sums.get(), kSums * width, 0.0f);
    for (int64_t row = 0; row < job.rows; ++row, x += width) {
      float* const sum = sums.get() + row % kSums * width;
      current().add(sum, x, width, sum);
    }
    for (int64_t half = kSums / 2; half > 0; half /= 2) {
      current().add(sums.get(), sums.get() + half * width, half * width, sums.get());
    }
    for (int64_t i = 0; i < width; ++i) y[i] = sums[i] * share;
  }
  return 0;
}

int run_step(const Step& step, const float* x, float* y, int64_t threads, ParallelFor parallel_for) {
  switch (step.kind) {
    case kLinearStep:
      return run_linear(*static_cast<const Linear*>(step.job), x, y, threads, parallel_for);
    case kTokensStep:
      return run_tokens(*static_cast<const Tokens*>(step.job), x, y, threads, parallel_for);
    case kNormStep:
      return run_norm(*static_cast<const Norm*>(step.job), x, y, threads, parallel_for);
    case kMeanStep:
      return run_mean(*static_cast<const Mean*>(step.job), x, y);
    default:
      Blocks blocks = *static_cast<const Blocks*>(step.job);
      blocks.x = x;
      blocks.y = y;
      return quantformer_blocks(&blocks, threads, parallel_for);
  }
}

// Whether a step may write where it reads.
bool works_in_place(const Step& step) { return step.kind == kBlocksStep || step.kind == kNormStep; }

// 0 where all numbers are, kNotFinite where one is not: all bits of its exponent are set. Without a branch, for speed.
int look_for_finite(const float* x, int64_t count, int64_t threads, ParallelFor parallel_for) {
  constexpr uint32_t kExponent = 0x7f800000;
  std::atomic<bool> finite{true};
  const int status = over_rows(count, 1, threads, parallel_for, [&](int64_t begin, int64_t end) {
    uint32_t found = 0;
    for (int64_t i = begin; i < end; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      found |= static_cast<uint32_t>((bits & kExponent) == kExponent);
    }
    if (found != 0) finite = false;
  });
  return status != 0 || finite ? status : kNotFinite;
}

int run_model(const Model& job, int64_t threads, ParallelFor parallel_for) {
  const int status = look_for_finite(job.x, job.numbers, threads, parallel_for);
  if (status != 0) return status;
  const float* x = job.x;
  // What the steps so far have made, and what was made before that.
  Pool::Buffer<float> made, before;
  for (int64_t i = 0; i < job.count; ++i) {
    const Step& step = job.steps[i];
    if (i == 0 || step.size != job.steps[i - 1].size || !works_in_place(step)) {
      before = std::move(made);
      if (i + 1 < job.count) made = Pool::take<float>(step.size);
    }
    float* const y = i + 1 < job.count ? made.get() : job.y;
    if (run_step(step, x, y, threads, parallel_for) != 0) return -1;
    x = y;
  }
  return 0;
}

}  // namespace
}  // namespace quantformer

int quantformer_model(const Model* job, int64_t threads, ParallelFor parallel_for) {
  try {
    return quantformer::run_model(*job, threads, parallel_for);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
