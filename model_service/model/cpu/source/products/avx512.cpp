// The products for processors with AVX-512 and its bfloat16 instructions.

#include "../parallel.h"
#include "../scratch.h"
#include "products.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))),            \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif

namespace {
#include "../vectors.h"

using Block = Floats;
using Pairs = Words;
constexpr int WIDEST = 8, TALLEST = 6, WIDE = 4; // blocks of one row; rows and blocks of many

INLINE Block add(Block sums, const Pairs &weights, uint32_t x) {
  const __m512bh pairs = (__m512bh)_mm512_set1_epi32(static_cast<int>(x));
  return (Block)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(&weights), pairs);
}

#include "linear.h"
} // namespace

const Products AVX512_PRODUCTS = {multiply};

#ifdef __clang__
#pragma clang attribute pop
#endif
