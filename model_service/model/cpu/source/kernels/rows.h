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

// out = softmax(logits / temperature). Quotients that overflow count as the largest number.
static void softmax_row(const float *logits, float temperature, int count, float *out) {
  typedef double Doubles __attribute__((vector_size(128), aligned(8)));
  const Floats divisor = splat(temperature), most = splat(__FLT_MAX__);
  const auto scaled = [&](int i) {
    const Floats quotient = load_some(logits + i, count - i) / divisor;
    const Floats limited = quotient < most ? quotient : most;
    return limited > -most ? limited : -most;
  };
  Floats top = splat(-__FLT_MAX__);
  for (int i = 0; i < count; i += 16) top = larger(top, first_lanes(scaled(i), count - i, -__FLT_MAX__));
  const Floats peak = splat(largest(top));
  Doubles sums{};
  for (int i = 0; i < count; i += 16) {
    const Floats weight = first_lanes(exponential(scaled(i) - peak), count - i, 0.0f);
    sums += __builtin_convertvector(weight, Doubles);
    store_some(out + i, weight, count - i);
  }
  double sum = 0;
  for (int lane = 0; lane < 16; lane++) sum += sums[lane];
  const Floats total = splat(static_cast<float>(sum));
  for (int i = 0; i < count; i += 16) store_some(out + i, load_some(out + i, count - i) / total, count - i);
}
