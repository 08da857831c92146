// Attention over block tables in fixed tiles of the context (as FlashAttention, Dao et al., 2022).
//
// Tiles begin at multiples of TILE tokens of the context. Each query's sums over one tile are computed
// for themselves and then added to those of the tiles before it, from first to last. So a result
// depends on the query's own context alone: not on the other queries of a step, nor on whether one
// thread computes all tiles or several share them. Also, rounding errors do not grow with the context.

constexpr int HEIGHT = 16;    // queries that are computed together
constexpr int MAX_ROWS = 256; // of one task: their sums stay in a core's cache

// Neighbouring tokens of one sequence. Their queries for one head of keys are the rows of a task, token
// after token.
struct Piece {
  const AttentionSpan *span;
  int token, tokens; // of the span

  // Tokens that the queries of a row see.
  int end(int row, int sharing) const {
    return span->context_length - span->query_length + token + row / sharing + 1;
  }
  int context() const { return end(tokens - 1, 1); }
  int tiles() const { return (context() + TILE - 1) / TILE; }
};

// What one step's attention is computed from.
template <class Number> struct Attention {
  const AttentionCache &cache;
  const AttentionInputs<Number> &inputs;
  Number *out; // [tokens, heads, head_dim]

  int sharing() const { return inputs.heads / cache.kv_heads; }
  int columns() const { return padded(cache.head_dim, STEP); }
  int head(int kv_head, int row) const { return kv_head * sharing() + row % sharing(); }
  long token(const Piece &piece, int row) const { return piece.span->row + piece.token + row / sharing(); }
};

// The queries of a task, padded with zeros: [rows, columns].
template <class Number>
void read_queries(const Attention<Number> &attention, const Piece &piece, int kv_head, int rows, Number *queries) {
  const AttentionInputs<Number> &inputs = attention.inputs;
  const int columns = attention.columns(), head_dim = attention.cache.head_dim;
  memset(queries, 0, sizeof(Number) * padded(rows, HEIGHT) * columns);
  for (int row = 0; row < rows; row++)
    memcpy(queries + static_cast<long>(row) * columns,
           inputs.queries + attention.token(piece, row) * inputs.query_stride +
               static_cast<long>(attention.head(kv_head, row)) * head_dim,
           sizeof(Number) * head_dim);
}

template <class Number>
void write_results(const Attention<Number> &attention, const Piece &piece, int kv_head, int first, int rows,
                   const Sums &sums) {
  const int columns = attention.columns(), head_dim = attention.cache.head_dim;
  for (int row = 0; row < rows; row++) {
    const long head = attention.token(piece, first + row) * attention.inputs.heads + attention.head(kv_head, first + row);
    Number *to = attention.out + head * head_dim;
    const Floats inverse = splat(1.0f / sums.weights[row]);
    for (int i = 0; i < head_dim; i += 16)
      store_some(to + i, load(sums.values + row * columns + i) * inverse, head_dim - i);
  }
}

template <class Number>
void read_tile(const Attention<Number> &attention, const Piece &piece, int kv_head, int first,
               const Tile<Number> &tile) {
  const int left = piece.context() - first, tokens = left < TILE ? left : TILE;
  const auto read = attention.cache.eight_bits ? read_tile<Number, Fp8> : read_tile<Number, Number>;
  read(attention.cache, piece.span->table, kv_head, first, tokens, tile);
}

// Memory for one group of queries and one tile.
template <class Number> struct GroupWork {
  alignas(64) float scores[HEIGHT * TILE];
  alignas(64) Number weights[HEIGHT * TILE] = {};
};

// The sums of up to HEIGHT queries, beginning with the piece's row `first_row`, over one tile.
template <class Products, class Number = typename Products::Number>
void attend_group(const Products &products, const Attention<Number> &attention, const Piece &piece, int first_row,
                  int rows, const Number *queries, const Tile<Number> &tile, int first, GroupWork<Number> &work,
                  const Sums &sums) {
  constexpr int PER = PER_WORD<Number>;
  const int sharing = attention.sharing(), columns = tile.columns;
  const int left = piece.end(first_row + rows - 1, sharing) - first;
  const int tokens = padded(left < TILE ? left : TILE, STEP);
  const float unit = LOG2_E / __builtin_sqrtf(static_cast<float>(attention.cache.head_dim));
  products.multiply(queries, tile.key_words, rows, tile.key_words, {tile.keys, 16, tile.key_words * 16}, tokens / 16,
                    work.scores, TILE);
  for (int row = 0; row < rows; row++) {
    int visible = piece.end(first_row + row, sharing) - first;
    if (visible > TILE) visible = TILE;
    if (visible < 0) visible = 0;
    sums.weights[row] = weigh(work.scores + row * TILE, visible, tokens, unit, sums.largest[row], work.weights + row * TILE);
  }
  products.multiply(work.weights, TILE / PER, rows, tokens / PER, {tile.values, columns, 16}, columns / 16, sums.values,
                    columns);
}

// All tiles of one piece, for the query heads that share one head of keys.
template <class Products, class Number = typename Products::Number>
void attend_piece(const Attention<Number> &attention, const Piece &piece, int kv_head) {
  static thread_local Scratch scratch;
  const int sharing = attention.sharing(), columns = attention.columns(), head_dim = attention.cache.head_dim;
  const int rows = piece.tokens * sharing, groups = (rows + HEIGHT - 1) / HEIGHT;
  const long sums_floats = Sums::floats(columns) * (groups + 1);
  const size_t numbers = Tile<Number>::elements(head_dim) + static_cast<size_t>(groups) * HEIGHT * columns;
  float *floats = scratch.get<float>(sizeof(float) * sums_floats + sizeof(Number) * numbers);
  Number *memory = reinterpret_cast<Number *>(floats + sums_floats);
  const Tile<Number> tile(memory, head_dim);
  Number *queries = memory + Tile<Number>::elements(head_dim);
  GroupWork<Number> work;
  const Sums part(floats);
  const auto total = [&](int group) { return Sums(floats + Sums::floats(columns) * (group + 1)); };
  const Products products;
  read_queries(attention, piece, kv_head, rows, queries);
  part.clear(columns);
  for (int group = 0; group < groups; group++) total(group).clear(columns);
  for (int first = 0; first < piece.context(); first += TILE) {
    read_tile(attention, piece, kv_head, first, tile);
    for (int group = 0; group < groups; group++) {
      const int row = group * HEIGHT, some = rows - row < HEIGHT ? rows - row : HEIGHT;
      if (piece.end(row + some - 1, sharing) <= first) continue;
      attend_group(products, attention, piece, row, some, queries + static_cast<long>(row) * columns, tile, first, work,
                   part);
      join(part, some, columns, total(group));
    }
  }
  for (int group = 0; group < groups; group++) {
    const int row = group * HEIGHT, some = rows - row < HEIGHT ? rows - row : HEIGHT;
    write_results(attention, piece, kv_head, row, some, total(group));
  }
}

// One tile of a piece of at most HEIGHT queries.
template <class Products, class Number = typename Products::Number>
void attend_tile(const Attention<Number> &attention, const Piece &piece, int kv_head, int number, const Sums &sums) {
  static thread_local Scratch scratch;
  const int head_dim = attention.cache.head_dim, rows = piece.tokens * attention.sharing();
  const long tile_elements = Tile<Number>::elements(head_dim);
  Number *memory = scratch.get<Number>(sizeof(Number) * (tile_elements + HEIGHT * attention.columns()));
  const Tile<Number> tile(memory, head_dim);
  GroupWork<Number> work;
  const Products products;
  read_queries(attention, piece, kv_head, rows, memory + tile_elements);
  read_tile(attention, piece, kv_head, number * TILE, tile);
  sums.clear(attention.columns());
  attend_group(products, attention, piece, 0, rows, memory + tile_elements, tile, number * TILE, work, sums);
}

// Pieces of at most HEIGHT queries each, whose tiles the threads share.
template <class Products, class Number = typename Products::Number>
void attend_tiles(const Attention<Number> &attention, const Piece *pieces, int count, int threads) {
  static thread_local Scratch scratch;
  const int kv_heads = attention.cache.kv_heads, columns = attention.columns();
  long tiles = 0;
  for (int i = 0; i < count; i++) tiles += pieces[i].tiles();
  float *memory = scratch.get<float>(sizeof(float) * Sums::floats(columns) * tiles * kv_heads);
  // The sums of a piece's tiles lie one after the other, for one head and then for the next.
  const auto sums = [&](long index) { return Sums(memory + Sums::floats(columns) * index); };
  parallel(threads, tiles * kv_heads, [&](long task) {
    const Piece *piece = pieces;
    long index = task;
    for (; index >= static_cast<long>(piece->tiles()) * kv_heads; piece++) index -= piece->tiles() * kv_heads;
    const int kv_head = static_cast<int>(index / piece->tiles()), number = static_cast<int>(index % piece->tiles());
    attend_tile<Products>(attention, *piece, kv_head, number, sums(task));
  });
  parallel(threads, static_cast<long>(count) * kv_heads, [&](long task) {
    const Piece *piece = pieces + task / kv_heads;
    const int kv_head = static_cast<int>(task % kv_heads), rows = piece->tokens * attention.sharing();
    long index = kv_head * piece->tiles();
    for (const Piece *before = pieces; before < piece; before++) index += before->tiles() * kv_heads;
    for (int number = 1; number < piece->tiles(); number++) join(sums(index + number), rows, columns, sums(index));
    write_results(attention, *piece, kv_head, 0, rows, sums(index));
  });
}

// The spans in pieces of at most `tokens` tokens. Returns their number.
static int cut(const AttentionSpan *spans, int count, int tokens, Piece *pieces) {
  int number = 0;
  for (const AttentionSpan *span = spans; span < spans + count; span++)
    for (int token = 0; token < span->query_length; token += tokens, number++) {
      const int left = span->query_length - token;
      pieces[number] = {span, token, left < tokens ? left : tokens};
    }
  return number;
}

template <class Number>
void write_keys_and_values(const Attention<Number> &attention, const Piece *pieces, int count, int threads) {
  const AttentionCache &cache = attention.cache;
  const AttentionInputs<Number> &inputs = attention.inputs;
  const auto write = cache.eight_bits ? write_token<Number, Fp8> : write_token<Number, Number>;
  parallel(threads, count, [&](long task) {
    const Piece &piece = pieces[task];
    for (int token = 0; token < piece.tokens; token++) {
      const int position = piece.end(0, 1) - 1 + token, block = piece.span->table[position / cache.block_size];
      const long row = piece.span->row + piece.token + token;
      for (int head = 0; head < cache.kv_heads; head++)
        write(cache, block, position % cache.block_size, head,
              inputs.keys + row * inputs.key_stride + static_cast<long>(head) * cache.head_dim,
              inputs.values + row * inputs.value_stride + static_cast<long>(head) * cache.head_dim);
    }
  });
}

template <class Products, class Number = typename Products::Number>
void attend(const AttentionCache &cache, const AttentionSpan *spans, int count, const AttentionInputs<Number> &inputs,
            Number *out, int threads) {
  static thread_local Scratch scratch;
  const Attention<Number> attention = {cache, inputs, out};
  const int sharing = attention.sharing(), kv_heads = cache.kv_heads;
  long tokens = 0, context = 0;
  for (int i = 0; i < count; i++) tokens += spans[i].query_length, context += spans[i].context_length;
  int rows = MAX_ROWS; // fewer, if there would be too few tasks for all threads
  while (rows > 4 * HEIGHT && tokens * sharing / rows * kv_heads < 4 * threads) rows /= 2;
  Piece *pieces = scratch.get<Piece>(sizeof(Piece) * tokens);
  const int number = cut(spans, count, rows / sharing ? rows / sharing : 1, pieces);
  const long row_elements = static_cast<long>(kv_heads) * cache.head_dim;
  write_keys_and_values(attention, pieces, number, threads_for(tokens * row_elements, threads));
  threads = threads_for(context * row_elements / 2, threads);
  const long tasks = static_cast<long>(number) * kv_heads;
  if (threads > 1 && tokens == count && sharing <= HEIGHT && tasks < 4 * threads)
    return attend_tiles<Products>(attention, pieces, number, threads);
  parallel(threads, tasks, [&](long task) {
    // The last pieces of a prompt first: they take longest.
    attend_piece<Products>(attention, pieces[number - 1 - task / kv_heads], static_cast<int>(task % kv_heads));
  });
}
