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

#include "inputs.h"

// Rows and blocks of a tile of many rows; blocks that one row reads side by side.
constexpr int MANY_ROWS = 6, MANY_BLOCKS = 1, ONE_ROW_BLOCKS = 4;
constexpr int MANY_INT8_ROWS = 4;
constexpr int MANY_INT4_ROWS = 3, MANY_INT4_BLOCKS = 1, ONE_ROW_INT4_BLOCKS = 2;

struct Floats16 {
  __m256 low, high;
};
struct Ints16 {
  __m256i low, high;
};

INLINE const __m256i *halves(const Line &line) { return reinterpret_cast<const __m256i *>(&line); }
INLINE __m256i *halves(Line &line) { return reinterpret_cast<__m256i *>(&line); }

INLINE Floats16 spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats16 load_floats(const Line &line) { return {_mm256_load_ps(line.floats), _mm256_load_ps(line.floats + 8)}; }
INLINE void store(Line &line, Floats16 x) {
  _mm256_store_ps(line.floats, x.low);
  _mm256_store_ps(line.floats + 8, x.high);
}
INLINE Floats16 add(Floats16 a, Floats16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE Floats16 multiply(Floats16 a, Floats16 b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
INLINE Floats16 multiply_add(Floats16 a, Floats16 b, Floats16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

INLINE Ints16 load_ints(const Line &line) {
  return {_mm256_load_si256(halves(line)), _mm256_load_si256(halves(line) + 1)};
}
INLINE void store(Line &line, Ints16 x) {
  _mm256_store_si256(halves(line), x.low);
  _mm256_store_si256(halves(line) + 1, x.high);
}

INLINE __m256 widen_even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
INLINE __m256 widen_odd(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
INLINE Floats16 widen_even(const Line &line) { return {widen_even(halves(line)[0]), widen_even(halves(line)[1])}; }
INLINE Floats16 widen_odd(const Line &line) { return {widen_odd(halves(line)[0]), widen_odd(halves(line)[1])}; }
INLINE __m256 widen_eight(const uint16_t *x) {
  return widen_even(_mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i *>(x))));
}
INLINE Floats16 widen(const uint16_t *x) { return {widen_eight(x), widen_eight(x + 8)}; }

INLINE __m256i spread_codes(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
// Sums of neighbours in 32 bits.
INLINE __m256i add_pairs(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }

constexpr int ZERO_POINT = 0;
struct SignedCodes {
  __m256i low, high;
};
INLINE SignedCodes signed_codes(const Line &line) { return {halves(line)[0], halves(line)[1]}; }
// AVX2 multiplies unsigned by signed codes and adds pairs in 16 bits. Codes of up to ±127 fit.
INLINE __m256i multiply_signed(__m256i weights, __m256i x) {
  return add_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights)));
}
INLINE Ints16 add_signed(Ints16 sums, const SignedCodes &weights, uint32_t x) {
  return {_mm256_add_epi32(sums.low, multiply_signed(weights.low, spread_codes(x))),
          _mm256_add_epi32(sums.high, multiply_signed(weights.high, spread_codes(x)))};
}

struct HalfCodes {
  __m256i low, high;
};
INLINE HalfCodes low_codes(const Line &line) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(halves(line)[0], mask), _mm256_and_si256(halves(line)[1], mask)};
}
INLINE HalfCodes high_codes(const Line &line) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(halves(line)[0], 4), mask),
          _mm256_and_si256(_mm256_srli_epi16(halves(line)[1], 4), mask)};
}

// In 16 bits, in which 16 products of up to 15 · 127 fit, until they are widened.
struct GroupSums {
  __m256i low, high;
  __m256i wide_low, wide_high;

  INLINE_MEMBER void add_products(const HalfCodes &weights, uint32_t x) {
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(weights.low, spread_codes(x)));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(weights.high, spread_codes(x)));
  }
  INLINE_MEMBER void widen() {
    wide_low = _mm256_add_epi32(wide_low, add_pairs(low));
    wide_high = _mm256_add_epi32(wide_high, add_pairs(high));
    low = high = _mm256_setzero_si256();
  }
  INLINE_MEMBER Floats16 floats() const { return {_mm256_cvtepi32_ps(wide_low), _mm256_cvtepi32_ps(wide_high)}; }
};

#include "linear.h"

#include "blocks.h"
} // namespace

const Products AVX2_PRODUCTS = {{
    multiply<LineTile<WidenedBlock>, WidenedRows>,
    multiply<LineTile<Float32Block>, PlainRows<float>>,
    multiply_int8<ZERO_POINT>,
    multiply_int4,
}};

#ifdef __clang__
#pragma clang attribute pop
#endif
