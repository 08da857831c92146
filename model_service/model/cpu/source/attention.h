// Attention over block tables in fixed tiles of the context, with a running softmax (Milakov and
// Gimelshein, 2018; FlashAttention, Dao et al., 2022).
//
// Tiles begin at multiples of TILE tokens of the context, and each query runs over them from first
// to last, so that its result depends on its own context alone: not on the other queries of a step,
// nor on which of them belong to the same sequence.

constexpr int TILE = 64; // tokens
constexpr int VECTORS = TILE / 16;
constexpr float NEVER = -__builtin_inff();

// Loops whose sums fill the registers, which the constants of their surroundings would take.
#define APART static __attribute__((noinline))

// One tile of keys and values of one head, widened.
struct Tile {
  float *keys;   // [head_dim, TILE]
  float *values; // [TILE, columns]
  int columns;

  INLINE_MEMBER Floats key(int feature, int vector) const { return load(keys + feature * TILE + vector * 16); }
  INLINE_MEMBER Floats value(int token, int column) const { return load(values + token * columns + column); }
};

// One tile of keys and values where they lie. Few queries read each only once.
struct TileInPlace {
  const Bf16 *keys[VECTORS], *values[VECTORS]; // of 16 tokens each
  int block_size, head_dim;

  INLINE_MEMBER Floats key(int feature, int vector) const {
    return load(keys[vector] + static_cast<long>(feature) * block_size);
  }
  INLINE_MEMBER Floats value(int token, int column) const {
    return load(values[token / 16] + token % 16 * head_dim + column);
  }
};

struct Running {
  float largest, sum;
};

INLINE void copy_widened(const AttentionCache &cache, const void *from, long at, float *to, int count) {
  if (cache.widened) {
    const uint8_t *codes = static_cast<const uint8_t *>(from) + at;
    for (int i = 0; i < count; i++) to[i] = cache.widened[codes[i]];
    return;
  }
  const Bf16 *numbers = static_cast<const Bf16 *>(from) + at;
  int i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, load(numbers + i));
  for (; i < count; i++) to[i] = widen(numbers[i]);
}

// Behind the end of the context are zeros, because unwritten memory may hold NaNs.
static void read_tile(const AttentionCache &cache, const int32_t *table, int kv_head, int first, int end,
                      const Tile &tile) {
  const int head_dim = cache.head_dim, size = cache.block_size, columns = tile.columns;
  const long block_elements = static_cast<long>(size) * head_dim;
  const int valid = end - first < TILE ? end - first : TILE;
  if (valid < TILE || columns != head_dim) {
    memset(tile.keys, 0, sizeof(float) * head_dim * TILE);
    memset(tile.values, 0, sizeof(float) * TILE * columns);
  }
  for (int at = 0; at < valid;) {
    const int in_block = (first + at) % size;
    const int count = size - in_block < valid - at ? size - in_block : valid - at;
    const long block = (static_cast<long>(table[(first + at) / size]) * cache.kv_heads + kv_head) * block_elements;
    for (int i = 0; i < head_dim; i++)
      copy_widened(cache, cache.keys, block + static_cast<long>(i) * size + in_block, tile.keys + i * TILE + at,
                   count);
    for (int i = 0; i < count; i++)
      copy_widened(cache, cache.values, block + static_cast<long>(in_block + i) * head_dim,
                   tile.values + (at + i) * columns, head_dim);
    at += count;
  }
}

static TileInPlace tile_in_place(const AttentionCache &cache, const int32_t *table, int kv_head, int first) {
  TileInPlace tile;
  tile.block_size = cache.block_size;
  tile.head_dim = cache.head_dim;
  for (int v = 0; v < VECTORS; v++) {
    const int token = first + v * 16, in_block = token % cache.block_size;
    const long block = static_cast<long>(table[token / cache.block_size]) * cache.kv_heads + kv_head;
    const long begin = block * cache.block_size * cache.head_dim;
    tile.keys[v] = static_cast<const Bf16 *>(cache.keys) + begin + in_block;
    tile.values[v] = static_cast<const Bf16 *>(cache.values) + begin + static_cast<long>(in_block) * cache.head_dim;
  }
  return tile;
}

// Scores [rows, TILE] of scaled queries [rows, head_dim].
template <int ROWS, class AnyTile>
APART void score(const float *queries, const AnyTile &tile, int head_dim, float *scores) {
  Floats result[ROWS][VECTORS] = {};
  for (int i = 0; i < head_dim; i++) {
    for (int v = 0; v < VECTORS; v++) {
      const Floats key = tile.key(i, v);
      for (int row = 0; row < ROWS; row++) result[row][v] += key * splat(queries[row * head_dim + i]);
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int v = 0; v < VECTORS; v++) store(scores + row * TILE + v * 16, result[row][v]);
}

// Adds weights [rows, TILE] x values, from column `at` on, to totals [rows, columns], which are first
// multiplied by `fading` [rows].
template <int ROWS, int WIDTH, class AnyTile>
APART void add_values(const float *weights, const float *fading, const AnyTile &tile, int at, int columns,
                       float *totals) {
  Floats result[ROWS][WIDTH];
  for (int row = 0; row < ROWS; row++)
    for (int v = 0; v < WIDTH; v++) result[row][v] = load(totals + row * columns + at + v * 16) * splat(fading[row]);
  for (int i = 0; i < TILE; i++) {
    for (int v = 0; v < WIDTH; v++) {
      const Floats value = tile.value(i, at + v * 16);
      for (int row = 0; row < ROWS; row++) result[row][v] += value * splat(weights[row * TILE + i]);
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int v = 0; v < WIDTH; v++) store(totals + row * columns + at + v * 16, result[row][v]);
}

// Turns the scores of one row into weights, in place, and returns what its earlier sums are to be
// multiplied by. Tokens from `visible` on are hidden.
APART float weigh(float *scores, int visible, Running &running) {
  for (int i = visible < 0 ? 0 : visible; i < TILE; i++) scores[i] = NEVER;
  Floats most = splat(running.largest);
  for (int v = 0; v < VECTORS; v++) most = larger(load(scores + v * 16), most);
  const float largest_now = largest(most);
  Floats weights{};
  for (int v = 0; v < VECTORS; v++) {
    const Floats weight = exponential(load(scores + v * 16) - splat(largest_now));
    store(scores + v * 16, weight);
    weights += weight;
  }
  const bool same = running.largest == largest_now; // as in most tiles
  const float fading = same ? 1.0f : exponential(splat(running.largest - largest_now))[0];
  running = {largest_now, running.sum * fading + sum(weights)};
  return fading;
}

template <int ROWS, class AnyTile>
INLINE void attend_rows(const float *queries, const AnyTile &tile, int first, const int *ends, int head_dim, int columns,
                        Running *running, float *totals) {
  float scores[ROWS * TILE], fading[ROWS];
  score<ROWS>(queries, tile, head_dim, scores);
  for (int row = 0; row < ROWS; row++) fading[row] = weigh(scores + row * TILE, ends[row] - first, running[row]);
  int at = 0;
  for (; at + 64 <= columns; at += 64)
    add_values<ROWS, 4>(scores, fading, tile, at, columns, totals);
  for (; at < columns; at += 16) add_values<ROWS, 1>(scores, fading, tile, at, columns, totals);
}

// `tokens` neighbours of one sequence, for the query heads that share one head of keys.
static void attend_span(const AttentionCache &cache, const AttentionSpan &span, int kv_head, int token, int tokens,
                        const Bf16 *query, long query_stride, int heads, Bf16 *out) {
  static thread_local Scratch scratch;
  const int sharing = heads / cache.kv_heads, head_dim = cache.head_dim;
  const int columns = (head_dim + 15) / 16 * 16, rows = tokens * sharing;
  const size_t per_row = sizeof(float) * (head_dim + columns) + sizeof(Running) + sizeof(int);
  float *floats = scratch.get<float>(per_row * rows + sizeof(float) * TILE * (head_dim + columns));
  const Tile tile = {floats, floats + TILE * head_dim, columns};
  const bool in_place = rows <= 4 && !cache.widened && cache.block_size % 16 == 0 && head_dim % 16 == 0;
  float *queries = tile.values + TILE * columns, *totals = queries + static_cast<long>(rows) * head_dim;
  Running *running = reinterpret_cast<Running *>(totals + static_cast<long>(rows) * columns);
  int *ends = reinterpret_cast<int *>(running + rows);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim));
  memset(totals, 0, sizeof(float) * rows * columns);
  for (int row = 0; row < rows; row++) {
    const long at = span.row + token + row / sharing;
    const Bf16 *from = query + at * query_stride + static_cast<long>(kv_head * sharing + row % sharing) * head_dim;
    for (int i = 0; i < head_dim; i++) queries[static_cast<long>(row) * head_dim + i] = widen(from[i]) * scale;
    running[row] = {NEVER, 0.0f};
    ends[row] = span.context_length - span.query_length + token + row / sharing + 1;
  }
  const int end = ends[rows - 1];
  for (int first = 0; first < end; first += TILE) {
    int row = 0;
    while (row < rows && ends[row] <= first) row++; // the tile lies behind these rows' tokens
    const auto attend_tile = [&](const auto &any_tile) {
      for (; row + 4 <= rows; row += 4)
        attend_rows<4>(queries + static_cast<long>(row) * head_dim, any_tile, first, ends + row, head_dim, columns,
                       running + row, totals + static_cast<long>(row) * columns);
      for (; row < rows; row++)
        attend_rows<1>(queries + static_cast<long>(row) * head_dim, any_tile, first, ends + row, head_dim, columns,
                       running + row, totals + static_cast<long>(row) * columns);
    };
    if (in_place && first + TILE <= end) {
      attend_tile(tile_in_place(cache, span.table, kv_head, first));
    } else {
      read_tile(cache, span.table, kv_head, first, end, tile);
      attend_tile(tile);
    }
  }
  for (int row = 0; row < rows; row++) {
    const long at = span.row + token + row / sharing;
    Bf16 *to = out + (at * heads + kv_head * sharing + row % sharing) * head_dim;
    const Floats inverse = splat(1.0f / running[row].sum);
    for (int i = 0; i < head_dim; i += 16)
      store_some(to + i, load(totals + static_cast<long>(row) * columns + i) * inverse, head_dim - i);
  }
}

constexpr int MAX_ROWS = 256; // queries of one task: their sums stay in a core's cache

static void attend(const AttentionCache &cache, const AttentionSpan *spans, int count, const Bf16 *query,
                   long query_stride, int heads, Bf16 *out, int threads) {
  const int sharing = heads / cache.kv_heads;
  const int piece = MAX_ROWS / sharing > 1 ? MAX_ROWS / sharing : 1; // tokens of a task
  long pieces = 0;
  for (int i = 0; i < count; i++) pieces += (spans[i].query_length + piece - 1) / piece;
  parallel(threads, pieces * cache.kv_heads, [&](long task) {
    const int kv_head = static_cast<int>(task % cache.kv_heads);
    // The last pieces first: they take longest.
    long number = pieces - 1 - task / cache.kv_heads;
    const AttentionSpan *span = spans;
    for (; number >= (span->query_length + piece - 1) / piece; span++)
      number -= (span->query_length + piece - 1) / piece;
    const int token = static_cast<int>(number) * piece;
    const int tokens = span->query_length - token < piece ? span->query_length - token : piece;
    attend_span(cache, *span, kv_head, token, tokens, query, query_stride, heads, out);
  });
}
