// The operations beside the products on all rows of a step, by the chosen kernels.
#pragma once

#include "kernels/kernels.h"
#include "parallel.h"
#include "products/products.h"

// The kernels that `chasqui_use` chose.
const Kernels &kernels();

inline const KernelsOf<uint16_t> &kernels_of(uint16_t) { return kernels().bfloat16; }
inline const KernelsOf<float> &kernels_of(float) { return kernels().float32; }

inline Type type_of(uint16_t) { return Type::BFLOAT16; }
inline Type type_of(float) { return Type::FLOAT32; }

// Calls body(number), with a number of the type.
template <class Body> void with_type(Type type, const Body &body) {
  if (type == Type::FLOAT32)
    body(float{});
  else
    body(uint16_t{});
}

// Calls body(row) for each row, some neighbours in each task.
template <class Body> void for_rows(int rows, long elements, int threads, const Body &body) {
  threads = threads_for(elements, threads);
  const long tasks = rows < threads ? rows : threads;
  parallel(threads, tasks, [&](long task) {
    for (long row = rows * task / tasks; row < rows * (task + 1) / tasks; row++) body(row);
  });
}

// out = norm(x) [rows, dim]; with a residual, residual += x and out = norm(residual).
template <class Number>
void norm(const Number *x, Number *residual, const Number *weight, float eps, int rows, int dim, Number *out,
          int threads) {
  for_rows(rows, static_cast<long>(rows) * dim, threads, [&](long row) {
    const long at = row * dim;
    kernels_of(Number{}).norm_row(x + at, residual ? residual + at : nullptr, weight, eps, dim, out + at);
  });
}

// Rotates the first `count` heads of each row in place by angles [rows, head_dim / 2, 2]. Rows lie
// `stride` elements apart.
template <class Number>
void rotate(Number *heads, long stride, int rows, int count, int head_dim, const float *angles, int threads) {
  for_rows(rows, static_cast<long>(rows) * count * head_dim, threads, [&](long row) {
    kernels_of(Number{}).rotate_row(heads + row * stride, count, head_dim, angles + row * head_dim);
  });
}

// out [rows, hidden] = silu(first half of x [rows, 2 x hidden]) x second half.
template <class Number> void gate(const Number *x, int rows, int hidden, Number *out, int threads) {
  for_rows(rows, 4L * rows * hidden, threads, [&](long row) { // an exponential costs more than other operations
    kernels_of(Number{}).gate_row(x + row * 2 * hidden, hidden, out + row * hidden);
  });
}
