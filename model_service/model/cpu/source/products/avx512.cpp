// The products for processors with AVX-512 and its instructions for neural networks (VNNI).

#include "../parallel.h"
#include "../scratch.h"
#include "products.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))),            \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif

namespace {
#include "../vectors.h"

#include "inputs.h"

// Rows and blocks of a tile of many rows; blocks that one row reads side by side.
constexpr int MANY_ROWS = 6, MANY_BLOCKS = 4, ONE_ROW_BLOCKS = 8;
constexpr int MANY_INT8_ROWS = 6;
constexpr int MANY_INT4_ROWS = 6, MANY_INT4_BLOCKS = 2, ONE_ROW_INT4_BLOCKS = 8;

using Floats16 = __m512;
using Ints16 = __m512i;

INLINE Floats16 spread(float x) { return _mm512_set1_ps(x); }
INLINE Floats16 load_floats(const Line &line) { return _mm512_load_ps(line.floats); }
INLINE void store(Line &line, Floats16 x) { _mm512_store_ps(line.floats, x); }
INLINE Floats16 add(Floats16 a, Floats16 b) { return _mm512_add_ps(a, b); }
INLINE Floats16 multiply(Floats16 a, Floats16 b) { return _mm512_mul_ps(a, b); }
INLINE Floats16 multiply_add(Floats16 a, Floats16 b, Floats16 c) { return _mm512_fmadd_ps(a, b, c); }

INLINE Ints16 load_ints(const Line &line) { return _mm512_load_si512(&line); }
INLINE void store(Line &line, Ints16 x) { _mm512_store_si512(&line, x); }

INLINE Floats16 widen(const uint16_t *x) {
  const __m256i halves = _mm256_load_si256(reinterpret_cast<const __m256i *>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
INLINE Floats16 widen_even(const Line &line) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_ints(line), 16)); }
INLINE Floats16 widen_odd(const Line &line) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return _mm512_castsi512_ps(_mm512_and_si512(load_ints(line), upper));
}

// VNNI multiplies unsigned by signed codes.
INLINE Ints16 add_products(Ints16 sums, __m512i weights, uint32_t x) {
  return _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(static_cast<int>(x)));
}

constexpr int ZERO_POINT = 128;
struct SignedCodes {
  __m512i with_zero_point;
};
INLINE SignedCodes signed_codes(const Line &line) {
  return {_mm512_xor_si512(load_ints(line), _mm512_set1_epi8(static_cast<char>(ZERO_POINT)))};
}
INLINE Ints16 add_signed(Ints16 sums, SignedCodes weights, uint32_t x) {
  return add_products(sums, weights.with_zero_point, x);
}

struct HalfCodes {
  __m512i codes;
};
INLINE HalfCodes low_codes(const Line &line) { return {_mm512_and_si512(load_ints(line), _mm512_set1_epi8(15))}; }
INLINE HalfCodes high_codes(const Line &line) {
  return {_mm512_and_si512(_mm512_srli_epi16(load_ints(line), 4), _mm512_set1_epi8(15))};
}

struct GroupSums {
  Ints16 sums;

  INLINE_MEMBER void add_products(HalfCodes weights, uint32_t x) { sums = ::add_products(sums, weights.codes, x); }
  INLINE_MEMBER void widen() {}
  INLINE_MEMBER Floats16 floats() const { return _mm512_cvtepi32_ps(sums); }
};

#include "linear.h"

#include "blocks.h"
} // namespace

const Products AVX512_PRODUCTS = {{
    multiply<LineTile<WidenedBlock>, WidenedRows>,
    multiply<LineTile<Float32Block>, PlainRows<float>>,
    multiply_int8<ZERO_POINT>,
    multiply_int4,
}};

#ifdef __clang__
#pragma clang attribute pop
#endif
