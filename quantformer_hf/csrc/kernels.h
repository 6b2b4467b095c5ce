// What the library gives to `kernels/library.py`: plain C without torch, so that one build serves every version of it.
// Functions return 0, or -1 where memory ran out. Tensors are contiguous unless a stride is given; strides count
// elements.
#pragma once

#include <cstdint>

#include "codes.h"
#include "product.h"

extern "C" {

// Torch's own `torch_parallel_for` (torch/csrc/stable/c/shim.h), or null for one thread.
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*), void*);

// The instruction set in use, and the choice of another one by name: 0, or -1 where it cannot run here.
const char* quantformer_instruction_set();
int quantformer_use_instruction_set(const char* name);

// See codes.h.
int quantformer_quantize(const Codes* job, int64_t threads, ParallelFor parallel_for);

// y = LayerNorm(x).
struct Norm {
  const float* x;  // `(rows, channels)`
  int64_t rows, channels;
  LayerNorm norm;
  float* y;
};
int quantformer_layer_norm(const Norm* job, int64_t threads, ParallelFor parallel_for);

// See product.h.
int quantformer_multiply(const quantformer::Product* job, int64_t threads, ParallelFor parallel_for);

// The codes of what a product gives, whose `y` is not written. `then` has no norm, and as many channels as the product
// outputs; its `x` and `rows` are not looked at.
int quantformer_multiply_to_codes(const quantformer::Product* job, const Codes* then, int64_t threads,
                                  ParallelFor parallel_for);

// How the weights of such a job are to lie once more for the instruction set in use: `ordered_bits` and `output_order` are set.
// Returns the bytes that takes, 0 where they are to stay as they are. Then: those bytes, what the job has for `ordered`.
int64_t quantformer_plan_order(quantformer::Product* job, const Codes* then);
int quantformer_order_weights(const quantformer::Product* job, const Codes* then, uint8_t* ordered);

// Of one operand of an attention product.
struct Operand {
  float scale, inverse, offset;
};

// probabilities = softmax(Q(q) Q(k)ᵀ * scaling + (mask + hidden)).
struct Probabilities {
  const float *query, *key;  // `(batch, heads, tokens, head_size)` by their strides; the last one is 1
  const uint8_t *query_codes, *key_codes;  // likewise, what is read in place of query and key where these are null
  int64_t batch, heads, queries, keys, head_size;
  int64_t query_strides[3], key_strides[3];  // of batch, head, token
  const float* mask;  // `(batch, heads, queries, keys)` by its strides, which may be 0; the last one is 1. Null: none
  int64_t mask_strides[3];
  const Operand* operands;  // of query and key
  int32_t largest;
  float scaling;
  float* probabilities;  // `(batch, heads, queries, keys)`
  // Added to the mask, which must then be there: `(windows, queries, keys)`, image b being window b % windows. Null: none.
  const float* hidden;
  int64_t windows;
};
int quantformer_probabilities(const Probabilities* job, int64_t threads, ParallelFor parallel_for);

// output = R(p) Q(v), R(p) = c / Σ c of each row, c being the codes of its numbers in units of the largest over `largest`.
struct Mixed {
  const float* probabilities;  // `(batch, heads, queries, keys)`, not negative
  const float* value;          // `(batch, heads, keys, head_size)` by its strides; the last one is 1
  const uint8_t* value_codes;  // likewise, what is read in place of value where that is null
  int64_t batch, heads, queries, keys, head_size;
  int64_t value_strides[3];
  const Operand* operand;  // of value
  int32_t largest;
  float* output;  // `(batch, queries, heads, head_size)`
};
int quantformer_mix(const Mixed* job, int64_t threads, ParallelFor parallel_for);

// What the steps of a module leave for each other (codes, and `x` and `rows` of the next product) is filled in by the call;
// `x` and `rows` of the first step and `y` of the last one are the caller's.

// A multilayer perceptron: linear, codes (of GELU), linear.
struct Mlp {
  quantformer::Product first;
  Codes between;
  quantformer::Product second;
};
int quantformer_mlp(const Mlp* job, int64_t threads, ParallelFor parallel_for);

// An attention block: three linears of the same codes, attention, codes, linear. `scores` and `mix` have the sizes,
// and `scores` the mask. With fewer queries than keys, what is put out is that of the first rows of each image alone.
struct AttentionBlock {
  quantformer::Product query, key, value;
  Probabilities scores;
  Mixed mix;
  Codes between;
  quantformer::Product output;
};
int quantformer_attention_block(const AttentionBlock* job, int64_t threads, ParallelFor parallel_for);

// A transformer block: h = x + attention(LayerNorm(x)), y = h + mlp(LayerNorm(h)). Attention has the sizes;
// the norms are those given here. With fewer queries than keys (and no windows), y has the first rows of each image alone.
// It is worked on in parts, by some images, or some windows of one, at a time.
struct Block {
  const float* x;       // `(rows, channels)`; filled in by the call, as y is
  LayerNorm norm_before, norm_after;
  // Where attention reads windows: the row of each token within its image of `image_rows`, -1 for padding, which is zero;
  // each row is there once, and what `scores` has hidden is of the windows of an image. Null: the rows as they are.
  const int32_t* order;  // `(image_tokens,)`
  int64_t image_tokens, image_rows;
  Codes before;
  AttentionBlock attention;
  Codes after;
  Mlp mlp;
};

// Blocks one after the other, one at least, each of what the one before it puts out. Only the last one may have fewer queries
// than keys; where it has not, y may be x.
struct Blocks {
  const Block* const* blocks;
  int64_t count;
  const float* x;  // of the first one
  float* y;        // of the last one
};
int quantformer_blocks(const Blocks* job, int64_t threads, ParallelFor parallel_for);

// Steps of a whole model, each of the rows that the one before it leaves; all floats.

// What a linear reads: of each of its rows some runs of floats of an image, one after the other.
struct Runs {
  const int32_t* starts;  // `(rows, count)`, where in the image; null: rows as they lie
  int64_t rows, count, length;  // rows of an image, and floats of a run
  int64_t image_size;           // floats of an image
};

// y = codes of rows (with a norm, of their LayerNorm) times weights. `codes` has the rows.
struct Linear {
  Runs runs;
  const LayerNorm* norm;
  Codes codes;
  quantformer::Product product;
};

// Tokens of `batch` images: one or two that lead, the same for all, then those that are given; `positions` are added to all.
struct Tokens {
  const float* lead[2];    // `(channels,)`
  const float* positions;  // `(leading + rows, channels)`
  int64_t batch, leading, rows, channels;
};

// The mean over the rows of each image, `(batch, channels)`, each of eight sums of every eighth row.
struct Mean {
  int64_t batch, rows, channels;
};

enum StepKind : int32_t { kLinearStep, kTokensStep, kBlocksStep, kNormStep, kMeanStep };

struct Step {
  int32_t kind;
  const void* job;  // Linear, Tokens, Blocks, Norm or Mean
  int64_t size;     // floats that it makes
};

struct Model {
  const Step* steps;
  int64_t count;
  int64_t numbers;  // of x
  const float* x;   // of the first step
  float* y;         // of the last one
};
// Nothing is done for images of which a number is not finite: codes would make another one of it.
constexpr int kNotFinite = 1;
int quantformer_model(const Model* job, int64_t threads, ParallelFor parallel_for);

// Of all these jobs together, and `kMeaning`: what a caller compares with its own, in case it was written for another build.
int64_t quantformer_job_bytes();
// To be raised where a field of a job means something else, and all sizes stay.
constexpr int64_t kMeaning = 1;
}
