// Attention in bfloat16 for processors with AMX, which multiplies tiles.

#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")
#endif

namespace {
#include "../vectors.h"

INLINE void store_weights(Bf16 *p, Floats weights) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weights);
  memcpy(p, &rounded, sizeof(rounded));
}

#include "attention/cache.h"
#include "attention/softmax.h"

#include "attention/products.h"

// Products on AMX's tiles, of 16 rows x 16 words. A tile's row has the same sums whatever the others are.
struct TileProducts {
  using Number = Bf16;

  TileProducts() {
    struct alignas(64) {
      uint8_t palette = 1, first_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    _tile_loadconfig(&configuration);
  }
  ~TileProducts() { _tile_release(); }

  // As VectorProducts::multiply, for 16 rows: a and c have as many, whatever is in those behind `rows`.
  void multiply(const Bf16 *a, int a_stride, int, int depth, Words16<Bf16> b, int parts, float *c, int c_stride) const {
    for (int part = 0; part < parts; part += 4) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int i = 0; i < depth; i += 16) {
        const Bf16 *next = b.numbers + (static_cast<long>(i) * b.row_stride + part * b.part_stride) * 2;
        _tile_loadd(4, a + i * 2, a_stride * 4);
        _tile_loadd(5, next, b.row_stride * 4);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, next + b.part_stride * 2, b.row_stride * 4);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, next + b.part_stride * 4, b.row_stride * 4);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, next + b.part_stride * 6, b.row_stride * 4);
        _tile_dpbf16ps(3, 4, 6);
      }
      _tile_stored(0, c + part * 16, c_stride * 4);
      _tile_stored(1, c + part * 16 + 16, c_stride * 4);
      _tile_stored(2, c + part * 16 + 32, c_stride * 4);
      _tile_stored(3, c + part * 16 + 48, c_stride * 4);
    }
  }
};

#include "attention/attention.h"
} // namespace

const Attend<uint16_t> ATTEND_ON_TILES = attend<TileProducts>;

#ifdef __clang__
#pragma clang attribute pop
#endif
