// The products for processors with AVX2, which multiply bfloat16 as float32.

#include "../parallel.h"
#include "../scratch.h"
#include "products.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {
#include "../vectors.h"

struct Block {
  __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
};
struct Pairs {
  __m256i low, high;
};
constexpr int WIDEST = 4, TALLEST = 2, WIDE = 2; // blocks of one row; rows and blocks of many

INLINE __m256 add(__m256 sums, const __m256i *weights, __m256 even, __m256 odd) {
  const __m256i pairs = _mm256_loadu_si256(weights);
  sums = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), even, sums);
  const __m256i upper = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
  return _mm256_fmadd_ps(_mm256_castsi256_ps(upper), odd, sums);
}

INLINE Block add(Block sums, const Pairs &weights, uint32_t x) {
  const __m256 even = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(x << 16)));
  const __m256 odd = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(x & 0xffff0000)));
  sums.low = add(sums.low, &weights.low, even, odd);
  sums.high = add(sums.high, &weights.high, even, odd);
  return sums;
}

INLINE void store_some(Bf16 *p, const Block &sums, int count) {
  float floats[16];
  _mm256_storeu_ps(floats, sums.low);
  _mm256_storeu_ps(floats + 8, sums.high);
  store_some(p, load(floats), count);
}

#include "linear.h"
} // namespace

const Products AVX2_PRODUCTS = {multiply};

#ifdef __clang__
#pragma clang attribute pop
#endif
