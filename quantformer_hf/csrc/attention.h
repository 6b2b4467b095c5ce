// Attention of some queries of one head, from floating point, or codes of it, to floating point.
#pragma once

#include "instruction_set.h"
#include "threads.h"

namespace quantformer {

// From one row of probabilities to the next where a kernel may write, and read, beyond the last key: whole vectors.
inline int64_t roomy_stride(int64_t keys) { return divide_up(keys, kPanel) * kPanel; }

// `probabilities`: `(queries, stride)`, of these queries alone; what lies beyond the keys has no meaning.
void probabilities_of_queries(const Probabilities& job, const Queries& queries, float* probabilities, int64_t stride);

// To its place in the output of `job`, whose own `probabilities` are not looked at.
void mix_queries(const Mixed& job, const Queries& queries, const float* probabilities, int64_t stride);

}  // namespace quantformer
