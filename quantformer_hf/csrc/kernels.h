// What the library gives to `kernels/library.py`: plain C without torch, so that one build serves every version of it.
// Functions return 0, or -1 where memory ran out. Tensors are contiguous unless a stride is given; strides count
// elements.
#pragma once

#include <cstdint>

#include "product.h"

extern "C" {

// Torch's own `torch_parallel_for` (torch/csrc/stable/c/shim.h), or null for one thread.
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*), void*);

// The instruction set in use, and the choice of another one by name: 0, or -1 where it cannot run here.
const char* quantformer_instruction_set();
int quantformer_use_instruction_set(const char* name);

// Codes of activations: row by row, clamp(round((f(x) - offset) * inverse), 0, largest), then in the order of `source`.
// f is GELU where `gelu` is not zero.
struct Codes {
  const float* x;  // `(rows, channels)`
  int64_t rows, channels;
  const float* offset;   // `(channels,)`
  const float* inverse;  // `(channels,)`, 1 / scale
  int32_t largest, gelu;
  const int32_t* source;  // `(positions,)`, the channel of each position, `channels` for padding; null: as they are
  int64_t positions;
  uint8_t* codes;  // `(rows, positions)`
};
int quantformer_quantize(const Codes* job, int64_t threads, ParallelFor parallel_for);

// See product.h.
int quantformer_multiply(const quantformer::Product* job, int64_t threads, ParallelFor parallel_for);

// Of one operand of an attention product.
struct Operand {
  float scale, inverse, offset;
};

// probabilities = softmax(Q(q) Q(k)ᵀ * scaling + mask).
struct Probabilities {
  const float *query, *key;  // `(batch, heads, tokens, head_size)` by their strides; the last one is 1
  int64_t batch, heads, queries, keys, head_size;
  int64_t query_strides[3], key_strides[3];  // of batch, head, token
  const float* mask;  // `(batch, heads, queries, keys)` by its strides, which may be 0; the last one is 1. Null: none
  int64_t mask_strides[3];
  const Operand* operands;  // of query and key
  int32_t largest;
  float scaling;
  float* probabilities;  // `(batch, heads, queries, keys)`
};
int quantformer_probabilities(const Probabilities* job, int64_t threads, ParallelFor parallel_for);

// output = Q(p) Q(v).
struct Mixed {
  const float* probabilities;  // `(batch, heads, queries, keys)`
  const float* value;          // `(batch, heads, keys, head_size)` by its strides; the last one is 1
  int64_t batch, heads, queries, keys, head_size;
  int64_t value_strides[3];
  const Operand* operands;  // of probabilities and value
  int32_t largest;
  float* output;  // `(batch, queries, heads, head_size)`
};
int quantformer_mix(const Mixed* job, int64_t threads, ParallelFor parallel_for);

// Of all four jobs together: what a caller compares with its own, in case it was written for another build.
int64_t quantformer_job_bytes();
}
