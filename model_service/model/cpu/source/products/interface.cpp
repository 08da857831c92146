// The products' part of the C interface: choosing instructions, and multiplying.

#include "products.h"

#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace {
// In the order of `InstructionSet` in library.py: each adds to those before it.
const Products *const SETS[] = {&AVX2_PRODUCTS, &AVX512_PRODUCTS, &AVX512_BF16_PRODUCTS, &AMX_PRODUCTS};
constexpr int AMX = 3;

Products chosen = AVX2_PRODUCTS;
double seconds_of_products = 0;

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}
} // namespace

int use_products(int instructions) {
  for (int set = 0; set <= instructions; set++)
    for (int form = 0; form < FORMS; form++)
      if (SETS[set]->multiply[form]) chosen.multiply[form] = SETS[set]->multiply[form];
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18; // arch_prctl's
  if (instructions != AMX) return 0;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? -1 : 0;
}

void multiply_rows(const Weight &weight, const Rows &rows, int threads) {
  if (!rows.count) return;
  const double begin = seconds();
  chosen.multiply[static_cast<int>(weight.form)](weight, rows, threads);
  seconds_of_products += seconds() - begin;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// y [rows, outputs] of x [rows, inputs], contiguous, with a weight as `chasqui_pack` wrote it.
EXPORT void chasqui_multiply(int type, const Weight *weight, const void *x, int rows, void *y, int threads) {
  multiply_rows(*weight, {static_cast<Type>(type), x, rows, y}, threads);
}

// The time that the calling thread spent in products since the last call.
EXPORT double chasqui_product_seconds() {
  const double result = seconds_of_products;
  seconds_of_products = 0;
  return result;
}
