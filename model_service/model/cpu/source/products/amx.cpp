// Products on AMX's tiles: 16 rows x 16 outputs x 32 inputs at a time, inputs from first to last.
//
// A tile's row has the same sums whatever the other rows are, so here, too, a row has the same bits
// alone and in any batch.

#include "../parallel.h"
#include "../scratch.h"
#include "products.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(                                                                                          \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace {
#include "../vectors.h"

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

// Sums of two tiles of rows with two blocks: tiles 0 to 3.
using Sums = float[4][HEIGHT * 16];

// Adds the inputs of `depth` tiles to sums that begin at zero if `begins`.
INLINE void add_products(const Bf16 *upper, const Bf16 *lower, const Bf16 *left, const Bf16 *right, int depth,
                         bool begins, Sums &sums) {
  if (begins) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0], 64);
    _tile_loadd(1, sums[1], 64);
    _tile_loadd(2, sums[2], 64);
    _tile_loadd(3, sums[3], 64);
  }
  for (int i = 0; i < depth; i++) {
    const long at = static_cast<long>(i) * 512;
    _tile_loadd(6, left + at, 64);
    _tile_loadd(4, upper + at, 64);
    _tile_loadd(7, right + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, lower + at, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
}

// Blocks `first` to `end` for more than 16 rows; the last 32 have at least 17. A piece of the inputs of
// all rows stays in the second cache, and a piece of two blocks in the first, while they are
// multiplied. So weights are read from memory once.
void multiply_many(const Weight &weight, int first, int end, const Bf16 *x, int rows, Bf16 *y) {
  static thread_local Scratch scratch;
  constexpr int PIECE = 16; // tiles
  const int depth = weight.padded_inputs() / DEPTH, pairs = (rows + 2 * HEIGHT - 1) / (2 * HEIGHT);
  const int last_rows = rows - (pairs - 1) * 2 * HEIGHT;
  Sums *sums = scratch.get<Sums>(sizeof(Sums) * pairs * ((end - first + 1) / 2));
  for (int begin = 0; begin < depth; begin += PIECE) {
    const int some = depth - begin < PIECE ? depth - begin : PIECE;
    Sums *next = sums;
    for (int block = first; block < end; block += 2) {
      const Bf16 *left = weight.blocks + block * weight.stride() + begin * 512L;
      const Bf16 *right = block + 1 < end ? left + weight.stride() : left;
      configure(HEIGHT, HEIGHT);
      for (int pair = 0; pair < pairs; pair++, next++) {
        const Bf16 *upper = x + (static_cast<long>(pair) * 2 * depth + begin) * 512;
        if (pair + 1 == pairs && last_rows < 2 * HEIGHT) configure(HEIGHT, last_rows - HEIGHT);
        add_products(upper, upper + static_cast<long>(depth) * 512, left, right, some, begin == 0, *next);
      }
    }
  }
  for (int block = first; block < end; block += 2)
    for (int pair = 0; pair < pairs; pair++, sums++) {
      const int lower_rows = pair + 1 == pairs ? last_rows - HEIGHT : HEIGHT;
      Bf16 *upper_y = y + static_cast<long>(pair) * 2 * HEIGHT * weight.outputs;
      Bf16 *lower_y = upper_y + static_cast<long>(HEIGHT) * weight.outputs;
      for (int b = 0; b < 2 && block + b < end; b++) {
        round_sums((*sums)[b], HEIGHT, weight, block + b, upper_y);
        round_sums((*sums)[2 + b], lower_rows, weight, block + b, lower_y);
      }
    }
}

void multiply(const Weight &weight, const Bf16 *x, int rows, Bf16 *y, int threads) {
  static thread_local Scratch scratch;
  const long groups = (rows + HEIGHT - 1) / HEIGHT, group_size = static_cast<long>(weight.padded_inputs()) * HEIGHT;
  Bf16 *tiles = scratch.get<Bf16>(sizeof(Bf16) * groups * group_size);
  arrange(weight, x, rows, tiles, threads);
  constexpr int MAX_ROWS = 512; // of one task: a piece of their inputs fits the second cache
  const int few = rows % (2 * HEIGHT) <= HEIGHT ? rows % (2 * HEIGHT) : 0; // the rows of a single tile
  const int many = rows - few, chunks = (many + MAX_ROWS - 1) / MAX_ROWS;
  // Blocks of a task: for many rows as many as leave some tasks to each thread.
  int group = weight.count() / (4 * threads) / 4 * 4;
  group = group < 4 || !many ? 4 : group > 16 ? 16 : group;
  const int group_count = (weight.count() + group - 1) / group, parts = chunks + (few ? 1 : 0);
  parallel(threads, static_cast<long>(group_count) * parts, [&](long task) {
    const int first = static_cast<int>(task / parts) * group;
    const int end = first + group < weight.count() ? first + group : weight.count();
    const int row = static_cast<int>(task % parts) * MAX_ROWS;
    if (row < many) {
      const Bf16 *input = tiles + row / HEIGHT * group_size;
      const int some = many - row < MAX_ROWS ? many - row : MAX_ROWS;
      multiply_many(weight, first, end, input, some, y + static_cast<long>(row) * weight.outputs);
    } else {
      const Bf16 *input = tiles + many / HEIGHT * group_size;
      configure(few, 0);
      for (int block = first; block < end; block += 4)
        multiply_few(weight, block, block + 4 < end ? block + 4 : end, input, few,
                     y + static_cast<long>(many) * weight.outputs);
    }
    _tile_release();
  });
}
} // namespace

const Products AMX_PRODUCTS = {multiply};

#ifdef __clang__
#pragma clang attribute pop
#endif
