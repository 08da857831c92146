// The kernels for processors with AVX2.

#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
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

const Kernels AVX2_KERNELS = {
    {norm_row, rotate_row, gate_row, attend<VectorProducts<Bf16, 2, 2>>},
    {norm_row, rotate_row, gate_row, attend<VectorProducts<float, 2, 2>>},
    softmax_row,
};

#ifdef __clang__
#pragma clang attribute pop
#endif
