// Products on AMX's tiles: 16 rows x 16 outputs x 64 bytes of inputs at a time, inputs from first to
// last. bfloat16 is summed in float32, int8 exactly in integers.
//
// A tile's row has the same sums whatever the other rows are, so here, too, a row has the same bits
// alone and in any batch.

#include "../parallel.h"
#include "../scratch.h"
#include "products.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(                                                                                          \
    __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,fma"))),                      \
    apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace {
#include "../vectors.h"

#include "inputs.h"

constexpr int HEIGHT = 16; // rows of a tile, each a `Line`

// A tile in memory.
struct Tile {
  Line rows[HEIGHT];
};

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
    tiles.rows[tile] = static_cast<uint8_t>(tile >= 6 ? HEIGHT : second ? more_rows : rows);
    tiles.bytes[tile] = 64;
  }
  _tile_loadconfig(&tiles);
}

// Instructions name their tiles, so these are no functions.
#define LOAD(tile, from) _tile_loadd(tile, from, sizeof(Line))
#define STORE(tile, to) _tile_stored(tile, to, sizeof(Line))
#define ADD_PRODUCTS(sums, x, weights)                                                                                 \
  do {                                                                                                                 \
    if constexpr (FORM == Form::INT8)                                                                                        \
      _tile_dpbssd(sums, x, weights);                                                                                  \
    else                                                                                                               \
      _tile_dpbf16ps(sums, x, weights);                                                                                \
  } while (0)

// The sums of four tiles.
using Sums = Tile[4];

const Tile *tiles_of(const Weight &weight, int block) { return reinterpret_cast<const Tile *>(weight.block(block)); }

// Sums of up to 16 rows with blocks `first` to `end`, at most four. A block that is not there is
// computed like the last.
template <Form FORM> void add_up_few(const Weight &weight, int first, int end, const Tile *x, Sums &sums) {
  const Tile *blocks[4];
  for (int b = 0; b < 4; b++) blocks[b] = tiles_of(weight, first + b < end ? first + b : end - 1);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < weight.depth() / HEIGHT; i++) {
    LOAD(4, x + i);
    LOAD(6, blocks[0] + i);
    ADD_PRODUCTS(0, 4, 6);
    LOAD(7, blocks[1] + i);
    ADD_PRODUCTS(1, 4, 7);
    LOAD(6, blocks[2] + i);
    ADD_PRODUCTS(2, 4, 6);
    LOAD(7, blocks[3] + i);
    ADD_PRODUCTS(3, 4, 7);
  }
  STORE(0, &sums[0]);
  STORE(1, &sums[1]);
  STORE(2, &sums[2]);
  STORE(3, &sums[3]);
}

// Adds the inputs of `depth` tiles to the sums of two tiles of rows with two blocks. Sums begin at zero
// if `begins`.
template <Form FORM>
INLINE void add_up(const Tile *upper, const Tile *lower, const Tile *left, const Tile *right, int depth, bool begins,
                   Sums &sums) {
  if (begins) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    LOAD(0, &sums[0]);
    LOAD(1, &sums[1]);
    LOAD(2, &sums[2]);
    LOAD(3, &sums[3]);
  }
  for (int i = 0; i < depth; i++) {
    LOAD(6, left + i);
    LOAD(4, upper + i);
    LOAD(7, right + i);
    ADD_PRODUCTS(0, 4, 6);
    LOAD(5, lower + i);
    ADD_PRODUCTS(1, 4, 7);
    ADD_PRODUCTS(2, 5, 6);
    ADD_PRODUCTS(3, 5, 7);
  }
  STORE(0, &sums[0]);
  STORE(1, &sums[1]);
  STORE(2, &sums[2]);
  STORE(3, &sums[3]);
}

// Blocks `first` to `end` for up to 16 rows from `row` on.
template <Form FORM, class RowsOf>
void multiply_few(const Weight &weight, int first, int end, const Tile *x, const RowsOf &rows, int row, int count) {
  Sums sums;
  configure(count, 0);
  for (int block = first; block < end; block += 4) {
    add_up_few<FORM>(weight, block, block + 4 < end ? block + 4 : end, x, sums);
    for (int b = 0; b < 4 && block + b < end; b++)
      for (int i = 0; i < count; i++) rows.finish(row + i, block + b, sums[b].rows[i]);
  }
}

// Blocks `first` to `end` for more than 16 rows from `row` on; the last 32 have at least 17. A piece of
// the inputs of all rows stays in the second cache, and a piece of two blocks in the first, while they
// are multiplied. So weights are read from memory once.
template <Form FORM, class RowsOf>
void multiply_many(const Weight &weight, int first, int end, const Tile *x, const RowsOf &rows, int row, int count) {
  static thread_local Scratch scratch;
  constexpr int PIECE = 16; // tiles
  const int depth = weight.depth() / HEIGHT, pairs = (count + 2 * HEIGHT - 1) / (2 * HEIGHT);
  const int last_rows = count - (pairs - 1) * 2 * HEIGHT;
  Sums *sums = scratch.get<Sums>(sizeof(Sums) * pairs * ((end - first + 1) / 2));
  for (int begin = 0; begin < depth; begin += PIECE) {
    const int some = depth - begin < PIECE ? depth - begin : PIECE;
    Sums *next = sums;
    for (int block = first; block < end; block += 2) {
      const Tile *left = tiles_of(weight, block) + begin;
      const Tile *right = tiles_of(weight, block + 1 < end ? block + 1 : block) + begin;
      configure(HEIGHT, HEIGHT);
      for (int pair = 0; pair < pairs; pair++, next++) {
        const Tile *upper = x + static_cast<long>(pair) * 2 * depth + begin;
        if (pair + 1 == pairs && last_rows < 2 * HEIGHT) configure(HEIGHT, last_rows - HEIGHT);
        add_up<FORM>(upper, upper + depth, left, right, some, begin == 0, *next);
      }
    }
  }
  for (int block = first; block < end; block += 2)
    for (int pair = 0; pair < pairs; pair++, sums++)
      for (int b = 0; b < 2 && block + b < end; b++)
        for (int i = 0; i < 2 * HEIGHT && pair * 2 * HEIGHT + i < count; i++)
          rows.finish(row + pair * 2 * HEIGHT + i, block + b, (*sums)[i / HEIGHT * 2 + b].rows[i % HEIGHT]);
}

template <Form FORM, class RowsOf> void multiply(const Weight &weight, const Rows &rows, int threads) {
  static thread_local Scratch scratch;
  RowsOf each(weight, rows);
  const int depth = weight.depth() / HEIGHT;
  // In tiles: rows of a matrix would lie at distances that are powers of two, which share few places
  // of the cache.
  const Line *lines = arrange<Line>(each, RowTiles(rows.count, HEIGHT, true), depth, scratch, threads);
  const Tile *x = reinterpret_cast<const Tile *>(lines);
  constexpr int MAX_ROWS = 512; // of one task: a piece of their inputs fits the second cache
  const int few = rows.count % (2 * HEIGHT) <= HEIGHT ? rows.count % (2 * HEIGHT) : 0; // rows of a single tile
  const int many = rows.count - few;
  constexpr int FEW_BLOCKS = 4; // side by side
  if (!many) {
    parallel_ranges(threads, weight.count(), FEW_BLOCKS, [&](int first, int end) {
      multiply_few<FORM>(weight, first, end, x, each, 0, few);
      _tile_release();
    });
    return;
  }
  const int parts = (many + MAX_ROWS - 1) / MAX_ROWS + (few ? 1 : 0);
  // Blocks of a task: as many as leave some tasks to each thread.
  int group = weight.count() / (4 * threads) / 4 * 4;
  group = group < FEW_BLOCKS ? FEW_BLOCKS : group > 16 ? 16 : group;
  const int group_count = (weight.count() + group - 1) / group;
  parallel(threads, static_cast<long>(group_count) * parts, [&](long task) {
    const int first = static_cast<int>(task / parts) * group;
    const int end = first + group < weight.count() ? first + group : weight.count();
    const int row = static_cast<int>(task % parts) * MAX_ROWS;
    if (row < many)
      multiply_many<FORM>(weight, first, end, x + row / HEIGHT * depth, each, row,
                          many - row < MAX_ROWS ? many - row : MAX_ROWS);
    else
      multiply_few<FORM>(weight, first, end, x + many / HEIGHT * depth, each, many, few);
    _tile_release();
  });
}

void multiply_bfloat16(const Weight &weight, const Rows &rows, int threads) {
  if (rows.count < MIN_TILE_ROWS)
    multiply_few_rows_like_tiles(weight, rows, threads);
  else
    multiply<Form::BFLOAT16, PlainRows<Bf16>>(weight, rows, threads);
}

void multiply_int8(const Weight &weight, const Rows &rows, int threads) {
  if (rows.count < MIN_TILE_ROWS)
    AVX512_PRODUCTS.multiply[static_cast<int>(Form::INT8)](weight, rows, threads);
  else if (rows.type == Type::FLOAT32)
    multiply<Form::INT8, Int8Rows<float, 0>>(weight, rows, threads);
  else
    multiply<Form::INT8, Int8Rows<Bf16, 0>>(weight, rows, threads);
}

void multiply_int4(const Weight &weight, const Rows &rows, int threads) {
  if (rows.count < MIN_TILE_ROWS)
    AVX512_PRODUCTS.multiply[static_cast<int>(Form::INT4)](weight, rows, threads);
  else
    multiply_int4_on_tiles(weight, rows, threads);
}
} // namespace

const Products AMX_PRODUCTS = {{multiply_bfloat16, nullptr, multiply_int8, multiply_int4}};

#ifdef __clang__
#pragma clang attribute pop
#endif
