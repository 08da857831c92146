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

// 8-bit floats of the format e4m3 (Micikevicius et al., 2022): 4 bits of exponent and 3 of mantissa,
// numbers to 448, no infinities, one NaN of each sign.
struct Fp8 {
  uint8_t code;
};
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1)));

INLINE Words bits_of(Floats x) { return reinterpret_cast<Words>(x); }
INLINE Floats as_floats(Words bits) { return reinterpret_cast<Floats>(bits); }

INLINE Floats load(const Fp8 *p) {
  Bytes codes;
  memcpy(&codes, p, sizeof(codes));
  const Words wide = __builtin_convertvector(codes, Words), magnitude = wide & 0x7f;
  // Below 2^-6 the numbers are multiples of 2^-9: with the exponent of 2^-6 they are that much too large.
  const Words few = magnitude < 8 ? Words{} + (1 << 23) : Words{};
  const Words excess = magnitude < 8 ? Words{} + (121 << 23) : Words{};
  const Floats number = as_floats((magnitude << 20) + (120 << 23) + few) - as_floats(excess);
  const Words nan = magnitude == 0x7f ? Words{} + 0x7fc00000 : Words{};
  return as_floats(bits_of(number) | nan | ((wide & 0x80) << 24));
}

// Rounds to nearest, ties to even. Larger numbers become 448 and infinities, too; a NaN stays one.
INLINE void store(Fp8 *p, Floats x) {
  const Words sign = bits_of(x) >> 31 << 7;
  const Floats size = as_floats(bits_of(x) & 0x7fffffff);
  const Floats limited = size > splat(448.0f) ? splat(448.0f) : size;
  const Words bits = bits_of(limited);
  const Words normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  // Adding 1.5 · 2^23 rounds to an integer, here a multiple of 2^-9.
  const Words few = bits_of(limited * splat(512.0f) + splat(12582912.0f)) & 0xf;
  const Words code = size < splat(0.015625f) ? few : normal;
  const Words result = sign | (size == size ? code : Words{} + 0x7f);
  const Bytes codes = __builtin_convertvector(result, Bytes);
  memcpy(p, &codes, sizeof(codes));
}

// The first `count` of sixteen numbers; the others are zeros.
INLINE Floats load_some(const Bf16 *p, int count) {
  if (count >= 16) return load(p);
  Bf16 padded[16] = {};
  memcpy(padded, p, count * sizeof(Bf16));
  return load(padded);
}

INLINE Floats load_some(const float *p, int count) {
  if (count >= 16) return load(p);
  float padded[16] = {};
  memcpy(padded, p, count * sizeof(float));
  return load(padded);
}

INLINE void store_some(Bf16 *p, Floats x, int count) {
  if (count >= 16) return store(p, x);
  Bf16 padded[16];
  store(padded, x);
  memcpy(p, padded, count * sizeof(Bf16));
}

INLINE void store_some(float *p, Floats x, int count) {
  if (count >= 16) return store(p, x);
  memcpy(p, &x, count * sizeof(float));
}

// sums + the even halves' products + the odd halves', all of them bfloat16.
INLINE Floats add_widened_pairs(Floats sums, Words b, uint32_t a) {
  sums += as_floats(b << 16) * as_floats(Words{} + (a << 16));
  return sums + as_floats(b & 0xffff0000) * as_floats(Words{} + (a & 0xffff0000));
}

// Neighbouring numbers in one lane, the first in its lower half.
typedef uint64_t Pairs __attribute__((vector_size(64), aligned(4)));
constexpr uint64_t FIRST_OF_PAIR = 0xffffffff;

INLINE Pairs pairs_of(Floats x) { return reinterpret_cast<Pairs>(x); }
INLINE Floats floats_of(Pairs x) { return reinterpret_cast<Floats>(x); }

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// x in the first `count` lanes, another number in the others.
INLINE Floats first_lanes(Floats x, int count, float other) {
  const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lanes < count ? x : splat(other);
}

// Combines the halves until one number is left, always in the same order.
template <class Number, class Sixteen, class Combine> INLINE Number reduce(Sixteen x, const Combine &combine) {
  typedef Number Eight __attribute__((vector_size(32), aligned(4)));
  typedef Number Four __attribute__((vector_size(16), aligned(4)));
  Eight eight[2];
  memcpy(eight, &x, sizeof(x));
  eight[0] = combine(eight[0], eight[1]);
  Four four[2];
  memcpy(four, eight, sizeof(four));
  four[0] = combine(four[0], four[1]);
  four[0] = combine(four[0], Four{four[0][2], four[0][3], 0, 0});
  return combine(four[0], Four{four[0][1], 0, 0, 0})[0];
}

template <class Number, class Sixteen> INLINE Number sum_of(Sixteen x) {
  return reduce<Number>(x, [](auto a, auto b) { return a + b; });
}

template <class Number, class Sixteen> INLINE Number largest_of(Sixteen x) {
  return reduce<Number>(x, [](auto a, auto b) { return a > b ? a : b; });
}

INLINE float sum(Floats x) { return sum_of<float>(x); }
INLINE float largest(Floats x) { return largest_of<float>(x); }
INLINE int32_t sum(Ints x) { return sum_of<int32_t>(x); }
INLINE int32_t largest(Ints x) { return largest_of<int32_t>(x); }

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
