// The softmax of scores, tile by tile (Milakov and Gimelshein, 2018).
//
// Exponentials have the base 2, which is cheaper: e^(s · scale) = 2^(s · scale · log2 e).

constexpr float LOG2_E = 1.44269504f;
constexpr float NEVER = -__builtin_inff();

// 2^x for x up to 0, exactly 1 for 0 and next to nothing below -126. A NaN stays one. Polynomials for
// -0.5 to 0.5, fitted to the least relative error: 2e-9 for float32 and 1e-4 for bfloat16, which
// rounds by 4e-3.
template <class Number> INLINE Floats power_of_two(Floats x) {
  const Floats limited = splat(-126.0f) > x ? splat(-126.0f) : x;
  // Adding 1.5 · 2^23 rounds to an integer.
  const Floats magic = splat(12582912.0f);
  const Floats shifted = limited + magic;
  const Floats r = limited - (shifted - magic);
  Floats p;
  if (sizeof(Number) == 4) {
    p = splat(1.53533620e-4f);
    p = p * r + splat(1.33988739e-3f);
    p = p * r + splat(9.61843692e-3f);
    p = p * r + splat(5.55033237e-2f);
    p = p * r + splat(2.40226477e-1f);
    p = p * r + splat(6.93147182e-1f);
  } else {
    p = splat(5.50089292e-2f);
    p = p * r + splat(2.42210954e-1f);
    p = p * r + splat(6.93282902e-1f);
  }
  p = p * r + splat(1.0f);
  return as_floats(bits_of(p) + (bits_of(shifted) << 23));
}

// Weights are rounded as their products with values need it.
INLINE void store_weights(float *p, Floats weights) { store(p, weights); }

// Attention's sums of 16 queries over a part of their contexts.
struct Sums {
  float *largest; // [16], scores in units of the exponent
  float *weights; // [16], sums of the weights relative to the largest
  float *values;  // [16, columns], sums of weights x values

  static long floats(int columns) { return 32L + 16L * columns; }
  explicit Sums(float *memory) : largest(memory), weights(memory + 16), values(memory + 32) {}

  void clear(int columns) const {
    memset(largest, 0, sizeof(float) * floats(columns));
    store(largest, splat(NEVER));
  }
};

// Turns the scores [TILE] of one query into weights [tokens] of which those from `visible` on are zero.
// Returns the sum of the weights.
template <class Number>
INLINE float weigh(const float *scores, int visible, int tokens, float unit, float &largest_score, Number *weights) {
  const int whole = visible / 16, rest = visible % 16, vectors = whole + (rest > 0);
  Floats most = splat(NEVER);
  for (int v = 0; v < whole; v++) most = larger(load(scores + v * 16), most);
  if (rest) most = larger(first_lanes(load(scores + whole * 16), rest, NEVER), most);
  largest_score = largest(most) * unit;
  const Floats units = splat(unit), offset = splat(largest_score);
  Floats total{};
  for (int v = 0; v < vectors; v++) {
    Floats weight = power_of_two<Number>(load(scores + v * 16) * units - offset);
    if (v == whole) weight = first_lanes(weight, rest, 0);
    total += weight;
    store_weights(weights + v * 16, weight);
  }
  if (vectors * 16 < tokens) memset(weights + vectors * 16, 0, sizeof(Number) * (tokens - vectors * 16));
  return sum(total);
}

// Adds a part's sums to those of the parts before it.
INLINE void join(const Sums &part, int rows, int columns, const Sums &total) {
  const Floats before = load(total.largest), now = load(part.largest), most = larger(before, now);
  const Floats fading = power_of_two<float>(before - most), weight = power_of_two<float>(now - most);
  store(total.largest, most);
  store(total.weights, load(total.weights) * fading + load(part.weights) * weight);
  for (int row = 0; row < rows; row++) {
    const Floats fade = splat(fading[row]), add = splat(weight[row]);
    for (int i = row * columns; i < (row + 1) * columns; i += 16)
      store(total.values + i, load(total.values + i) * fade + load(part.values + i) * add);
  }
}
