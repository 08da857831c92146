// The products of bfloat16 for processors with AVX-512's instructions for it.

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

#include "inputs.h"

struct Bfloat16Block {
  using Unit = uint32_t; // two numbers
  using Weights = __m512bh;
  static constexpr int TALLEST = 6, WIDE = 4, WIDEST = 8; // rows and blocks of many; blocks of one row
  __m512 sums;

  INLINE_MEMBER void begin(const Line &before) { sums = _mm512_load_ps(before.floats); }
  INLINE_MEMBER void end(Line &after) const { _mm512_store_ps(after.floats, sums); }
  INLINE_MEMBER static Weights read(const Line &line) { return (__m512bh)_mm512_load_si512(&line); }
  INLINE_MEMBER void add_products(Weights weights, Unit x) {
    sums = _mm512_dpbf16_ps(sums, weights, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
  }
};

#include "linear.h"
} // namespace

const Products AVX512_BF16_PRODUCTS = {{multiply<LineTile<Bfloat16Block>, PlainRows<Bf16>>}};

#ifdef __clang__
#pragma clang attribute pop
#endif
