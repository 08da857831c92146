// The rows of a product: how its inputs are laid out for tiles of rows, and how its sums become outputs.
//
// A class of rows has `prepare`, which converts a row to units, each of which is multiplied by one
// line of weights or one group of int4; `start`, an integer with which a row's sums begin; and
// `finish`, which stores the sums of 16 outputs of a row.

// Tiles of rows, all of one height but the last. Units lie in the order in which a tile reads them:
// [tiles, depth, height].
struct RowTiles {
  int rows, count, height;

  // As few tiles as possible of at most `tallest` rows, and alike.
  RowTiles(int rows, int tallest, bool whole = false)
      : rows(rows), count((rows + tallest - 1) / tallest), height(whole ? tallest : (rows + count - 1) / count) {}

  int first(int tile) const { return tile * height; }
  int size(int tile) const { return rows - first(tile) < height ? rows - first(tile) : height; }
};

template <class Unit, class RowsOf>
static Unit *arrange(RowsOf &rows, const RowTiles &tiles, int depth, Scratch &scratch, int threads) {
  Unit *units = scratch.get<Unit>(sizeof(Unit) * tiles.count * tiles.height * static_cast<size_t>(depth));
  parallel(tiles.rows > 64 ? threads : 1, tiles.count, [&](long tile) {
    static thread_local Scratch row_scratch;
    Unit *row = row_scratch.get<Unit>(sizeof(Unit) * depth);
    Unit *to = units + tile * depth * tiles.height;
    for (int i = 0; i < tiles.size(static_cast<int>(tile)); i++) {
      rows.prepare(tiles.first(static_cast<int>(tile)) + i, row, depth);
      for (int at = 0; at < depth; at++) to[static_cast<long>(at) * tiles.height + i] = row[at];
    }
  });
  return units;
}

template <class T> INLINE Floats read(const T *p, int count) { return load_some(p, count); }
template <class T> INLINE void write(T *p, Floats x, int count) { store_some(p, x, count); }

INLINE Floats floats(const Line &sums) { return load(sums.floats); }

template <class T> struct Outputs {
  T *y;
  int outputs;

  explicit Outputs(const Weight &weight, const Rows &rows) : y(static_cast<T *>(rows.y)), outputs(weight.outputs) {}

  void put(int row, int block, Floats sums) const {
    write(y + static_cast<long>(row) * outputs + block * 16, sums, outputs - block * 16);
  }
};

// Numbers that are multiplied as they are.
template <class T> struct PlainRows {
  const T *x;
  int inputs;
  Outputs<T> to;

  PlainRows(const Weight &weight, const Rows &rows)
      : x(static_cast<const T *>(rows.x)), inputs(weight.inputs), to(weight, rows) {}

  template <class Unit> void prepare(int row, Unit *units, int depth) const {
    const size_t size = sizeof(T) * inputs;
    memcpy(units, x + static_cast<long>(row) * inputs, size);
    memset(reinterpret_cast<char *>(units) + size, 0, sizeof(Unit) * depth - size);
  }
  int32_t start(int) const { return 0; }
  void finish(int row, int block, const Line &sums) const { to.put(row, block, floats(sums)); }
};

// bfloat16 for processors that multiply it as float32.
struct WidenedRows : PlainRows<Bf16> {
  using PlainRows<Bf16>::PlainRows;

  template <class Unit> void prepare(int row, Unit *units, int depth) const {
    const Bf16 *from = x + static_cast<long>(row) * inputs;
    float *to = reinterpret_cast<float *>(units);
    const int padded = depth * static_cast<int>(sizeof(Unit) / sizeof(float));
    for (int i = 0; i < padded; i += 16) write(to + i, i < inputs ? read(from + i, inputs - i) : Floats{}, padded - i);
  }
};

typedef int8_t SignedBytes __attribute__((vector_size(16), aligned(1)));

// The scale and the sum of the codes of some inputs, which are ±127 for the largest of them.
struct Quantized {
  float scale;
  int32_t sum;
};

// Writes codes of `count` numbers; zeros fill the last 16. If any number is not finite, neither is the
// scale. Numbers below 2^-119, with which 127 / peak would overflow, count as zeros.
template <class T> INLINE Quantized quantize(const T *x, int count, int8_t *codes) {
  Ints peaks{};
  for (int i = 0; i < count; i += 16) {
    const Ints magnitude = reinterpret_cast<Ints>(read(x + i, count - i)) & 0x7fffffff;
    peaks = magnitude > peaks ? magnitude : peaks; // as integers: NaN is larger than an infinity
  }
  const int32_t bits = largest(peaks);
  float peak;
  memcpy(&peak, &bits, sizeof(peak));
  const bool usable = peak >= 0x1p-119f && bits < 0x7f800000;
  const Floats factor = splat(usable ? 127.0f / peak : 0.0f);
  const Floats magic = splat(12582912.0f); // 1.5 · 2^23: adding it rounds to an integer
  Ints sums{};
  for (int i = 0; i < count; i += 16) {
    const Floats rounded = (usable ? read(x + i, count - i) : Floats{}) * factor + magic;
    const Ints values = reinterpret_cast<Ints>(rounded) - reinterpret_cast<Ints>(magic);
    sums += values;
    *reinterpret_cast<SignedBytes *>(codes + i) = __builtin_convertvector(values, SignedBytes);
  }
  return {usable ? peak / 127.0f : bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f, sum(sums)};
}

// Rows in 8 bits, a scale for each. Codes are added exactly, so their order does not matter.
// `ZERO_POINT` is what the products add to each code of the weight.
template <class T, int ZERO_POINT> struct Int8Rows {
  const Weight &weight;
  const T *x;
  Outputs<T> to;
  Quantized *quantized; // of each row

  Int8Rows(const Weight &weight, const Rows &rows)
      : weight(weight), x(static_cast<const T *>(rows.x)), to(weight, rows) {
    static thread_local Scratch scratch;
    quantized = scratch.get<Quantized>(sizeof(Quantized) * rows.count);
  }

  template <class Unit> void prepare(int row, Unit *units, int depth) {
    const int whole = (weight.inputs + 15) / 16 * 16;
    int8_t *codes = reinterpret_cast<int8_t *>(units);
    quantized[row] = quantize(x + static_cast<long>(row) * weight.inputs, weight.inputs, codes);
    memset(codes + whole, 0, sizeof(Unit) * depth - whole);
  }
  int32_t start(int row) const { return -ZERO_POINT * quantized[row].sum; }
  void finish(int row, int block, const Line &sums) const {
    const Ints exact = *reinterpret_cast<const Ints *>(sums.ints);
    const Floats scales = floats(weight.block(block)[weight.depth()]);
    to.put(row, block, __builtin_convertvector(exact, Floats) * scales * splat(quantized[row].scale));
  }
};

// A row's inputs of one group of int4, in 8 bits.
struct GroupInputs {
  uint32_t codes[GROUP_SIZE / 4];
  float scale, sum; // the scale, and the sum of the codes times the scale
};

// Rows in 8 bits, a scale for each group.
template <class T> struct Int4Rows {
  const T *x;
  int inputs;
  Outputs<T> to;

  Int4Rows(const Weight &weight, const Rows &rows)
      : x(static_cast<const T *>(rows.x)), inputs(weight.inputs), to(weight, rows) {}

  void prepare(int row, GroupInputs *groups, int count) const {
    const T *from = x + static_cast<long>(row) * inputs;
    for (int group = 0; group < count; group++) {
      GroupInputs &each = groups[group];
      const Quantized found = quantize(from + group * GROUP_SIZE, GROUP_SIZE, reinterpret_cast<int8_t *>(each.codes));
      each.scale = found.scale;
      each.sum = static_cast<float>(found.sum) * found.scale;
    }
  }
  int32_t start(int) const { return 0; }
  void finish(int row, int block, const Line &sums) const { to.put(row, block, floats(sums)); }
};
