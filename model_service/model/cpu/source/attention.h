// Attention over block tables in fixed tiles of the context, with a running softmax (Milakov and
// Gimelshein, 2018; FlashAttention, Dao et al., 2022).
//
// Tiles begin at multiples of TILE tokens of the context, and each query runs over them from first
// to last, so that its result depends on its own context alone: not on the other queries of a step,
// nor on which of them belong to the same sequence.

constexpr int TILE = 64; // tokens
constexpr int VECTORS = TILE / 16;
constexpr float NEVER = -__builtin_inff();

// One tile of keys and values of one head, widened.
struct Tile {
  float *keys;   // [head_dim, TILE]
  float *values; // [TILE, columns]
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
                      int columns, const Tile &tile) {
  const int head_dim = cache.head_dim, size = cache.block_size;
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

// Scores [rows, TILE] of scaled queries [rows, head_dim].
template <int ROWS> INLINE void score(const float *queries, const Tile &tile, int head_dim, float *scores) {
  Floats result[ROWS][VECTORS] = {};
  for (int i = 0; i < head_dim; i++) {
    for (int v = 0; v < VECTORS; v++) {
      const Floats key = load(tile.keys + i * TILE + v * 16);
      for (int row = 0; row < ROWS; row++) result[row][v] += key * splat(queries[row * head_dim + i]);
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int v = 0; v < VECTORS; v++) store(scores + row * TILE + v * 16, result[row][v]);
}

// Adds weights [rows, TILE] x values to totals [rows, columns], which are first multiplied by
// `fading` [rows].
template <int ROWS, int WIDTH>
INLINE void add_values(const float *weights, const float *fading, const float *values, int columns, float *totals) {
  Floats result[ROWS][WIDTH];
  for (int row = 0; row < ROWS; row++)
    for (int v = 0; v < WIDTH; v++) result[row][v] = load(totals + row * columns + v * 16) * splat(fading[row]);
  for (int i = 0; i < TILE; i++) {
    for (int v = 0; v < WIDTH; v++) {
      const Floats value = load(values + i * columns + v * 16);
      for (int row = 0; row < ROWS; row++) result[row][v] += value * splat(weights[row * TILE + i]);
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int v = 0; v < WIDTH; v++) store(totals + row * columns + v * 16, result[row][v]);
}

// Turns the scores of one row into weights, in place, and returns what its earlier sums are to be
// multiplied by. Tokens from `visible` on are hidden.
INLINE float weigh(float *scores, int visible, Running &running) {
  Floats most = splat(running.largest);
  for (int v = 0; v < VECTORS; v++) {
    for (int i = v * 16; i < v * 16 + 16; i++)
      if (i >= visible) scores[i] = NEVER;
    most = larger(load(scores + v * 16), most);
  }
  const float largest_now = largest(most);
  Floats weights{};
  for (int v = 0; v < VECTORS; v++) {
    const Floats weight = exponential(load(scores + v * 16) - splat(largest_now));
    store(scores + v * 16, weight);
    weights += weight;
  }
  const float fading = exponential(splat(running.largest - largest_now))[0];
  running = {largest_now, running.sum * fading + sum(weights)};
  return fading;
}

template <int ROWS>
INLINE void attend_rows(const float *queries, const Tile &tile, int first, const int *ends, int head_dim, int columns,
                        Running *running, float *totals) {
  float scores[ROWS * TILE], fading[ROWS];
  score<ROWS>(queries, tile, head_dim, scores);
  for (int row = 0; row < ROWS; row++) fading[row] = weigh(scores + row * TILE, ends[row] - first, running[row]);
  int at = 0;
  for (; at + 64 <= columns; at += 64)
    add_values<ROWS, 4>(scores, fading, tile.values + at, columns, totals + at);
  for (; at < columns; at += 16) add_values<ROWS, 1>(scores, fading, tile.values + at, columns, totals + at);
}

// `tokens` neighbours of one sequence, for the query heads that share one head of keys.
static void attend_span(const AttentionCache &cache, const AttentionSpan &span, int kv_head, int token, int tokens,
                        const Bf16 *query, long query_stride, int heads, Bf16 *out) {
  static thread_local Scratch scratch;
  const int sharing = heads / cache.kv_heads, head_dim = cache.head_dim;
  const int columns = (head_dim + 15) / 16 * 16, rows = tokens * sharing;
  const size_t per_row = sizeof(float) * (head_dim + columns) + sizeof(Running) + sizeof(int);
  float *floats = scratch.get<float>(per_row * rows + sizeof(float) * TILE * (head_dim + columns));
  const Tile tile = {floats, floats + TILE * head_dim};
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
    read_tile(cache, span.table, kv_head, first, end, columns, tile);
    int row = 0;
    while (row < rows && ends[row] <= first) row++; // the tile lies behind these rows' tokens
#define ROWS_AT_ONCE(n)                                                                                                \
  for (; row + n <= rows; row += n)                                                                                    \
    attend_rows<n>(queries + static_cast<long>(row) * head_dim, tile, first, ends + row, head_dim, columns,            \
                   running + row, totals + static_cast<long>(row) * columns);
    ROWS_AT_ONCE(4)
    ROWS_AT_ONCE(1)
#undef ROWS_AT_ONCE
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
