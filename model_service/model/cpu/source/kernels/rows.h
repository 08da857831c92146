// Operations on one row after the other: the same instructions for a row, whatever the others are.
// bfloat16 or float32 in memory, float32 in registers.

// The norm of x, or of residual + x, which then replaces the residual. Root mean square
// normalization (Zhang and Sennrich, 2019).
template <class Number>
static void norm_row(const Number *x, Number *residual, const Number *weight, float eps, int dim, Number *out) {
  Floats squares{};
  for (int i = 0; i < dim; i += 16) {
    Floats value = load_some(x + i, dim - i);
    if (residual) {
      store_some(residual + i, value + load_some(residual + i, dim - i), dim - i);
      value = load_some(residual + i, dim - i); // as it was rounded
    }
    squares += value * value;
  }
  const Floats scale = splat(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(dim) + eps));
  const Number *total = residual ? residual : x;
  for (int i = 0; i < dim; i += 16) {
    const Floats value = load_some(total + i, dim - i) * scale;
    store_some(out + i, value * load_some(weight + i, dim - i), dim - i);
  }
}

// Rotates neighbouring features of each head in place. Angles are pairs of cosine and sine.
template <class Number> static void rotate_row(Number *heads, int count, int head_dim, const float *angles) {
  for (int i = 0; i < head_dim; i += 16) {
    const int some = head_dim - i < 16 ? head_dim - i : 16;
    const Pairs turn = pairs_of(load_some(angles + i, some));
    const Floats cosine = floats_of((turn & FIRST_OF_PAIR) | (turn << 32));
    const Floats sine = floats_of(((turn >> 32) | (turn & ~FIRST_OF_PAIR)) ^ 0x80000000); // the first is negative
    for (int head = 0; head < count; head++) {
      Number *features = heads + static_cast<long>(head) * head_dim + i;
      const Floats x = load_some(features, some);
      const Floats partner = floats_of((pairs_of(x) << 32) | (pairs_of(x) >> 32));
      store_some(features, x * cosine + partner * sine, some);
    }
  }
}

// silu(first half) x second half: SwiGLU (Shazeer, 2020).
template <class Number> static void gate_row(const Number *x, int hidden, Number *out) {
  for (int i = 0; i < hidden; i += 16) {
    const Floats gate = load_some(x + i, hidden - i);
    const Floats up = load_some(x + hidden + i, hidden - i);
    store_some(out + i, gate / (splat(1.0f) + exponential(-gate)) * up, hidden - i);
  }
}
