// Work that is shared out among torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>

#include "kernels.h"

namespace quantformer {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shares of the work for each thread. Torch would give each thread one, and all would wait for the one that is held up.
constexpr int64_t kTasksPerThread = 4;

// `work(begin, end)` over 0 to `count` by torch's threads, each of which takes the next share when it has done one. An
// exception there must not cross the C boundary.
template <typename Work>
int share(int64_t count, int64_t threads, ParallelFor parallel_for, const Work& work) {
  struct Context {
    const Work& work;
    const int64_t count, step;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
  } context{work, count, threads > 1 ? std::max<int64_t>(1, count / (kTasksPerThread * threads)) : count};
  auto call = [](int64_t, int64_t, void* pointer) {
    auto& context = *static_cast<Context*>(pointer);
    try {
      for (int64_t begin; (begin = context.next.fetch_add(context.step)) < context.count;) {
        context.work(begin, std::min(begin + context.step, context.count));
      }
    } catch (const std::exception&) {
      context.failed = true;
    }
  };
  if (threads > 1 && count > 1 && parallel_for != nullptr) {
    if (parallel_for(0, std::min(count, threads), 1, call, &context) != 0) return -1;
  } else {
    call(0, count, &context);
  }
  return context.failed ? -1 : 0;
}

// Numbers of one task at least, for it to be worth a thread.
constexpr int64_t kTaskNumbers = 8192;

// `work(begin, end)` over rows of so many numbers.
template <typename Work>
int over_rows(int64_t count, int64_t channels, int64_t threads, ParallelFor parallel_for, const Work& work) {
  const int64_t least = divide_up(kTaskNumbers, std::max<int64_t>(1, channels));
  const int64_t rows = divide_up(std::max(least, divide_up(count, kTasksPerThread * threads)), kBlock) * kBlock;
  return share(divide_up(count, rows), threads, parallel_for, [&](int64_t begin, int64_t end) {
    work(begin * rows, std::min(end * rows, count));
  });
}

// Rows that are worked on together, about: what one step leaves for the next stays in cache, and weights are unpacked for so
// many at a time. Several threads take half as many, for two parts each, or fewer still, down to the least.
constexpr int64_t kPartRows = 512, kLeastPartRows = 192;

// Parts of so many rows, as many for each thread. One, where there are too few for all.
inline int64_t parts_of(int64_t rows, int64_t threads) {
  if (threads == 1) return std::max<int64_t>(1, rows / kPartRows);
  const int64_t parts = std::max(2 * rows / kPartRows, std::min(rows / kLeastPartRows, 2 * threads));
  return std::max<int64_t>(1, parts / threads * threads);
}

// `work(part, threads, parallel_for)`, which returns 0 or -1, for each part: each thread does some, without waiting for the
// others, but all do the only one, and wait for each other after each of its steps.
template <typename Work>
int over_parts(int64_t parts, int64_t threads, ParallelFor parallel_for, const Work& work) {
  if (parts == 1) return work(0, threads, parallel_for);
  return share(parts, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      if (work(part, 1, nullptr) != 0) throw std::bad_alloc();
    }
  });
}

// Queries `first` to `last` of head `h` of image `b`.
struct Queries {
  int64_t b, h, first, last;

  int64_t count() const { return last - first; }
};

// Queries of one task at least: each task unpacks the keys and values of its head.
constexpr int64_t kTaskQueries = 64;

// `work(queries)` over all heads of all images, a part of a head at a time where there are few of these for the threads.
template <typename Job, typename Work>
int by_queries(const Job& job, int64_t threads, ParallelFor parallel_for, const Work& work) {
  const int64_t heads = job.batch * job.heads, most = std::max<int64_t>(1, job.queries / kTaskQueries);
  const int64_t parts = threads == 1 || heads == 0 ? 1 : std::min(most, divide_up(kTasksPerThread * threads, heads));
  const int64_t queries = divide_up(job.queries, parts);
  return share(heads * parts, threads, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts, first = std::min(i % parts * queries, job.queries);
      work(Queries{head / job.heads, head % job.heads, first, std::min(first + queries, job.queries)});
    }
  });
}

}  // namespace quantformer
