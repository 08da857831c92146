// What the products' files share: the packed weight, and a table of functions per set of instructions.
// Numbers are bfloat16 unless said otherwise.
#pragma once

#include <stdint.h>
#include <string.h>

// A weight [outputs, inputs] in blocks of 16 outputs x 2 inputs, padded with zeros to 16 outputs and
// 32 inputs: [outputs / 16, inputs / 2, 16, 2]. So 64 neighbouring bytes hold the next two inputs of
// 16 outputs, and 1024 bytes are one tile of AMX.
struct Weight {
  const uint16_t *blocks;
  int outputs, inputs; // without the padding

  int padded_inputs() const { return (inputs + 31) / 32 * 32; }
  int count() const { return (outputs + 15) / 16; }
  long stride() const { return static_cast<long>(padded_inputs()) * 16; } // elements of a block
};

// The products for one set of instructions.
struct Products {
  // y [rows, outputs] of x [rows, inputs] with a weight; both are contiguous.
  void (*multiply)(const Weight &weight, const uint16_t *x, int rows, uint16_t *y, int threads);
};

extern const Products AVX2_PRODUCTS, AVX512_PRODUCTS, AMX_PRODUCTS;

// Chooses the instructions of all later products, as `chasqui_use` does for the whole library.
int use_products(int instructions);
