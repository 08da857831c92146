// Operations on one row after the other: the same instructions for a row, whatever the others are.
// bfloat16 in memory, float32 in registers.

// The norm of x, or of residual + x, which then replaces the residual. Root mean square
// normalization (Zhang and Sennrich, 2019).
static void norm_row(const Bf16 *x, Bf16 *residual, const Bf16 *weight, float eps, int dim, Bf16 *out) {
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
  const Bf16 *total = residual ? residual : x;
  for (int i = 0; i < dim; i += 16) {
    const Floats value = load_some(total + i, dim - i) * scale;
    store_some(out + i, value * load_some(weight + i, dim - i), dim - i);
  }
}

// Rotates neighbouring features of each head in place. Angles are pairs of cosine and sine.
static void rotate_row(Bf16 *heads, int count, int head_dim, const float *angles) {
  for (int head = 0; head < count; head++) {
    Bf16 *features = heads + static_cast<long>(head) * head_dim;
    for (int i = 0; i < head_dim; i += 16) {
      const int some = head_dim - i < 16 ? head_dim - i : 16;
      const Floats x = load_some(features + i, some);
      Floats turn;
      if (some == 16) {
        turn = load(angles + i);
      } else {
        float padded[16] = {};
        memcpy(padded, angles + i, some * sizeof(float));
        turn = load(padded);
      }
      Floats cosine, sine, partner;
      for (int at = 0; at < 16; at += 2) {
        cosine[at] = cosine[at + 1] = turn[at];
        sine[at] = -turn[at + 1];
        sine[at + 1] = turn[at + 1];
        partner[at] = x[at + 1];
        partner[at + 1] = x[at];
      }
      store_some(features + i, x * cosine + partner * sine, some);
    }
  }
}

// silu(first half) x second half: SwiGLU (Shazeer, 2020).
static void gate_row(const Bf16 *x, int hidden, Bf16 *out) {
  for (int i = 0; i < hidden; i += 16) {
    const Floats gate = load_some(x + i, hidden - i);
    const Floats up = load_some(x + hidden + i, hidden - i);
    store_some(out + i, gate / (splat(1.0f) + exponential(-gate)) * up, hidden - i);
  }
}
