// Attention of some queries of one head, from floating point, or codes of it, to floating point.
#pragma once

#include "threads.h"

namespace quantformer {

// `probabilities`: `(queries, keys)`, of these queries alone.
void probabilities_of_queries(const Probabilities& job, const Queries& queries, float* probabilities);

// To its place in the output of `job`, whose own `probabilities` are not looked at.
void mix_queries(const Mixed& job, const Queries& queries, const float* probabilities);

}  // namespace quantformer
