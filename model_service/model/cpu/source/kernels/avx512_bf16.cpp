// Attention in bfloat16 for processors with AVX-512 and its bfloat16 instructions.

#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")
#endif

namespace {
#include "../vectors.h"

INLINE Floats add_product(Floats sums, Words b, uint32_t a, Bf16) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)b, (__m512bh)(Words{} + a));
}
INLINE void store_weights(Bf16 *p, Floats weights) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weights);
  memcpy(p, &rounded, sizeof(rounded));
}

#include "attention/cache.h"
#include "attention/softmax.h"

#include "attention/products.h"

#include "attention/attention.h"
} // namespace

const Attend<uint16_t> ATTEND_IN_BFLOAT16 = attend<VectorProducts<Bf16, 4, 4>>;

#ifdef __clang__
#pragma clang attribute pop
#endif
