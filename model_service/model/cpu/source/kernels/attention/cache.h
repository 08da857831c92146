// The layout of the cache, and tiles of it.
//
// Products add up pairs of 16-bit numbers, or single 32-bit ones: `PER_WORD` numbers in a word of 32
// bits. So a block holds, for each of its heads, keys as [head_dim / PER_WORD, block_size, PER_WORD]:
// one load gets the same features of 16 neighbouring tokens. Values are [block_size / PER_WORD,
// head_dim, PER_WORD]: one load gets 16 features of the same tokens. With 8-bit floats the order is
// the same. A block's place for values is that of an even number of tokens.

template <class Number> constexpr int PER_WORD = 4 / sizeof(Number);
constexpr int TILE = 128; // tokens; attention.h says what follows from it
constexpr int STEP = 64;  // products take tokens and features in steps of this many

INLINE int padded(int count, int step) { return (count + step - 1) / step * step; }

// Where the keys and values of one head of one block begin, in elements.
struct BlockOffsets {
  long keys, values;
};

INLINE BlockOffsets block_offsets(const AttentionCache &cache, int block, int head) {
  const long number = static_cast<long>(block) * cache.kv_heads + head;
  const long key_elements = static_cast<long>(cache.block_size) * cache.head_dim;
  const long value_elements = static_cast<long>(padded(cache.block_size, 2)) * cache.head_dim;
  return {number * key_elements, number * value_elements};
}

INLINE void copy(const Bf16 *from, Bf16 *to, int count) { memcpy(to, from, sizeof(Bf16) * count); }
INLINE void copy(const float *from, float *to, int count) { memcpy(to, from, sizeof(float) * count); }

template <class From, class To> INLINE void copy(const From *from, To *to, int count) {
  for (; count >= 16; count -= 16, from += 16, to += 16) store(to, load(from));
  if (!count) return;
  From some[16] = {};
  memcpy(some, from, sizeof(From) * count);
  To converted[16];
  store(converted, load(some));
  memcpy(to, converted, sizeof(To) * count);
}

// Writes one token's key and value [head_dim] of one head to its place in a block.
template <class Number, class Stored>
void write_token(const AttentionCache &cache, int block, int place, int head, const Number *key, const Number *value) {
  constexpr int PER = PER_WORD<Number>;
  const BlockOffsets begin = block_offsets(cache, block, head);
  Stored *keys = static_cast<Stored *>(cache.keys) + begin.keys + place * PER;
  Stored *values = static_cast<Stored *>(cache.values) + begin.values +
                   static_cast<long>(place / PER) * cache.head_dim * PER + place % PER;
  for (int first = 0; first < cache.head_dim; first += 16) {
    const int some = cache.head_dim - first < 16 ? cache.head_dim - first : 16;
    Stored key_part[16], value_part[16];
    copy(key + first, key_part, some);
    copy(value + first, value_part, some);
    for (int i = 0; i < some; i++) {
      const int feature = first + i;
      keys[static_cast<long>(feature / PER) * cache.block_size * PER + feature % PER] = key_part[i];
      values[feature * PER] = value_part[i];
    }
  }
}

// One tile of the context of one head, with neither gaps nor 8-bit floats.
template <class Number> struct Tile {
  Number *keys;   // [TILE / 16, key_words, 16, PER_WORD]
  Number *values; // [TILE / PER_WORD, columns, PER_WORD]
  int key_words;  // of a token, padded with zeros to STEP features
  int columns;    // head_dim, padded to STEP

  static long elements(int head_dim) { return 2L * TILE * padded(head_dim, STEP); }

  // Takes memory of `elements` numbers.
  Tile(Number *memory, int head_dim)
      : keys(memory), values(memory + static_cast<long>(TILE) * padded(head_dim, STEP)),
        key_words(padded(head_dim, STEP) / PER_WORD<Number>), columns(padded(head_dim, STEP)) {
    if (columns != head_dim) memset(memory, 0, sizeof(Number) * elements(head_dim));
  }
};

// Copies neighbouring tokens of one block, which are also neighbours among 16 of the tile.
template <class Number, class Stored>
void read_run(const AttentionCache &cache, int block, int head, int place, int count, int at, const Tile<Number> &tile) {
  constexpr int PER = PER_WORD<Number>;
  const int head_dim = cache.head_dim, size = cache.block_size;
  const BlockOffsets begin = block_offsets(cache, block, head);
  const Stored *keys = static_cast<const Stored *>(cache.keys) + begin.keys + place * PER;
  Number *to_keys = tile.keys + (static_cast<long>(at / 16) * tile.key_words * 16 + at % 16) * PER;
  if (size == 16 && count == 16) {
    copy(keys, to_keys, 16 * head_dim);
  } else {
    for (int word = 0; word < head_dim / PER; word++)
      copy(keys + static_cast<long>(word) * size * PER, to_keys + word * 16 * PER, count * PER);
  }
  const Stored *values = static_cast<const Stored *>(cache.values) + begin.values;
  if (place % PER == 0 && at % PER == 0) {
    for (int token = 0; token < count; token += PER) // copies the neighbour of a last single token, too
      copy(values + static_cast<long>(place + token) * head_dim, tile.values + static_cast<long>(at + token) * tile.columns,
           head_dim * PER);
    return;
  }
  for (int token = 0; token < count; token++) {
    const int from = place + token, to = at + token;
    for (int i = 0; i < head_dim; i++)
      copy(values + (static_cast<long>(from / PER) * head_dim + i) * PER + from % PER,
           tile.values + (static_cast<long>(to / PER) * tile.columns + i) * PER + to % PER, 1);
  }
}

// Copies `tokens` of the context from `first` on, at most TILE. Behind them, values are zeros up to a
// whole STEP: their weights are zeros, but unwritten memory may hold NaNs.
template <class Number, class Stored>
void read_tile(const AttentionCache &cache, const int32_t *table, int head, int first, int tokens,
               const Tile<Number> &tile) {
  constexpr int PER = PER_WORD<Number>;
  const int size = cache.block_size;
  for (int at = 0; at < tokens;) {
    const int place = (first + at) % size;
    int count = size - place < 16 - at % 16 ? size - place : 16 - at % 16;
    if (count > tokens - at) count = tokens - at;
    read_run<Number, Stored>(cache, table[(first + at) / size], head, place, count, at, tile);
    at += count;
  }
  Number *behind = tile.values + static_cast<long>(tokens / PER) * tile.columns * PER;
  if (tokens % PER) {
    for (int i = 0; i < tile.columns; i++) behind[i * PER + 1] = 0;
    behind += tile.columns * PER;
  }
  memset(behind, 0, reinterpret_cast<char *>(tile.values + static_cast<long>(padded(tokens, STEP)) * tile.columns) - reinterpret_cast<char *>(behind));
}
