// The C interface: what Python calls, with addresses of tensors' data and their type.

#include "interface.h"
#include "parallel.h"
#include "products/products.h"

namespace {
// In the order of `InstructionSet` in library.py.
const Kernels *const SETS[] = {&AVX2_KERNELS, &AVX512_BF16_KERNELS, &AMX_KERNELS};
const Kernels *chosen = SETS[0];

// Calls body(kernels, number), with a number of the type.
template <class Body> void with_type(int type, const Body &body) {
  if (type == FLOAT32_ELEMENTS)
    body(chosen->float32, float{});
  else
    body(chosen->bfloat16, uint16_t{});
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
EXPORT void chasqui_norm(int type, const void *x, void *residual, const void *weight, float eps, int rows, int dim,
                         void *out, int threads) {
  with_type(type, [&](const auto &kernels, auto number) {
    using Number = decltype(number);
    for_rows(rows, static_cast<long>(rows) * dim, threads, [&](long row) {
      const long at = row * dim;
      kernels.norm_row(static_cast<const Number *>(x) + at, residual ? static_cast<Number *>(residual) + at : nullptr,
                       static_cast<const Number *>(weight), eps, dim, static_cast<Number *>(out) + at);
    });
  });
}

// Rotates the first `count` heads of each row in place; rows lie `stride` elements apart. Angles are
// float32: [rows, head_dim / 2, 2].
EXPORT void chasqui_rotate(int type, void *heads, long stride, int rows, int count, int head_dim, const float *angles,
                           int threads) {
  with_type(type, [&](const auto &kernels, auto number) {
    for_rows(rows, static_cast<long>(rows) * count * head_dim, threads, [&](long row) {
      kernels.rotate_row(static_cast<decltype(number) *>(heads) + row * stride, count, head_dim,
                         angles + row * head_dim);
    });
  });
}

// out [rows, hidden] = silu(first half of x [rows, 2 x hidden]) x second half.
EXPORT void chasqui_gate(int type, const void *x, int rows, int hidden, void *out, int threads) {
  with_type(type, [&](const auto &kernels, auto number) {
    using Number = decltype(number);
    for_rows(rows, 4L * rows * hidden, threads, [&](long row) { // an exponential costs more than other operations
      kernels.gate_row(static_cast<const Number *>(x) + row * 2 * hidden, hidden,
                       static_cast<Number *>(out) + row * hidden);
    });
  });
}

// Writes a step's keys and values to their blocks, then attends: out [tokens, heads, head_dim].
EXPORT void chasqui_attend(int type, const AttentionCache *cache, const AttentionSpan *spans, int count, int heads,
                           const void *queries, long query_stride, const void *keys, long key_stride,
                           const void *values, long value_stride, void *out, int threads) {
  with_type(type, [&](const auto &kernels, auto number) {
    using Number = decltype(number);
    const AttentionInputs<Number> inputs = {
        static_cast<const Number *>(queries), static_cast<const Number *>(keys),
        static_cast<const Number *>(values),  query_stride, key_stride, value_stride, heads,
    };
    kernels.attend(*cache, spans, count, inputs, static_cast<Number *>(out), threads);
  });
}
