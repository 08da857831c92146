// Packs and quantizes weights, for every set of instructions alike.

#include "../parallel.h"
#include "../scratch.h"
#include "products.h"

#include <sys/mman.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {
#include "../vectors.h"

#include "inputs.h"

constexpr float INT8_MAX_CODE = 127.0f, INT4_MAX_CODE = 15.0f;

// Rounds numbers of -127 to 127 to the nearest integers, ties to even.
INLINE Ints nearest(Floats x) {
  const Floats magic = splat(12582912.0f); // 1.5 · 2^23
  return reinterpret_cast<Ints>(x + magic) - reinterpret_cast<Ints>(magic);
}

INLINE float round_to_bfloat16(float x) {
  Bf16 rounded[16];
  store(rounded, splat(x));
  return widen(rounded[0]);
}

INLINE float smallest(Floats x) { return -largest(-x); }

// The codes of a row as `Int8Weight.quantize` chooses them. Returns their scale.
template <class T> float quantize_int8(const T *row, int inputs, int8_t *codes) {
  Floats peaks{};
  for (int i = 0; i < inputs; i += 16) {
    const Floats x = read(row + i, inputs - i);
    peaks = larger(peaks, larger(x, -x));
  }
  const float scale = largest(peaks) / INT8_MAX_CODE;
  const Floats divisor = splat(scale > 0 ? scale : 1.0f);
  for (int i = 0; i < inputs; i += 16)
    *reinterpret_cast<SignedBytes *>(codes + i) =
        __builtin_convertvector(nearest(read(row + i, inputs - i) / divisor), SignedBytes);
  return scale;
}

// A group's codes as `Int4Weight.quantize` chooses them, in pairs as in `Group`.
template <class T> void quantize_int4(const T *row, uint8_t *pairs, uint16_t &scale_bits, uint16_t &minimum_bits) {
  Floats least = read(row, 16), most = least;
  for (int i = 16; i < GROUP_SIZE; i += 16) {
    const Floats x = read(row + i, 16);
    least = x < least ? x : least;
    most = larger(most, x);
  }
  const float minimum = round_to_bfloat16(smallest(least));
  const float scale = round_to_bfloat16((largest(most) - minimum) / INT4_MAX_CODE);
  const Floats divisor = splat(scale > 0 ? scale : 1.0f), limit = splat(INT4_MAX_CODE);
  const auto codes = [&](const T *x) {
    const Floats exact = larger((read(x, 16) - splat(minimum)) / divisor, Floats{});
    return nearest(exact < limit ? exact : limit);
  };
  for (int i = 0; i < GROUP_SIZE / 2; i += 16) {
    const Ints both = codes(row + i) | codes(row + i + GROUP_SIZE / 2) << 4;
    *reinterpret_cast<SignedBytes *>(pairs + i) = __builtin_convertvector(both, SignedBytes);
  }
  const auto bits = [](float x) {
    uint32_t wide;
    memcpy(&wide, &x, sizeof(wide));
    return static_cast<uint16_t>(wide >> 16);
  };
  scale_bits = bits(scale);
  minimum_bits = bits(minimum);
}

// Fills one block's place for one of its outputs, with zeros if `row` is null.
template <class T> void pack_lines(const Weight &weight, const T *row, long block, int output, Scratch &scratch) {
  Line *lines = const_cast<Line *>(weight.block(block));
  const int depth = weight.depth();
  uint32_t *words = scratch.get<uint32_t>(sizeof(uint32_t) * depth);
  memset(words, 0, sizeof(uint32_t) * depth);
  if (weight.form == Form::INT8)
    lines[depth].floats[output] = row ? quantize_int8(row, weight.inputs, reinterpret_cast<int8_t *>(words)) : 0.0f;
  else if (row)
    memcpy(words, row, sizeof(T) * weight.inputs);
  for (int at = 0; at < depth; at++) lines[at].words[output] = words[at];
}

template <class T> void pack_groups(const Weight &weight, const T *row, long block, int output) {
  Group *groups = const_cast<Group *>(weight.block_groups(block));
  for (int at = 0; at < weight.groups(); at++, groups++) {
    uint32_t words[GROUP_SIZE / 8] = {};
    groups->scales[output] = groups->minima[output] = 0;
    if (row)
      quantize_int4(row + at * GROUP_SIZE, reinterpret_cast<uint8_t *>(words), groups->scales[output],
                    groups->minima[output]);
    for (int line = 0; line < GROUP_SIZE / 8; line++) groups->codes[line].words[output] = words[line];
  }
}

template <class T> void pack(const Weight &weight, const T *rows, int threads) {
  parallel(threads, weight.count(), [&](long block) {
    static thread_local Scratch scratch;
    for (int output = 0; output < 16; output++) {
      const long index = block * 16 + output;
      const T *row = index < weight.outputs ? rows + index * weight.inputs : nullptr;
      if (weight.form == Form::INT4)
        pack_groups(weight, row, block, output);
      else
        pack_lines(weight, row, block, output, scratch);
    }
  });
}

// Fewer entries of the processor's page table; a system without large pages ignores it.
void use_large_pages(const Weight &weight) {
  const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(weight.lines) + page - 1) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(weight.block(weight.count())) / page * page;
  if (end > begin) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
}
} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Bytes that `chasqui_pack` writes, at an address that 64 divides.
EXPORT long chasqui_packed_size(const Weight *weight) {
  return weight->count() * weight->stride() * static_cast<long>(sizeof(Line));
}

// Packs rows [outputs, inputs], contiguous, of the form's own type; int8 and int4 quantize either type.
EXPORT void chasqui_pack(int type, const void *rows, const Weight *weight, int threads) {
  use_large_pages(*weight);
  if (static_cast<Type>(type) == Type::FLOAT32)
    pack(*weight, static_cast<const float *>(rows), threads);
  else
    pack(*weight, static_cast<const Bf16 *>(rows), threads);
}

#ifdef __clang__
#pragma clang attribute pop
#endif
