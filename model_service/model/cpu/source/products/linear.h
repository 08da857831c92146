// Products in one order of summation: each output accumulates over its inputs from first to last,
// whatever the number of rows and threads, so a row has the same bits alone and in any batch.
//
// `Block` holds the sums of 16 outputs: Block{}, add(block, weights, x) for the next two inputs, and
// store_block. All rows of a step share one pass over the weights.

template <int ROWS, int BLOCKS>
INLINE void tile(const Weight &weight, int first, const Bf16 *x, int padded, Bf16 *y) {
  const Bf16 *blocks = weight.blocks + first * weight.stride();
  Block sums[ROWS][BLOCKS] = {};
  for (int i = 0; i < padded; i += 2) {
    const Pairs *next[BLOCKS];
    for (int b = 0; b < BLOCKS; b++)
      next[b] = reinterpret_cast<const Pairs *>(blocks + b * weight.stride() + static_cast<long>(i) * 16);
    for (int row = 0; row < ROWS; row++) {
      uint32_t pair;
      memcpy(&pair, x + static_cast<long>(row) * padded + i, sizeof(pair));
      for (int b = 0; b < BLOCKS; b++) sums[row][b] = add(sums[row][b], *next[b], pair);
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int b = 0; b < BLOCKS; b++) {
      const int output = (first + b) * 16;
      store_some(y + static_cast<long>(row) * weight.outputs + output, sums[row][b], weight.outputs - output);
    }
}

template <int ROWS, int BLOCKS>
INLINE void tiles(const Weight &weight, int first, int end, const Bf16 *x, int padded, Bf16 *y) {
  for (; first + BLOCKS <= end; first += BLOCKS) tile<ROWS, BLOCKS>(weight, first, x, padded, y);
  for (; first < end; first++) tile<ROWS, 1>(weight, first, x, padded, y);
}

static void multiply(const Weight &weight, const Bf16 *x, int rows, Bf16 *y, int threads) {
  static thread_local Scratch scratch;
  const int padded = weight.padded_inputs();
  if (padded != weight.inputs) {
    Bf16 *copy = scratch.get<Bf16>(sizeof(Bf16) * rows * padded);
    memset(copy, 0, sizeof(Bf16) * rows * padded);
    for (long row = 0; row < rows; row++)
      memcpy(copy + row * padded, x + row * weight.inputs, sizeof(Bf16) * weight.inputs);
    x = copy;
  }
  constexpr int GROUP = 8; // blocks: what one task multiplies stays in a core's cache
  parallel(threads, (weight.count() + GROUP - 1) / GROUP, [&](long task) {
    const int first = static_cast<int>(task) * GROUP;
    const int end = first + GROUP < weight.count() ? first + GROUP : weight.count();
    if (rows == 1) return tiles<1, WIDEST>(weight, first, end, x, padded, y);
    int row = 0;
    const auto input = [&] { return x + static_cast<long>(row) * padded; };
    const auto output = [&] { return y + static_cast<long>(row) * weight.outputs; };
    for (; row + TALLEST <= rows; row += TALLEST)
      tiles<TALLEST, WIDE>(weight, first, end, input(), padded, output());
    for (; row + 2 <= rows; row += 2) tiles<2, WIDE>(weight, first, end, input(), padded, output());
    for (; row < rows; row++) tiles<1, WIDE>(weight, first, end, input(), padded, output());
  });
}
