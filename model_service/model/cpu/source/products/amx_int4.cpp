// Products of int4 on AMX's tiles, for many rows: a tile multiplies one group of inputs exactly, and
// vectors multiply its sums by the group's scales, in the order of the groups and by the same
// operations as in blocks.h. So a row has the same bits as alone.

#include "../parallel.h"
#include "../scratch.h"
#include "products.h"

#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,fma"))),      \
                             apply_to = function)
#else
#pragma GCC target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace {
#include "../vectors.h"

#include "inputs.h"

constexpr int HEIGHT = 16; // rows of a tile
constexpr int PIECE = 16;  // groups whose codes, for all blocks of a task, stay in the first cache
constexpr int WIDTH = 4;   // blocks of a task
constexpr int AT_ONCE = 4; // groups with tiles of their own

// A group's codes, each in a byte: the quadruples of inputs of 16 outputs, as a tile takes them.
struct UnpackedGroup {
  Line quadruples[GROUP_SIZE / 4];
  __m512 scales, minima;
};

struct alignas(64) Configuration {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights.
void configure() {
  Configuration tiles;
  for (int tile = 0; tile < 8; tile++) {
    tiles.rows[tile] = tile < 6 ? HEIGHT : GROUP_SIZE / 4;
    tiles.bytes[tile] = tile == 4 || tile == 5 ? GROUP_SIZE : 64;
  }
  _tile_loadconfig(&tiles);
}

INLINE __m512 widen_sixteen(const uint16_t *x) {
  const __m256i halves = _mm256_load_si256(reinterpret_cast<const __m256i *>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

void unpack(const Group &group, UnpackedGroup &to) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (int line = 0; line < GROUP_SIZE / 8; line++) {
    const __m512i codes = _mm512_load_si512(&group.codes[line]);
    _mm512_store_si512(&to.quadruples[line], _mm512_and_si512(codes, mask));
    _mm512_store_si512(&to.quadruples[line + GROUP_SIZE / 8], _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask));
  }
  to.scales = widen_sixteen(group.scales);
  to.minima = widen_sixteen(group.minima);
}

// Instructions name their tiles, so this is no function.
#define MULTIPLY(sums, x_tile, weights_tile, index)                                                                    \
  _tile_zero(sums);                                                                                                    \
  _tile_loadd(x_tile, x + (index) * HEIGHT, sizeof(GroupInputs));                                                      \
  _tile_loadd(weights_tile, groups + (index), sizeof(Line));                                                           \
  _tile_dpbssd(sums, x_tile, weights_tile);                                                                            \
  _tile_stored(sums, exact[index], sizeof(Line))

// Exact sums of four groups.
INLINE void multiply_groups(const UnpackedGroup *groups, const GroupInputs *x, Line (&exact)[AT_ONCE][HEIGHT]) {
  MULTIPLY(0, 4, 6, 0);
  MULTIPLY(1, 5, 7, 1);
  MULTIPLY(2, 4, 6, 2);
  MULTIPLY(3, 5, 7, 3);
}

using Exact = Line[AT_ONCE][HEIGHT];

// Adds exact sums of `count` groups, times their scales.
INLINE void add_groups(const UnpackedGroup *groups, int count, const GroupInputs *x, const Exact &exact,
                       __m512 (&totals)[HEIGHT]) {
  for (int i = 0; i < count; i++, x += HEIGHT) {
    const __m512 scales = groups[i].scales, minima = groups[i].minima;
#pragma GCC unroll 16
    for (int row = 0; row < HEIGHT; row++) {
      const __m512 products = _mm512_cvtepi32_ps(_mm512_load_si512(&exact[i][row]));
      const __m512 scaled = _mm512_mul_ps(products, _mm512_set1_ps(x[row].scale));
      totals[row] = _mm512_fmadd_ps(scales, scaled, totals[row]);
      totals[row] = _mm512_fmadd_ps(minima, _mm512_set1_ps(x[row].sum), totals[row]);
    }
  }
}

// Adds some groups to the sums of a tile of rows with one block. Tiles multiply the next groups while
// vectors add the last ones. The rows that a last tile lacks are computed from whatever lies there, and
// not used. Groups that are missing to a multiple of AT_ONCE are multiplied likewise.
void add_up(const UnpackedGroup *groups, int count, const GroupInputs *x, Line *sums) {
  alignas(64) Exact exact[2];
  __m512 totals[HEIGHT];
#pragma GCC unroll 16
  for (int row = 0; row < HEIGHT; row++) totals[row] = _mm512_load_ps(sums[row * WIDTH].floats);
  multiply_groups(groups, x, exact[0]);
  int begin = 0, turn = 0;
  for (; begin + AT_ONCE < count; begin += AT_ONCE, turn ^= 1) {
    multiply_groups(groups + begin + AT_ONCE, x + (begin + AT_ONCE) * HEIGHT, exact[turn ^ 1]);
    add_groups(groups + begin, AT_ONCE, x + begin * HEIGHT, exact[turn], totals);
  }
  add_groups(groups + begin, count - begin, x + begin * HEIGHT, exact[turn], totals);
#pragma GCC unroll 16
  for (int row = 0; row < HEIGHT; row++) _mm512_store_ps(sums[row * WIDTH].floats, totals[row]);
}

template <class RowsOf> void multiply(const Weight &weight, const Rows &rows, int threads) {
  static thread_local Scratch scratch;
  RowsOf each(weight, rows);
  const RowTiles tiles(rows.count, HEIGHT, true);
  const int depth = weight.groups();
  // Behind the last unit lie those that tiles read beyond the last group.
  const GroupInputs *x = arrange<GroupInputs>(each, tiles, depth, scratch, threads, AT_ONCE * HEIGHT);
  parallel(threads, (weight.count() + WIDTH - 1) / WIDTH, [&](long task) {
    static thread_local Scratch task_scratch;
    const int first = static_cast<int>(task) * WIDTH;
    const int blocks = weight.count() - first < WIDTH ? weight.count() - first : WIDTH;
    const size_t sums_size = sizeof(Line) * WIDTH * HEIGHT * tiles.count;
    Line *sums = task_scratch.get<Line>(sums_size + sizeof(UnpackedGroup) * WIDTH * PIECE);
    auto *unpacked = reinterpret_cast<UnpackedGroup(*)[PIECE]>(sums + WIDTH * HEIGHT * tiles.count);
    memset(sums, 0, sums_size);
    configure();
    for (int begin = 0; begin < depth; begin += PIECE) {
      const int some = depth - begin < PIECE ? depth - begin : PIECE;
      for (int b = 0; b < blocks; b++)
        for (int i = 0; i < some; i++) unpack(weight.block_groups(first + b)[begin + i], unpacked[b][i]);
      for (long tile = 0; tile < tiles.count; tile++)
        for (int b = 0; b < blocks; b++)
          add_up(unpacked[b], some, x + (tile * depth + begin) * HEIGHT, sums + tile * HEIGHT * WIDTH + b);
    }
    _tile_release();
    for (int row = 0; row < rows.count; row++)
      for (int b = 0; b < blocks; b++) each.finish(row, first + b, sums[row * WIDTH + b]);
  });
}

// Fewer rows are multiplied by vectors as fast as the weights are read.
constexpr int MIN_ROWS = 5;

} // namespace

void multiply_int4_on_amx(const Weight &weight, const Rows &rows, int threads) {
  if (rows.count < MIN_ROWS)
    AVX512_PRODUCTS.multiply[static_cast<int>(Form::INT4)](weight, rows, threads);
  else if (rows.type == Type::FLOAT32)
    multiply<Int4Rows<float>>(weight, rows, threads);
  else
    multiply<Int4Rows<Bf16>>(weight, rows, threads);
}

#ifdef __clang__
#pragma clang attribute pop
#endif
