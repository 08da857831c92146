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
constexpr int PIECE = 4;   // groups whose codes, for all blocks side by side, stay in the first cache
constexpr int WIDTH = 4;   // blocks side by side

// A group's codes, each in a byte: the quadruples of inputs of 16 outputs, as a tile takes them.
struct UnpackedGroup {
  Line quadruples[GROUP_SIZE / 4];
  __m512 scales, minima;
};

// A group's inputs of a tile of rows.
struct TileInputs {
  Line codes[HEIGHT];
  float scales[HEIGHT], sums[HEIGHT]; // as in `GroupInputs`
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
    tiles.rows[tile] = HEIGHT;
    tiles.bytes[tile] = sizeof(Line);
  }
  _tile_loadconfig(&tiles);
}

INLINE __m512 widen_sixteen(const uint16_t *x) {
  const __m256i halves = _mm256_load_si256(reinterpret_cast<const __m256i *>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Asks for a third of the lines of the group that is PIECE groups further on. Each group's work has three
// parts: requests that are spread over all of it wait for no others.
template <int PART> INLINE void ask_ahead(const Group &group) {
  const Line *lines = (&group + PIECE)->codes;
  constexpr int COUNT = sizeof(Group) / sizeof(Line) / 3, SECOND_CACHE = 2;
#pragma GCC unroll 3
  for (int line = PART * COUNT; line < (PART + 1) * COUNT; line++) __builtin_prefetch(lines + line, 0, SECOND_CACHE);
}

void unpack(const Group &group, UnpackedGroup &to) {
  const __m512i mask = _mm512_set1_epi8(15);
  ask_ahead<0>(group);
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
  _tile_loadd(x_tile, x[index].codes, sizeof(Line));                                                                   \
  _tile_loadd(weights_tile, unpacked[index].quadruples, sizeof(Line));                                                 \
  ask_ahead<1>(groups[index]);                                                                                         \
  _tile_dpbssd(sums, x_tile, weights_tile);                                                                            \
  _tile_stored(sums, exact[index], sizeof(Line))

using Exact = Line[PIECE][HEIGHT];

// Exact sums of a piece's groups.
INLINE void multiply_groups(const Group *groups, const UnpackedGroup *unpacked, const TileInputs *x, Exact &exact) {
  MULTIPLY(0, 4, 6, 0);
  MULTIPLY(1, 5, 7, 1);
  MULTIPLY(2, 4, 6, 2);
  MULTIPLY(3, 5, 7, 3);
}

// Adds up to PIECE groups to the sums of the first ROWS rows of a tile with one block. Groups that a last
// piece lacks are multiplied from whatever lies there, and not added.
template <int ROWS>
void add_up(const Group *groups, const UnpackedGroup *unpacked, int count, const TileInputs *x, Line *sums) {
  alignas(64) Exact exact;
  multiply_groups(groups, unpacked, x, exact);
  __m512 totals[ROWS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; row++) totals[row] = _mm512_load_ps(sums[row].floats);
  for (int i = 0; i < count; i++) {
    const __m512 scales = unpacked[i].scales, minima = unpacked[i].minima;
    ask_ahead<2>(groups[i]);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++) {
      const __m512 products = _mm512_cvtepi32_ps(_mm512_load_si512(&exact[i][row]));
      const __m512 scaled = _mm512_mul_ps(products, _mm512_set1_ps(x[i].scales[row]));
      totals[row] = _mm512_fmadd_ps(scales, scaled, totals[row]);
      totals[row] = _mm512_fmadd_ps(minima, _mm512_set1_ps(x[i].sums[row]), totals[row]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; row++) _mm512_store_ps(sums[row].floats, totals[row]);
}

// The inputs of all rows [tiles, groups].
template <class RowsOf>
const TileInputs *arrange_tiles(RowsOf &rows, const RowTiles &tiles, int depth, Scratch &scratch, int threads) {
  // Behind the last lie those that tiles read beyond the last group.
  auto *inputs = scratch.get<TileInputs>(sizeof(TileInputs) * (tiles.count * static_cast<size_t>(depth) + PIECE));
  parallel(tiles.rows > 64 ? threads : 1, tiles.count, [&](long tile) {
    static thread_local Scratch row_scratch;
    auto *row = row_scratch.get<GroupInputs>(sizeof(GroupInputs) * depth);
    TileInputs *to = inputs + tile * depth;
    for (int i = 0; i < tiles.size(static_cast<int>(tile)); i++) {
      rows.prepare(tiles.first(static_cast<int>(tile)) + i, row, depth);
      for (int at = 0; at < depth; at++) {
        memcpy(&to[at].codes[i], row[at].codes, sizeof(Line));
        to[at].scales[i] = row[at].scale;
        to[at].sums[i] = row[at].sum;
      }
    }
    // Whatever lies there might be denormal numbers, which are slow.
    for (int i = tiles.size(static_cast<int>(tile)); i < HEIGHT; i++)
      for (int at = 0; at < depth; at++) to[at].scales[i] = to[at].sums[i] = 0.0f;
  });
  return inputs;
}

// Blocks `first` to `end`, at most WIDTH, for all rows.
template <class RowsOf>
void multiply_blocks(const Weight &weight, int first, int end, const TileInputs *x, const RowTiles &tiles,
                     const RowsOf &rows) {
  static thread_local Scratch scratch;
  const int depth = weight.groups(), blocks = end - first;
  using Sums = Line[WIDTH][HEIGHT]; // of a tile of rows
  Sums *sums = scratch.get<Sums>(sizeof(Sums) * tiles.count);
  memset(sums, 0, sizeof(Sums) * tiles.count);
  for (int begin = 0; begin < depth; begin += PIECE) {
    UnpackedGroup unpacked[WIDTH][PIECE];
    const int some = depth - begin < PIECE ? depth - begin : PIECE;
    const Group *groups[WIDTH];
    for (int b = 0; b < blocks; b++) {
      groups[b] = weight.block_groups(first + b) + begin;
      for (int i = 0; i < some; i++) unpack(groups[b][i], unpacked[b][i]);
    }
    for (int tile = 0; tile < tiles.count; tile++)
      for (int b = 0; b < blocks; b++)
        (tiles.size(tile) > HEIGHT / 2 ? add_up<HEIGHT> : add_up<HEIGHT / 2>)(
            groups[b], unpacked[b], some, x + static_cast<long>(tile) * depth + begin, sums[tile][b]);
  }
  for (int row = 0; row < tiles.rows; row++)
    for (int b = 0; b < blocks; b++) rows.finish(row, first + b, sums[row / HEIGHT][b][row % HEIGHT]);
}

template <class RowsOf> void multiply(const Weight &weight, const Rows &rows, int threads) {
  static thread_local Scratch scratch;
  RowsOf each(weight, rows);
  const RowTiles tiles(rows.count, HEIGHT, true);
  const TileInputs *x = arrange_tiles(each, tiles, weight.groups(), scratch, threads);
  parallel_ranges(threads, weight.count(), WIDTH, [&](int begin, int end) {
    configure();
    for (int first = begin; first < end; first += WIDTH)
      multiply_blocks(weight, first, first + WIDTH < end ? first + WIDTH : end, x, tiles, each);
    _tile_release();
  });
}
} // namespace

void multiply_int4_on_tiles(const Weight &weight, const Rows &rows, int threads) {
  if (rows.type == Type::FLOAT32)
    multiply<Int4Rows<float>>(weight, rows, threads);
  else
    multiply<Int4Rows<Bf16>>(weight, rows, threads);
}

#ifdef __clang__
#pragma clang attribute pop
#endif
