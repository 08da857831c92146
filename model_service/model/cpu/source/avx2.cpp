// The kernels for processors with AVX2, which multiply bfloat16 as float32.

#include "interface.h"
#include "parallel.h"
#include "scratch.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {
#include "vectors.h"

using Block = Floats;
using Pairs = Words;
constexpr int WIDEST = 4, TALLEST = 2, WIDE = 2; // blocks of one row; rows and blocks of many

INLINE Block add(Block sums, const Pairs &weights, uint32_t x) {
  sums += reinterpret_cast<Floats>(weights << 16) * splat(widen(static_cast<Bf16>(x)));
  sums += reinterpret_cast<Floats>(weights & 0xffff0000u) * splat(widen(static_cast<Bf16>(x >> 16)));
  return sums;
}

#include "attention.h"
#include "linear.h"
#include "rows.h"
} // namespace

const Kernels AVX2_KERNELS = {multiply, norm_row, rotate_row, gate_row, attend};

#ifdef __clang__
#pragma clang attribute pop
#endif
