// What the kernels beside the products are told. Numbers are bfloat16 unless said otherwise.
#pragma once

#include <stdint.h>
#include <string.h>

// The keys [blocks, kv_heads, head_dim, block_size] and values [blocks, kv_heads, block_size,
// head_dim] of one layer. Keys lie so that one load gets the same feature of neighbouring tokens.
struct AttentionCache {
  void *keys, *values;
  const float *widened; // the number of each 8-bit code; null if the cache holds bfloat16
  int kv_heads, head_dim, block_size;
};

// One sequence's part of the flat batch.
struct AttentionSpan {
  const int32_t *table; // its blocks
  int row;              // its first token's in the batch
  int query_length, context_length;
};

// One implementation of them, for one set of instructions.
struct Kernels {
  void (*norm_row)(const uint16_t *x, uint16_t *residual, const uint16_t *weight, float eps, int dim, uint16_t *out);
  void (*rotate_row)(uint16_t *heads, int count, int head_dim, const float *angles);
  void (*gate_row)(const uint16_t *x, int hidden, uint16_t *out);
  void (*attend)(const AttentionCache &cache, const AttentionSpan *spans, int count, const uint16_t *query,
                 long query_stride, int heads, uint16_t *out, int threads);
};

extern const Kernels AVX2_KERNELS, AVX512_KERNELS;
