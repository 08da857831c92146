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
    const size_t inner = larger(layer.wqkv.outputs, layer.w13.outputs), outer = larger(layer.wo.inputs, layer.w2.inputs);
    normed = scratch.get<Number>(sizeof(Number) * step.rows * (network.dim + inner + outer));
    wide = normed + static_cast<long>(step.rows) * network.dim;
    narrow = wide + step.rows * inner;
  }

  // x = wo(attention(wqkv(norm(residual += x))))
  void attention(int index) const {
    const Layer &layer = network.layers[index];
    const AttentionCache &cache = step.caches[index];
    const int keys = network.heads * cache.head_dim, values = keys + cache.kv_heads * cache.head_dim;
    const long stride = layer.wqkv.outputs;
    add_and_norm(layer.attention_norm, index == 0);
    multiply(layer.wqkv, normed, wide);
    rotate(wide, stride, step.rows, network.heads + cache.kv_heads, cache.head_dim, step.angles, step.threads);
    const AttentionInputs<Number> inputs = {wide, wide + keys, wide + values, stride, stride, stride, network.heads};
    kernels_of(Number{}).attend(cache, step.spans, step.span_count, inputs, narrow, step.threads);
    multiply(layer.wo, narrow, x);
  }

  // x = w2(gate(w13(norm(residual += x))))
  void feed_forward(int index) const {
    const Layer &layer = network.layers[index];
    add_and_norm(layer.ffn_norm, false);
    multiply(layer.w13, normed, wide);
    gate(wide, step.rows, layer.w2.inputs, narrow, step.threads);
    multiply(layer.w2, narrow, x);
  }

private:
  static size_t larger(int a, int b) { return static_cast<size_t>(a > b ? a : b); }

  // normed = norm(residual += x); at the beginning of the stream, residual = x.
  void add_and_norm(const void *weight, bool begins) const {
    if (begins) memcpy(residual, x, sizeof(Number) * step.rows * network.dim);
    norm(x, begins ? nullptr : residual, static_cast<const Number *>(weight), network.eps, step.rows, network.dim,
         normed, step.threads);
  }

  void multiply(const Weight &weight, const Number *from, Number *to) const {
    multiply_rows(weight, {type_of(Number{}), from, step.rows, to}, step.threads);
  }

  const Network &network;
  const Step &step;
  Number *x, *residual;
  Number *normed, *wide, *narrow; // [rows, dim]; outputs of wqkv or w13; inputs of wo or w2
};
} // namespace

// Computes halves of layers, from `begin` to before `end`: 2i is the attention of layer i, 2i + 1 its
// feed-forward network. Afterwards x is still to be added to the residual stream.
extern "C" __attribute__((visibility("default"))) void chasqui_layers(const Network *network, const Step *step,
                                                                      int begin, int end) {
  if (!step->rows) return;
  with_type(network->type, [&](auto number) {
    const Halves<decltype(number)> halves(*network, *step);
    for (int half = begin; half < end; half++) {
      if (half % 2)
        halves.feed_forward(half / 2);
      else
        halves.attention(half / 2);
    }
  });
}
