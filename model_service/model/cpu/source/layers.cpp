// The network: all operations of a step in one call, or those of its layers between two sums over shards.
//
// A return to Python between two products finds its code and data no longer in the processor's caches,
// because the weights have passed through them: that takes longer than the operations.

#include "operations.h"
#include "scratch.h"

namespace {
// One layer's weights, as layers.py declares them.
struct Layer {
  const void *attention_norm, *ffn_norm; // [dim]
  Weight wqkv, wo, w13, w2;
};

// What does not change from step to step.
struct Network {
  const Layer *layers;
  Type type;
  int dim, heads;
  float eps;
};

// One step over a flat batch of `rows` tokens.
struct Step {
  void *x;        // [rows, dim]: what is still to be added to the residual stream
  void *residual; // [rows, dim]: the stream
  const float *angles;          // [rows, head_dim / 2, 2]
  const AttentionCache *caches; // of each layer
  const AttentionSpan *spans;
  int rows, span_count, threads;
};

// What a whole step needs beside the layers.
struct Ends {
  const void *embedding; // [vocab, dim]
  const float *rotation; // [positions, head_dim / 2, 2]
  const void *norm;      // [dim]
  Weight output;
};

// The tokens of a step, and the rows whose logits are wanted.
struct Batch {
  const int32_t *tokens; // [rows]
  const int32_t *wanted; // [count], ascending
  float *logits;         // [count, vocab]
  int32_t *finite;       // [count]: whether all of a row's are
  int32_t *largest;      // [count]: the lowest id among the largest of a row that is finite
  int count;
};

template <class Number> class Halves {
public:
  Halves(const Network &network, const Step &step)
      : network(network), step(step), x(static_cast<Number *>(step.x)), residual(static_cast<Number *>(step.residual)) {
    static thread_local Scratch scratch;
    const Layer &layer = network.layers[0];
    const size_t inner = larger(layer.wqkv.outputs, layer.w13.outputs);
    const size_t outer = larger(layer.wo.inputs, layer.w2.inputs);
    normed = scratch.get<Number>(sizeof(Number) * step.rows * (network.dim + inner + outer));
    wide = normed + static_cast<long>(step.rows) * network.dim;
    narrow = wide + step.rows * inner;
  }

  // Half 2i is the attention of layer i, 2i + 1 its feed-forward network. `last` is the weight that
  // follows the last of them, if there is one.
  void compute(int begin, int end, const Weight *last) const {
    for (int half = begin; half < end; half++) {
      const Layer &layer = network.layers[half / 2];
      if (half % 2)
        feed_forward(half / 2, half + 1 == end ? last : &(&layer + 1)->wqkv);
      else
        attention(half / 2, half + 1 == end ? last : &layer.w13);
    }
  }

  void multiply(const Weight &weight, const Number *from, int rows, Number *to, const Weight *next) const {
    if (Team *team = Team::current()) team->ask_ahead(next ? beginning(*next) : Stretch{});
    multiply_rows(weight, {type_of(Number{}), from, rows, to}, step.threads);
  }

private:
  // x = wo(attention(wqkv(norm(residual += x)))). `next` is the weight after these, if there is one.
  void attention(int index, const Weight *next) const {
    const Layer &layer = network.layers[index];
    const AttentionCache &cache = step.caches[index];
    const int keys = network.heads * cache.head_dim, values = keys + cache.kv_heads * cache.head_dim;
    const long stride = layer.wqkv.outputs;
    add_and_norm(layer.attention_norm, index == 0);
    multiply(layer.wqkv, normed, wide, &layer.wo);
    rotate(wide, stride, step.rows, network.heads + cache.kv_heads, cache.head_dim, step.angles, step.threads);
    const AttentionInputs<Number> inputs = {wide, wide + keys, wide + values, stride, stride, stride, network.heads};
    kernels_of(Number{}).attend(cache, step.spans, step.span_count, inputs, narrow, step.threads);
    multiply(layer.wo, narrow, x, next);
  }

  // x = w2(gate(w13(norm(residual += x))))
  void feed_forward(int index, const Weight *next) const {
    const Layer &layer = network.layers[index];
    add_and_norm(layer.ffn_norm, false);
    multiply(layer.w13, normed, wide, &layer.w2);
    gate(wide, step.rows, layer.w2.inputs, narrow, step.threads);
    multiply(layer.w2, narrow, x, next);
  }

  static size_t larger(int a, int b) { return static_cast<size_t>(a > b ? a : b); }

  // normed = norm(residual += x); at the beginning of the stream, residual = x.
  void add_and_norm(const void *weight, bool begins) const {
    if (begins) memcpy(residual, x, sizeof(Number) * step.rows * network.dim);
    norm(x, begins ? nullptr : residual, static_cast<const Number *>(weight), network.eps, step.rows, network.dim,
         normed, step.threads);
  }

  void multiply(const Weight &weight, const Number *from, Number *to, const Weight *next) const {
    multiply(weight, from, step.rows, to, next);
  }

  // As much of each thread's first range of the weight as leaves the second cache room for all else.
  Stretch beginning(const Weight &weight) const {
    constexpr long MOST = 400 << 10;
    const long lines = first_range(step.threads, weight.count()) * weight.stride();
    const long step_bytes = lines * static_cast<long>(sizeof(Line));
    return {reinterpret_cast<const char *>(weight.lines), step_bytes, step_bytes < MOST ? step_bytes : MOST};
  }

  const Network &network;
  const Step &step;
  Number *x, *residual;
  Number *normed, *wide, *narrow; // [rows, dim]; outputs of wqkv or w13; inputs of wo or w2
};

void to_float(const uint16_t *numbers, int count, float *out) {
  for (int i = 0; i < count; i++) {
    const uint32_t bits = static_cast<uint32_t>(numbers[i]) << 16;
    memcpy(out + i, &bits, sizeof bits);
  }
}

constexpr int LANES = 16; // of loops that the compiler turns into vectors

bool all_finite(const float *numbers, int count) {
  constexpr uint32_t EXPONENT = 0x7F800000;
  uint32_t found[LANES] = {};
  const auto look = [&](int i, int lane) {
    uint32_t bits;
    memcpy(&bits, numbers + i, sizeof bits);
    found[lane] |= (bits & EXPONENT) == EXPONENT;
  };
  const int whole = count / LANES * LANES;
  for (int i = 0; i < whole; i += LANES)
    for (int lane = 0; lane < LANES; lane++) look(i + lane, lane);
  for (int i = whole; i < count; i++) look(i, 0);
  uint32_t any = 0;
  for (int lane = 0; lane < LANES; lane++) any |= found[lane];
  return !any;
}

// Where the first of the largest is.
int first_largest(const float *numbers, int count) {
  float most[LANES];
  for (int lane = 0; lane < LANES; lane++) most[lane] = numbers[0];
  const auto look = [&](int i, int lane) { most[lane] = numbers[i] > most[lane] ? numbers[i] : most[lane]; };
  const int whole = count / LANES * LANES;
  for (int i = 0; i < whole; i += LANES)
    for (int lane = 0; lane < LANES; lane++) look(i + lane, lane);
  for (int i = whole; i < count; i++) look(i, 0);
  float largest = most[0];
  for (int lane = 1; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
  int first = 0;
  while (first < count - 1 && numbers[first] != largest) first++;
  return first;
}

// The whole network on one rank. `step` has neither x, nor residual, nor angles yet.
template <class Number>
void whole_step(const Network &network, Step step, int halves, const Ends &ends, const Batch &batch) {
  constexpr bool IS_FLOAT = sizeof(Number) == sizeof(float);
  const long dim = network.dim, head_dim = step.caches[0].head_dim, vocab = ends.output.outputs;
  static thread_local Scratch scratch;
  const size_t numbers = 2 * step.rows * dim + batch.count * (dim + (IS_FLOAT ? 0 : vocab));
  const size_t before = step.rows * (sizeof(float) * head_dim + sizeof(int));
  float *angles = scratch.get<float>(before + sizeof(Number) * numbers);
  int *positions = reinterpret_cast<int *>(angles + step.rows * head_dim);
  Number *x = reinterpret_cast<Number *>(positions + step.rows), *residual = x + step.rows * dim;
  Number *normed = residual + step.rows * dim, *product = normed + batch.count * dim;
  if constexpr (IS_FLOAT) product = batch.logits;
  step.x = x, step.residual = residual, step.angles = angles;

  for (int i = 0; i < step.span_count; i++) {
    const AttentionSpan &span = step.spans[i];
    for (int n = 0; n < span.query_length; n++)
      positions[span.row + n] = span.context_length - span.query_length + n;
  }
  const auto embedding = static_cast<const Number *>(ends.embedding);
  const auto norm = static_cast<const Number *>(ends.norm);
  const Halves<Number> layers(network, step);
  Team::assemble(step.threads, [&] {
    for_rows(step.rows, step.rows * dim, step.threads, [&](long row) {
      memcpy(x + row * dim, embedding + batch.tokens[row] * dim, sizeof(Number) * dim);
      memcpy(angles + row * head_dim, ends.rotation + positions[row] * head_dim, sizeof(float) * head_dim);
    });
    layers.compute(0, halves, batch.count ? &ends.output : nullptr);
    for_rows(batch.count, batch.count * dim, step.threads, [&](long i) {
      const long at = batch.wanted[i] * dim;
      kernels_of(Number{}).norm_row(x + at, residual + at, norm, network.eps, network.dim, normed + i * dim);
    });
    if (!batch.count) return;
    layers.multiply(ends.output, normed, batch.count, product, nullptr);
    for_rows(batch.count, batch.count * vocab, step.threads, [&](long i) {
      float *logits = batch.logits + i * vocab;
      if constexpr (!IS_FLOAT) to_float(product + i * vocab, ends.output.outputs, logits);
      batch.finite[i] = all_finite(logits, ends.output.outputs);
      batch.largest[i] = first_largest(logits, ends.output.outputs);
    });
  });
}
} // namespace

// Computes halves of layers, from `begin` to before `end`, as `Halves` numbers them. Afterwards x is
// still to be added to the residual stream.
extern "C" __attribute__((visibility("default"))) void chasqui_layers(const Network *network, const Step *step,
                                                                      int begin, int end) {
  if (!step->rows) return;
  with_type(network->type, [&](auto number) {
    const Halves<decltype(number)> halves(*network, *step);
    Team::assemble(step->threads, [&] { halves.compute(begin, end, nullptr); });
  });
}

// Computes a step of a network with so many halves of layers. `step` has neither x, nor residual,
// nor angles.
extern "C" __attribute__((visibility("default"))) void chasqui_step(const Network *network, const Step *step,
                                                                    int halves, const Ends *ends,
                                                                    const Batch *batch) {
  if (!step->rows) return;
  with_type(network->type, [&](auto number) { whole_step<decltype(number)>(*network, *step, halves, *ends, *batch); });
}
