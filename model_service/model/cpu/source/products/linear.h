// Products in one order of summation, whatever the number of rows and threads. So a row has the same
// bits alone and in any batch. All rows of a step share one pass over the weights.
//
// A `Tile` computes the sums of some rows and blocks; a `Block` holds the sums of 16 outputs of a row.

template <int N> struct Constant {
  static constexpr int value = N;
};

// Calls body(Constant<rows>()), for 1 to MAX rows.
template <int MAX, class Body> INLINE void with_constant(int rows, const Body &body) {
  if constexpr (MAX > 1) {
    if (rows < MAX) return with_constant<MAX - 1>(rows, body);
  }
  body(Constant<MAX>());
}

// How the processor treats numbers while an object of this type lives: here, as usual.
struct UsualMode {
  UsualMode() {} // without it, a compiler takes the object for a forgotten one
};

// Lines that are read from memory before they are needed, of all blocks side by side.
constexpr int AHEAD = 96;

// Sums of blocks that are read line by line, in pieces of so many lines: those of all blocks of a tile
// stay in the first cache.
template <class Block, int LINES = 128> struct LineTile {
  using Unit = typename Block::Unit;
  static constexpr int PIECE = LINES;
  static constexpr int TALLEST = Block::TALLEST, WIDE = Block::WIDE, WIDEST = Block::WIDEST;

  static int depth(const Weight &weight) { return weight.depth(); }

  template <int ROWS, int BLOCKS>
  static void run(const Line *const (&blocks)[BLOCKS], int begin, int end, const Unit *units, int height, Line *sums,
                  int width) {
    Block block[ROWS][BLOCKS];
    for (int row = 0; row < ROWS; row++)
      for (int b = 0; b < BLOCKS; b++) block[row][b].begin(sums[row * width + b]);
    for (int at = begin; at < end; at++, units += height) {
      typename Block::Weights weights[BLOCKS];
      for (int b = 0; b < BLOCKS; b++) __builtin_prefetch(blocks[b] + at + AHEAD / BLOCKS);
      for (int b = 0; b < BLOCKS; b++) weights[b] = Block::read(blocks[b][at]);
      for (int row = 0; row < ROWS; row++)
        for (int b = 0; b < BLOCKS; b++) block[row][b].add_products(weights[b], units[row]);
    }
    for (int row = 0; row < ROWS; row++)
      for (int b = 0; b < BLOCKS; b++) block[row][b].end(sums[row * width + b]);
  }
};

// Adds to the sums of all rows and of blocks `first` to `end`. A block that is not there is computed
// like the last.
template <class Tile, int TALLEST, int BLOCKS>
static void add_up(const Weight &weight, int first, int end, const RowTiles &tiles, const typename Tile::Unit *units,
                   Line *sums, int width) {
  const int depth = Tile::depth(weight);
  for (int begin = 0; begin < depth; begin += Tile::PIECE)
    for (int block = first; block < end; block += BLOCKS) {
      const Line *blocks[BLOCKS];
      for (int b = 0; b < BLOCKS; b++) blocks[b] = weight.block(block + b < end ? block + b : end - 1);
      for (int tile = 0; tile < tiles.count; tile++) {
        const long row = tiles.first(tile);
        with_constant<TALLEST>(tiles.size(tile), [&](auto rows) {
          Tile::template run<decltype(rows)::value, BLOCKS>(
              blocks, begin, begin + Tile::PIECE < depth ? begin + Tile::PIECE : depth,
              units + row * depth + static_cast<long>(begin) * tiles.height, tiles.height,
              sums + row * width + block - first, width);
        });
      }
    }
}

template <class Tile, class RowsOf, class Mode = UsualMode>
static void multiply(const Weight &weight, const Rows &rows, int threads) {
  static thread_local Scratch scratch;
  RowsOf each(weight, rows);
  const RowTiles tiles(rows.count, Tile::TALLEST);
  const auto *units = arrange<typename Tile::Unit>(each, tiles, Tile::depth(weight), scratch, threads);
  // One row reads blocks side by side; of many tiles of rows, each finds them in the core's cache.
  const bool large = weight.count() >= 4 * threads * Tile::WIDEST;
  const int group = large && (rows.count == 1 || tiles.count > 1) ? Tile::WIDEST : Tile::WIDE;
  parallel_ranges(threads, weight.count(), group, [&](int begin, int end) {
    static thread_local Scratch sums_scratch;
    Line *sums = sums_scratch.get<Line>(sizeof(Line) * rows.count * group);
    const Mode mode;
    for (int first = begin; first < end; first += group) {
      const int last = first + group < end ? first + group : end;
      for (int row = 0; row < rows.count; row++)
        for (int b = 0; b < group; b++)
          for (int32_t &sum : sums[row * group + b].ints) sum = each.start(row);
      if (rows.count == 1 && group == Tile::WIDEST)
        add_up<Tile, 1, Tile::WIDEST>(weight, first, last, tiles, units, sums, group);
      else
        add_up<Tile, Tile::TALLEST, Tile::WIDE>(weight, first, last, tiles, units, sums, group);
      for (int row = 0; row < rows.count; row++)
        for (int block = first; block < last; block++) each.finish(row, block, sums[row * group + block - first]);
    }
  });
}
