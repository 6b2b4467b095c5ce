// Work that is shared out among torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>

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

}  // namespace quantformer
