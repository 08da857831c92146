// The kernels for processors with AVX-512, without its bfloat16 instructions.

#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace {
#include "../vectors.h"

INLINE Floats add_product(Floats sums, Words b, uint32_t a, Bf16) { return add_widened_pairs(sums, b, a); }
INLINE void store_weights(Bf16 *p, Floats weights) { store(p, weights); }

#include "attention/cache.h"
#include "attention/softmax.h"

#include "attention/products.h"

#include "attention/attention.h"

#include "rows.h"
} // namespace

const Kernels AVX512_KERNELS = {
    {norm_row, rotate_row, gate_row, attend<VectorProducts<Bf16, 4, 4>>},
    {norm_row, rotate_row, gate_row, attend<VectorProducts<float, 4, 4>>},
    softmax_row,
};

#ifdef __clang__
#pragma clang attribute pop
#endif
