// Products on AMX's tiles: 16 rows x 16 outputs x 32 inputs at a time, inputs from first to last.
//
// A tile's row has the same sums whatever the other rows are, so here, too, a row has the same bits
// alone and in any batch.

#include "interface.h"
#include "parallel.h"
#include "scratch.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(                                                                                          \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace {
#include "vectors.h"

constexpr int HEIGHT = 16, DEPTH = 32; // rows and inputs of a tile

struct alignas(64) Configuration {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights. With one tile of rows, 0 to 3 are its sums
// for four blocks of outputs; with two, 0 and 1 are the sums of the first for two blocks.
void configure(int rows, int more_rows) {
  Configuration tiles;
  for (int tile = 0; tile < 8; tile++) {
    const bool second = more_rows && (tile == 2 || tile == 3 || tile == 5);
    tiles.rows[tile] = static_cast<uint8_t>(tile >= 6 ? DEPTH / 2 : second ? more_rows : rows);
    tiles.bytes[tile] = 64;
  }
  _tile_loadconfig(&tiles);
}

// Inputs in tiles, padded with zeros: [rows / 16, inputs / 32, 16, 32]. Rows of a matrix would lie
// at distances that are powers of two, which share few places of the cache.
void arrange(const Weight &weight, const Bf16 *x, int rows, Bf16 *tiles, int threads) {
  const int depth = weight.padded_inputs() / DEPTH;
  const long groups = (rows + HEIGHT - 1) / HEIGHT;
  parallel(rows > 64 ? threads : 1, groups, [&](long group) {
    for (int row = 0; row < HEIGHT && group * HEIGHT + row < rows; row++) {
      const Bf16 *from = x + (group * HEIGHT + row) * weight.inputs;
      for (int i = 0; i < depth; i++) {
        Bf16 *to = tiles + ((group * depth + i) * HEIGHT + row) * DEPTH;
        const int some = weight.inputs - i * DEPTH < DEPTH ? weight.inputs - i * DEPTH : DEPTH;
        if (some < DEPTH) memset(to, 0, DEPTH * sizeof(Bf16));
        memcpy(to, from + i * DEPTH, some * sizeof(Bf16));
      }
    }
  });
}

void round_sums(const float *sums, int rows, const Weight &weight, int block, Bf16 *y) {
  const int output = block * 16;
  for (int row = 0; row < rows; row++)
    store_some(y + static_cast<long>(row) * weight.outputs + output, load(sums + row * 16), weight.outputs - output);
}

// Blocks `first` to `end`, at most four, for up to 16 rows.
void multiply_few(const Weight &weight, int first, int end, const Bf16 *x, int rows, Bf16 *y) {
  const int depth = weight.padded_inputs() / DEPTH;
  const Bf16 *blocks[4];
  for (int b = 0; b < 4; b++) // a block that is not there is computed like the last, and not stored
    blocks[b] = weight.blocks + (first + b < end ? first + b : end - 1) * weight.stride();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < depth; i++) {
    const long at = static_cast<long>(i) * 512;
    _tile_loadd(4, x + at, 64);
    _tile_loadd(6, blocks[0] + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, blocks[1] + at, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, blocks[2] + at, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, blocks[3] + at, 64);
    _tile_dpbf16ps(3, 4, 7);
  }
  alignas(64) float sums[4][HEIGHT * 16];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  for (int b = 0; first + b < end; b++) round_sums(sums[b], rows, weight, first + b, y);
}

// Two blocks from `first` for 17 to 32 rows.
void multiply_many(const Weight &weight, int first, int end, const Bf16 *x, int rows, Bf16 *y) {
  const int depth = weight.padded_inputs() / DEPTH;
  const Bf16 *left = weight.blocks + first * weight.stride();
  const Bf16 *right = first + 1 < end ? left + weight.stride() : left;
  const Bf16 *lower = x + static_cast<long>(depth) * 512;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < depth; i++) {
    const long at = static_cast<long>(i) * 512;
    _tile_loadd(4, x + at, 64);
    _tile_loadd(6, left + at, 64);
    _tile_loadd(7, right + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + at, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[4][HEIGHT * 16];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  Bf16 *lower_y = y + static_cast<long>(HEIGHT) * weight.outputs;
  for (int b = 0; b < 2 && first + b < end; b++) {
    round_sums(sums[b], HEIGHT, weight, first + b, y);
    round_sums(sums[2 + b], rows - HEIGHT, weight, first + b, lower_y);
  }
}

void multiply(const Weight &weight, const Bf16 *x, int rows, Bf16 *y, int threads) {
  static thread_local Scratch scratch;
  const long groups = (rows + HEIGHT - 1) / HEIGHT, group_size = static_cast<long>(weight.padded_inputs()) * HEIGHT;
  Bf16 *tiles = scratch.get<Bf16>(sizeof(Bf16) * groups * group_size);
  arrange(weight, x, rows, tiles, threads);
  constexpr int GROUP = 4; // blocks: what one task multiplies stays in a core's cache
  parallel(threads, (weight.count() + GROUP - 1) / GROUP, [&](long task) {
    const int first = static_cast<int>(task) * GROUP;
    const int end = first + GROUP < weight.count() ? first + GROUP : weight.count();
    int configured = -1;
    for (long row = 0; row < rows; row += 2 * HEIGHT) {
      const int some = rows - row < 2 * HEIGHT ? static_cast<int>(rows - row) : 2 * HEIGHT;
      if (some != configured) configure(some < HEIGHT ? some : HEIGHT, some > HEIGHT ? some - HEIGHT : 0);
      configured = some;
      const Bf16 *input = tiles + row / HEIGHT * group_size;
      Bf16 *output = y + row * weight.outputs;
      if (some <= HEIGHT) {
        multiply_few(weight, first, end, input, some, output);
        continue;
      }
      for (int block = first; block < end; block += 2) multiply_many(weight, block, end, input, some, output);
    }
    _tile_release();
  });
}
} // namespace

const Kernels AMX_KERNELS = {multiply, nullptr, nullptr, nullptr, nullptr};

#ifdef __clang__
#pragma clang attribute pop
#endif
