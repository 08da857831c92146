// The layers of the network: all operations of a step in one call.
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

  // Half 2i is the attention of layer i, 2i + 1 its feed-forward network. `last`: no other follows.
  void compute(int half, bool last) const {
    if (half % 2)
      feed_forward(half / 2, last ? nullptr : &network.layers[half / 2 + 1].wqkv);
    else
      attention(half / 2, last ? nullptr : &network.layers[half / 2].w13);
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
    if (Team *team = Team::current()) team->ask_ahead(next ? beginning(*next) : Stretch{});
    multiply_rows(weight, {type_of(Number{}), from, step.rows, to}, step.threads);
  }

  // As much of each thread's first range of the weight as leaves the second cache room for all else.
  Stretch beginning(const Weight &weight) const {
    constexpr long MOST = 400 << 10;
    const long step_bytes = first_range(step.threads, weight.count()) * weight.stride() * static_cast<long>(sizeof(Line));
    return {reinterpret_cast<const char *>(weight.lines), step_bytes, step_bytes < MOST ? step_bytes : MOST};
  }

  const Network &network;
  const Step &step;
  Number *x, *residual;
  Number *normed, *wide, *narrow; // [rows, dim]; outputs of wqkv or w13; inputs of wo or w2
};
} // namespace

// Computes halves of layers, from `begin` to before `end`, as `Halves` numbers them. Afterwards x is still to be added to the residual stream.
extern "C" __attribute__((visibility("default"))) void chasqui_layers(const Network *network, const Step *step,
                                                                      int begin, int end) {
  if (!step->rows) return;
  with_type(network->type, [&](auto number) {
    const Halves<decltype(number)> halves(*network, *step);
    Team::assemble(step->threads, [&] {
      for (int half = begin; half < end; half++) halves.compute(half, half + 1 == end);
    });
  });
}
