// The kernels beside the products: what they are told, and a table of them per set of instructions.
#pragma once

#include <stdint.h>
#include <string.h>

// The keys and values of one layer, which attention/cache.h lays out.
struct AttentionCache {
  void *keys, *values;
  int eight_bits; // whether it holds 8-bit floats, else numbers of the queries' type
  int kv_heads, head_dim, block_size;
};

// One sequence's part of the flat batch.
struct AttentionSpan {
  const int32_t *table; // its blocks
  int row;              // its first token's in the batch
  int query_length, context_length;
};

// Queries [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim] of a step. Tokens
// lie `stride` elements apart.
template <class Number> struct AttentionInputs {
  const Number *queries, *keys, *values;
  long query_stride, key_stride, value_stride;
  int heads;
};

// Writes the keys and values to the cache, then attends: out [tokens, heads, head_dim].
template <class Number>
using Attend = void (*)(const AttentionCache &cache, const AttentionSpan *spans, int count,
                        const AttentionInputs<Number> &inputs, Number *out, int threads);

// The kernels for one type of numbers.
template <class Number> struct KernelsOf {
  // out = norm(x) [dim]; with a residual, residual += x and out = norm(residual).
  void (*norm_row)(const Number *x, Number *residual, const Number *weight, float eps, int dim, Number *out);
  // Rotates heads [count, head_dim] in place by angles [head_dim / 2, 2].
  void (*rotate_row)(Number *heads, int count, int head_dim, const float *angles);
  // out [hidden] = silu(first half of x) x second half.
  void (*gate_row)(const Number *x, int hidden, Number *out);
  Attend<Number> attend;
};

// All of them, for one set of instructions. bfloat16 is handled as its bits.
struct Kernels {
  KernelsOf<uint16_t> bfloat16;
  KernelsOf<float> float32;
  // out [count] = softmax(logits / temperature).
  void (*softmax_row)(const float *logits, float temperature, int count, float *out);
};

extern const Kernels AVX2_KERNELS, AVX512_KERNELS;
extern const Attend<uint16_t> ATTEND_IN_BFLOAT16, ATTEND_ON_TILES; // for newer processors with AVX-512
