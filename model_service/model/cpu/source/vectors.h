// Sixteen numbers at a time, in the compiler's vectors: one register of AVX-512, two of AVX2.
//
// Included below a choice of instructions, inside a namespace of its own, so that each copy is
// compiled for its instructions alone.

using Bf16 = uint16_t;
typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4)));
typedef Bf16 Halves __attribute__((vector_size(32), aligned(2)));

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

INLINE Floats splat(float x) { return Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE Floats load(const float *p) { return *reinterpret_cast<const Floats *>(p); }
INLINE void store(float *p, Floats x) { *reinterpret_cast<Floats *>(p) = x; }

INLINE Floats load(const Bf16 *p) {
  const Words bits = __builtin_convertvector(*reinterpret_cast<const Halves *>(p), Words) << 16;
  return reinterpret_cast<Floats>(bits);
}

INLINE float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// Rounds to nearest, ties to even; a NaN stays one.
INLINE void store(Bf16 *p, Floats x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words result = (x == x) ? rounded : (Words{} + 0x7fc0);
  *reinterpret_cast<Halves *>(p) = __builtin_convertvector(result, Halves);
}

// The first `count` of sixteen numbers; the others are zeros.
INLINE Floats load_some(const Bf16 *p, int count) {
  if (count >= 16) return load(p);
  Bf16 padded[16] = {};
  memcpy(padded, p, count * sizeof(Bf16));
  return load(padded);
}

INLINE void store_some(Bf16 *p, Floats x, int count) {
  if (count >= 16) return store(p, x);
  Bf16 padded[16];
  store(padded, x);
  memcpy(p, padded, count * sizeof(Bf16));
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Always in the same order.
INLINE float sum(Floats x) {
  float part[8];
  for (int i = 0; i < 8; i++) part[i] = x[i] + x[i + 8];
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; i++) part[i] += part[i + width];
  return part[0];
}

INLINE float largest(Floats x) {
  float part[8];
  for (int i = 0; i < 8; i++) part[i] = x[i] > x[i + 8] ? x[i] : x[i + 8];
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; i++) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
  return part[0];
}

// e^x to some 2 units in the last place; 1 for 0, and 0 below -87. A NaN stays one.
INLINE Floats exponential(Floats x) {
  const Floats limited = x < splat(88.0f) ? x : (x == x ? splat(88.0f) : x);
  const Floats low = limited > splat(-87.0f) ? limited : (x == x ? splat(-87.0f) : x);
  // 2^n · e^r; adding 1.5 · 2^23 rounds to an integer.
  const Floats magic = splat(12582912.0f);
  const Floats shifted = low * splat(1.44269504f) + magic;
  const Floats n = shifted - magic;
  Floats r = low - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Floats p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const Ints exponent = (reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic)) << 23;
  const Floats result = reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + exponent);
  return x < splat(-87.0f) ? splat(0.0f) : result;
}
