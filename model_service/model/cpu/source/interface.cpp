// The C interface beside the products: what Python calls, with addresses of tensors' data.

#include "operations.h"

namespace {
// In the order of `InstructionSet` in library.py.
enum InstructionSet { AVX2, AVX512_VNNI, AVX512_BF16, AMX };

Kernels chosen = AVX2_KERNELS;
} // namespace

const Kernels &kernels() { return chosen; }

#define EXPORT extern "C" __attribute__((visibility("default")))

// The number of this interface: library.py refuses a library that was compiled from older sources.
EXPORT int chasqui_interface() { return 5; }

// Chooses the instructions of all later calls. Returns 0, or -1 if the system does not allow them.
EXPORT int chasqui_use(int instructions) {
  chosen = instructions == AVX2 ? AVX2_KERNELS : AVX512_KERNELS;
  if (instructions == AVX512_BF16) chosen.bfloat16.attend = ATTEND_IN_BFLOAT16;
  if (instructions == AMX) chosen.bfloat16.attend = ATTEND_ON_TILES;
  return use_products(instructions);
}

// The functions below are those of operations.h.

EXPORT void chasqui_norm(Type type, const void *x, void *residual, const void *weight, float eps, int rows, int dim,
                         void *out, int threads) {
  with_type(type, [&](auto number) {
    using Number = decltype(number);
    norm(static_cast<const Number *>(x), static_cast<Number *>(residual), static_cast<const Number *>(weight), eps,
         rows, dim, static_cast<Number *>(out), threads);
  });
}

EXPORT void chasqui_rotate(Type type, void *heads, long stride, int rows, int count, int head_dim, const float *angles,
                           int threads) {
  with_type(type, [&](auto number) {
    rotate(static_cast<decltype(number) *>(heads), stride, rows, count, head_dim, angles, threads);
  });
}

EXPORT void chasqui_gate(Type type, const void *x, int rows, int hidden, void *out, int threads) {
  with_type(type, [&](auto number) {
    using Number = decltype(number);
    gate(static_cast<const Number *>(x), rows, hidden, static_cast<Number *>(out), threads);
  });
}

// Writes a step's keys and values to their blocks, then attends: out [tokens, heads, head_dim].
EXPORT void chasqui_attend(Type type, const AttentionCache *cache, const AttentionSpan *spans, int count, int heads,
                           const void *queries, long query_stride, const void *keys, long key_stride,
                           const void *values, long value_stride, void *out, int threads) {
  with_type(type, [&](auto number) {
    using Number = decltype(number);
    const AttentionInputs<Number> inputs = {
        static_cast<const Number *>(queries), static_cast<const Number *>(keys),
        static_cast<const Number *>(values),  query_stride, key_stride, value_stride, heads,
    };
    kernels_of(number).attend(*cache, spans, count, inputs, static_cast<Number *>(out), threads);
  });
}
