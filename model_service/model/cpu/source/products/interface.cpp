// The products' part of the C interface: packing weights, and multiplying by them.

#include "../parallel.h"
#include "products.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {
// In the order of `InstructionSet` in library.py.
const Products *const SETS[] = {&AVX2_PRODUCTS, &AVX512_PRODUCTS, &AMX_PRODUCTS};
const Products *chosen = SETS[0];
} // namespace

int use_products(int instructions) {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18; // arch_prctl's, for AMX
  chosen = SETS[instructions];
  if (chosen != &AMX_PRODUCTS) return 0;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? -1 : 0;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// Elements that `chasqui_pack` writes.
EXPORT long chasqui_packed_size(int outputs, int inputs) {
  const Weight weight{nullptr, outputs, inputs};
  return weight.count() * weight.stride();
}

// Packs rows [outputs, inputs], contiguous, into blocks.
EXPORT void chasqui_pack(const uint16_t *rows, int outputs, int inputs, uint16_t *blocks, int threads) {
  const Weight weight{blocks, outputs, inputs};
  // Fewer entries of the processor's page table; a system without large pages ignores it.
  const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(blocks) + page - 1) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(blocks + weight.count() * weight.stride()) / page * page;
  if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
  parallel(threads, weight.count(), [&](long block) {
    uint16_t *to = blocks + block * weight.stride();
    for (int i = 0; i < weight.padded_inputs(); i++)
      for (int output = 0; output < 16; output++) {
        const long row = block * 16 + output;
        const bool padding = row >= outputs || i >= inputs;
        to[(i / 2 * 16 + output) * 2 + i % 2] = padding ? 0 : rows[row * inputs + i];
      }
  });
}

EXPORT void chasqui_multiply(const uint16_t *blocks, int outputs, int inputs, const uint16_t *x, int rows, uint16_t *y,
                             int threads) {
  if (rows) chosen->multiply({blocks, outputs, inputs}, x, rows, y, threads);
}
