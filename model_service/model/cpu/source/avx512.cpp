// The kernels for processors with AVX-512.

#include "interface.h"
#include "parallel.h"
#include "scratch.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))),            \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif

namespace {
#include "vectors.h"

#include "attention.h"
#include "rows.h"
} // namespace

const Kernels AVX512_KERNELS = {norm_row, rotate_row, gate_row, attend};

#ifdef __clang__
#pragma clang attribute pop
#endif
