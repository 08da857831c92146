// Products of up to 16 rows, whose numbers lie in words of 32 bits: c = a · b.
//
// Each output adds up the words from first to last, whatever the number of rows is.

// A matrix of words: its first number, and the distances of its rows and of its parts of 16 columns, in words.
template <class Number> struct Words16 {
  const Number *numbers;
  int row_stride, part_stride;
};

INLINE Floats add_product(Floats sums, Words b, uint32_t a, float) {
  return sums + as_floats(b) * as_floats(Words{} + a);
}

// Loops whose sums fill the registers, which the constants of their surroundings would take.
#define APART static __attribute__((noinline))

template <int ROWS, int PARTS, class Number>
APART void multiply_rows(const Number *a, int a_stride, int depth, Words16<Number> b, float *c, int c_stride) {
  constexpr int PER = PER_WORD<Number>;
  Floats sums[ROWS][PARTS] = {};
  for (int i = 0; i < depth; i++) {
    Words words[PARTS];
    for (int part = 0; part < PARTS; part++)
      memcpy(&words[part], b.numbers + (static_cast<long>(i) * b.row_stride + part * b.part_stride) * PER, sizeof(Words));
    for (int row = 0; row < ROWS; row++) {
      uint32_t word;
      memcpy(&word, a + (static_cast<long>(row) * a_stride + i) * PER, sizeof(word));
      for (int part = 0; part < PARTS; part++) sums[row][part] = add_product(sums[row][part], words[part], word, Number{});
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int part = 0; part < PARTS; part++) store(c + row * c_stride + part * 16, sums[row][part]);
}

// Products in vectors, with as many sums at once as there are registers.
template <class N, int ROWS, int PARTS> struct VectorProducts {
  using Number = N;
  VectorProducts() {}

  // c [rows, parts x 16] of a [rows, depth] and b [depth, parts x 16]; `depth` and strides in words.
  void multiply(const Number *a, int a_stride, int rows, int depth, Words16<Number> b, int parts, float *c,
                int c_stride) const {
    for (int part = 0; part < parts; part += PARTS, b.numbers += PARTS * b.part_stride * PER_WORD<Number>) {
      int row = 0;
      const auto from = [&] { return a + static_cast<long>(row) * a_stride * PER_WORD<Number>; };
      const auto to = [&] { return c + static_cast<long>(row) * c_stride + part * 16; };
      for (; row + ROWS <= rows; row += ROWS) multiply_rows<ROWS, PARTS>(from(), a_stride, depth, b, to(), c_stride);
      for (; row < rows; row++) multiply_rows<1, PARTS>(from(), a_stride, depth, b, to(), c_stride);
    }
  }
};
