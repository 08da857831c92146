// The sums of 16 outputs in each form of weights, in terms of a set of instructions: `Floats16` and
// `Ints16` are sixteen numbers in registers, `SignedCodes` a line of int8, `HalfCodes` half a line of
// int4, and `GroupSums` the sums of their products within a group.

// Sums of float32: pieces of the inputs are added up apart and then together, which rounds less than
// to add all inputs to one sum. Integers would lose nothing by pieces, nor gain.
struct FloatSums {
  Floats16 piece;

  INLINE_MEMBER void begin(const Line &) { piece = spread(0.0f); }
  INLINE_MEMBER void end(Line &sums) const { store(sums, add(load_floats(sums), piece)); }
};

struct Float32Block : FloatSums {
  using Unit = float;
  using Weights = Floats16;
  static constexpr int TALLEST = MANY_ROWS, WIDE = MANY_BLOCKS, WIDEST = ONE_ROW_BLOCKS;

  INLINE_MEMBER static Weights read(const Line &line) { return load_floats(line); }
  INLINE_MEMBER void add_products(const Weights &weights, Unit x) {
    piece = multiply_add(weights, spread(x), piece);
  }
};

// Sums that go on from piece to piece. bfloat16 is multiplied as float32.
struct WidenedBlock {
  struct Unit {
    float even, odd;
  };
  struct Weights {
    Floats16 even, odd;
  };
  static constexpr int TALLEST = MANY_ROWS, WIDE = MANY_BLOCKS, WIDEST = ONE_ROW_BLOCKS;
  Floats16 sums;

  INLINE_MEMBER void begin(const Line &before) { sums = load_floats(before); }
  INLINE_MEMBER void end(Line &after) const { store(after, sums); }
  INLINE_MEMBER static Weights read(const Line &line) { return {widen_even(line), widen_odd(line)}; }
  INLINE_MEMBER void add_products(const Weights &weights, const Unit &x) {
    sums = multiply_add(weights.even, spread(x.even), sums);
    sums = multiply_add(weights.odd, spread(x.odd), sums);
  }
};

struct Int8Block {
  using Unit = uint32_t; // four codes
  using Weights = SignedCodes;
  static constexpr int TALLEST = MANY_INT8_ROWS, WIDE = MANY_BLOCKS, WIDEST = ONE_ROW_BLOCKS;
  Ints16 sums;

  INLINE_MEMBER void begin(const Line &before) { sums = load_ints(before); }
  INLINE_MEMBER void end(Line &after) const { store(after, sums); }
  INLINE_MEMBER static Weights read(const Line &line) { return signed_codes(line); }
  INLINE_MEMBER void add_products(const Weights &weights, Unit x) { sums = add_signed(sums, weights, x); }
};

// Sums of blocks of int4: products of codes are added exactly within a group, and then multiplied by
// the group's scales.
struct GroupTile {
  using Unit = GroupInputs;
  static constexpr int PIECE = 16; // groups
  static constexpr int TALLEST = MANY_INT4_ROWS, WIDE = MANY_INT4_BLOCKS, WIDEST = ONE_ROW_INT4_BLOCKS;

  static int depth(const Weight &weight) { return weight.groups(); }

  template <int ROWS, int BLOCKS>
  static void run(const Line *const (&blocks)[BLOCKS], int begin, int end, const Unit *units, int height, Line *sums,
                  int width) {
    Floats16 totals[ROWS][BLOCKS];
    for (int row = 0; row < ROWS; row++)
      for (int b = 0; b < BLOCKS; b++) totals[row][b] = load_floats(sums[row * width + b]);
    for (int at = begin; at < end; at++, units += height) {
      const Group *groups[BLOCKS];
      for (int b = 0; b < BLOCKS; b++) groups[b] = reinterpret_cast<const Group *>(blocks[b]) + at;
      GroupSums exact[ROWS][BLOCKS] = {};
      constexpr int LINES = GROUP_SIZE / 8;
      for (int b = 0; b < BLOCKS; b++) __builtin_prefetch(groups[b]->codes + LINES + AHEAD / BLOCKS);
      for (int line = 0; line < LINES; line++) {
        HalfCodes low[BLOCKS], high[BLOCKS];
        for (int b = 0; b < BLOCKS; b++) __builtin_prefetch(groups[b]->codes + line + AHEAD / BLOCKS);
        for (int b = 0; b < BLOCKS; b++) low[b] = low_codes(groups[b]->codes[line]);
        for (int b = 0; b < BLOCKS; b++) high[b] = high_codes(groups[b]->codes[line]);
        for (int row = 0; row < ROWS; row++)
          for (int b = 0; b < BLOCKS; b++) {
            exact[row][b].add_products(low[b], units[row].codes[line]);
            exact[row][b].add_products(high[b], units[row].codes[line + LINES]);
            if (line % 4 == 3) exact[row][b].widen();
          }
      }
      for (int b = 0; b < BLOCKS; b++) {
        const Floats16 scales = widen(groups[b]->scales), minima = widen(groups[b]->minima);
        for (int row = 0; row < ROWS; row++) {
          Floats16 &total = totals[row][b];
          total = multiply_add(scales, multiply(exact[row][b].floats(), spread(units[row].scale)), total);
          total = multiply_add(minima, spread(units[row].sum), total);
        }
      }
    }
    for (int row = 0; row < ROWS; row++)
      for (int b = 0; b < BLOCKS; b++) store(sums[row * width + b], totals[row][b]);
  }
};

// By the type of inputs and outputs.
template <int ZERO_POINT> static void multiply_int8(const Weight &weight, const Rows &rows, int threads) {
  if (rows.type == Type::FLOAT32)
    multiply<LineTile<Int8Block>, Int8Rows<float, ZERO_POINT>>(weight, rows, threads);
  else
    multiply<LineTile<Int8Block>, Int8Rows<Bf16, ZERO_POINT>>(weight, rows, threads);
}

static void multiply_int4(const Weight &weight, const Rows &rows, int threads) {
  if (rows.type == Type::FLOAT32)
    multiply<GroupTile, Int4Rows<float>>(weight, rows, threads);
  else
    multiply<GroupTile, Int4Rows<Bf16>>(weight, rows, threads);
}
