// The C interface: what Python calls, with addresses of tensors' data.

#include "interface.h"
#include "parallel.h"
#include "products/products.h"

namespace {
constexpr long MIN_ELEMENTS_PER_THREAD = 8192; // below, waking a thread takes longer than the work

// In the order of `InstructionSet` in library.py.
const Kernels *const SETS[] = {&AVX2_KERNELS, &AVX2_KERNELS, &AVX512_KERNELS, &AVX512_KERNELS};
const Kernels *chosen = SETS[0];

int threads_for(long elements, int threads) {
  const long useful = elements / MIN_ELEMENTS_PER_THREAD + 1;
  return useful < threads ? static_cast<int>(useful) : threads;
}

// Calls body(row) for each row, some neighbours in each task.
template <class Body> void for_rows(int rows, long elements, int threads, const Body &body) {
  threads = threads_for(elements, threads);
  const long tasks = rows < threads ? rows : threads;
  parallel(threads, tasks, [&](long task) {
    for (long row = rows * task / tasks; row < rows * (task + 1) / tasks; row++) body(row);
  });
}
} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The number of this interface: library.py refuses a library that was compiled from older sources.
EXPORT int chasqui_interface() { return 2; }

// Chooses the instructions of all later calls. Returns 0, or -1 if the system does not allow them.
EXPORT int chasqui_use(int instructions) {
  chosen = SETS[instructions];
  return use_products(instructions);
}

// out = norm(x) [rows, dim]; with a residual, residual += x and out = norm(residual).
EXPORT void chasqui_norm(const uint16_t *x, uint16_t *residual, const uint16_t *weight, float eps, int rows, int dim,
                         uint16_t *out, int threads) {
  for_rows(rows, static_cast<long>(rows) * dim, threads, [&](long row) {
    chosen->norm_row(x + row * dim, residual ? residual + row * dim : nullptr, weight, eps, dim,
                            out + row * dim);
  });
}

// Rotates the first `count` heads of each row in place; rows lie `stride` elements apart. Angles are
// float32: [rows, head_dim / 2, 2].
EXPORT void chasqui_rotate(uint16_t *heads, long stride, int rows, int count, int head_dim, const float *angles,
                           int threads) {
  for_rows(rows, static_cast<long>(rows) * count * head_dim, threads, [&](long row) {
    chosen->rotate_row(heads + row * stride, count, head_dim, angles + row * head_dim);
  });
}

EXPORT void chasqui_gate(const uint16_t *x, int rows, int hidden, uint16_t *out, int threads) {
  for_rows(rows, 4L * rows * hidden, threads, [&](long row) { // an exponential costs more than other operations
    chosen->gate_row(x + row * 2 * hidden, hidden, out + row * hidden);
  });
}

// Writes a step's keys and values [tokens, kv_heads, head_dim] to their blocks. Tokens lie `stride`
// elements apart. An element has `item` bytes, 1 or 2.
EXPORT void chasqui_write(const AttentionCache *cache, const AttentionSpan *spans, int count, const void *keys,
                          long key_stride, const void *values, long value_stride, int item) {
  const long size = cache->block_size, head_dim = cache->head_dim;
  for (const AttentionSpan *span = spans; span < spans + count; span++)
    for (long token = 0; token < span->query_length; token++) {
      const long position = span->context_length - span->query_length + token, at = position % size;
      for (long head = 0; head < cache->kv_heads; head++) {
        const long row = span->row + token;
        const long begin = (span->table[position / size] * static_cast<long>(cache->kv_heads) + head) * size * head_dim;
        const char *key = static_cast<const char *>(keys) + (row * key_stride + head * head_dim) * item;
        const char *value = static_cast<const char *>(values) + (row * value_stride + head * head_dim) * item;
        char *to = static_cast<char *>(cache->keys) + (begin + at) * item;
        for (long i = 0; i < head_dim; i++) memcpy(to + i * size * item, key + i * item, item);
        memcpy(static_cast<char *>(cache->values) + (begin + at * head_dim) * item, value, head_dim * item);
      }
    }
}

EXPORT void chasqui_attend(const AttentionCache *cache, const AttentionSpan *spans, int count, const uint16_t *query,
                           long query_stride, int heads, uint16_t *out, int threads) {
  chosen->attend(*cache, spans, count, query, query_stride, heads, out, threads);
}
