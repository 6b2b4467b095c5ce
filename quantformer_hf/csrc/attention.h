// Attention of one head, from floating point, or codes of it, to floating point.
#pragma once

#include "kernels.h"

namespace quantformer {

// `probabilities`: `(queries, keys)`, of image `b` and head `h`.
void probabilities_of_head(const Probabilities& job, int64_t b, int64_t h, float* probabilities);

// To its place in the output of `job`, whose own `probabilities` are not looked at.
void mix_head(const Mixed& job, int64_t b, int64_t h, const float* probabilities);

}  // namespace quantformer
