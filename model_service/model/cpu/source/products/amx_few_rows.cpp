// Products of bfloat16 for few rows on processors with AMX: by vectors, which read the weights faster
// than tiles, but with the sums of tiles to the bit.
//
// A tile (TDPBF16PS) adds the products of 16 pairs of inputs in two sums, one of their first and one of
// their second numbers, and then adds both sums to the output. Numbers below 2^-126 are zeros to it.

#include "../parallel.h"
#include "../scratch.h"
#include "products.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace {
#include "../vectors.h"

#include "inputs.h"

#include "linear.h"

// The sums of 16 outputs of a row over the lines of one tile, which are one piece.
struct TileSums {
  struct Unit {
    float first, second;
  };
  struct Weights {
    __m512 first, second;
  };
  static constexpr int TALLEST = MIN_TILE_ROWS - 1, WIDE = 2, WIDEST = 8;
  __m512 first, second;

  INLINE_MEMBER void begin(const Line &) { first = second = _mm512_setzero_ps(); }
  INLINE_MEMBER void end(Line &sums) const {
    _mm512_store_ps(sums.floats, _mm512_add_ps(_mm512_load_ps(sums.floats), _mm512_add_ps(first, second)));
  }
  INLINE_MEMBER static Weights read(const Line &line) {
    const __m512i pairs = _mm512_load_si512(&line), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(_mm512_and_si512(pairs, upper))};
  }
  INLINE_MEMBER void add_products(const Weights &weights, const Unit &x) {
    first = _mm512_fmadd_ps(weights.first, _mm512_set1_ps(x.first), first);
    second = _mm512_fmadd_ps(weights.second, _mm512_set1_ps(x.second), second);
  }
};

// As tiles do it, whatever the thread's mode is.
class WithoutSmallNumbers {
public:
  WithoutSmallNumbers() : before(_mm_getcsr()) {
    constexpr unsigned RESULTS = 0x8000, INPUTS = 0x40;
    _mm_setcsr(before | RESULTS | INPUTS);
  }
  ~WithoutSmallNumbers() { _mm_setcsr(before); }

private:
  unsigned before;
};

constexpr int TILE_LINES = 16;
} // namespace

void multiply_few_rows_like_tiles(const Weight &weight, const Rows &rows, int threads) {
  multiply<LineTile<TileSums, TILE_LINES>, WidenedRows, WithoutSmallNumbers>(weight, rows, threads);
}

#ifdef __clang__
#pragma clang attribute pop
#endif
