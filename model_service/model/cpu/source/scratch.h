// Memory that a thread keeps from call to call, because new pages cost more than many a product.
#pragma once

#include <stdlib.h>

struct Scratch {
  void *memory = nullptr;
  size_t size = 0;

  ~Scratch() { free(memory); }

  // At least `bytes`, of any content.
  template <class T> T *get(size_t bytes) {
    if (bytes > size) {
      free(memory);
      size = (bytes + 63) / 64 * 64;
      if (posix_memalign(&memory, 64, size)) abort(); // as PyTorch's kernels end without memory
    }
    return static_cast<T *>(memory);
  }
};
