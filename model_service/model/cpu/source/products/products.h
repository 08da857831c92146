// What the products' files share: packed weights, and a table of functions per set of instructions.
#pragma once

#include <stdint.h>
#include <string.h>

// The type of inputs and outputs, as `ElementType` numbers it.
enum class Type { BFLOAT16, FLOAT32 };

// How a weight's numbers are kept, in the order of `Form` in products.py.
enum class Form { BFLOAT16, FLOAT32, INT8, INT4 };
constexpr int FORMS = 4;

// What is read at once: 4 bytes of each of 16 outputs. Half of it are the scales of a group of int4.
struct alignas(64) Line {
  union {
    uint32_t words[16];
    float floats[16];
    int32_t ints[16];
    uint8_t bytes[64];
    uint16_t halves[32];
  };
};

constexpr int GROUP_SIZE = 64; // inputs of int4 with a scale and a minimum of their own

// 16 outputs of a group of int4. Line i holds the codes of the inputs 4i to 4i + 3 in the low halves
// of its bytes, and those of the inputs 32 more in the high ones.
struct Group {
  Line codes[GROUP_SIZE / 8];
  uint16_t scales[16], minima[16]; // bfloat16
};

// A packed weight [outputs, inputs] of any form, as `_Weight` in products.py declares it: of 16 outputs, padded with zeros. A line of a block holds the
// next inputs of its outputs, [16, 4 bytes]: one of float32, two of bfloat16, four of int8. So 16
// lines are one tile of AMX. Behind the codes of int8 lies a line of their scales in float32. Blocks of
// int4 consist of groups.
struct Weight {
  Form form;
  Line *lines;
  int outputs, inputs; // without the padding

  int count() const { return (outputs + 15) / 16; }
  int groups() const { return inputs / GROUP_SIZE; }
  int per_line() const { return form == Form::INT8 ? 4 : form == Form::BFLOAT16 ? 2 : 1; }
  // Lines of numbers or codes in a block of any form but int4.
  int depth() const { return (inputs + 16 * per_line() - 1) / (16 * per_line()) * 16; }
  // Lines from block to block.
  long stride() const {
    if (form == Form::INT4) return groups() * static_cast<long>(sizeof(Group) / sizeof(Line));
    return depth() + (form == Form::INT8);
  }
  const Line *block(long index) const { return lines + index * stride(); }
  const Group *block_groups(long index) const { return reinterpret_cast<const Group *>(block(index)); }
};

// y [rows, outputs] of x [rows, inputs]: both are contiguous, and of one type.
struct Rows {
  Type type;
  const void *x;
  int count;
  void *y;
};

using Multiply = void (*)(const Weight &weight, const Rows &rows, int threads);

// The products of every form for one set of instructions, in the order of `Form`.
struct Products {
  Multiply multiply[FORMS];
};

extern const Products AVX2_PRODUCTS, AVX512_PRODUCTS;
extern const Products AVX512_BF16_PRODUCTS, AMX_PRODUCTS; // null where the smaller set's are as good

// Parts of AMX_PRODUCTS.
constexpr int MIN_TILE_ROWS = 5; // with fewer, vectors are faster: they keep more lines of memory in flight
void multiply_few_rows_like_tiles(const Weight &weight, const Rows &rows, int threads); // bfloat16
void multiply_int4_on_tiles(const Weight &weight, const Rows &rows, int threads);

// Multiplies with the chosen instructions.
void multiply_rows(const Weight &weight, const Rows &rows, int threads);

// Chooses the instructions of all later products, as `chasqui_use` does for the whole library.
int use_products(int instructions);
