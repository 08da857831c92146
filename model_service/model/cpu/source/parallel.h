// Parallel loops on the threads of the OpenMP runtime that PyTorch has loaded.
//
// A runtime of our own would compete with PyTorch's for the cores. So these functions are not linked
// in, but found among the libraries of the process, and no compiler needs support for OpenMP.
#pragma once

extern "C" void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);

// Calls body(0) to body(tasks - 1), each once, in any order. A task must compute the same whichever
// thread runs it.
template <class Body> static void parallel(int threads, long tasks, const Body &body) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (long task = 0; task < tasks; task++) body(task);
    return;
  }
  struct Work {
    const Body &body;
    long tasks;
    long next;
  } work = {body, tasks, 0};
  GOMP_parallel(
      [](void *data) {
        Work &work = *static_cast<Work *>(data);
        for (;;) {
          const long task = __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED);
          if (task >= work.tasks) return;
          work.body(task);
        }
      },
      &work, static_cast<unsigned>(threads), 0);
}

// Calls body(first, end) for ranges that together are 0 to count; all but the last are multiples of
// `least`. A thread takes half of its share of what is left (guided self-scheduling, Polychronopoulos
// and Kuck, 1987): so it reads long stretches of memory, which is a tenth faster than short ones, and
// yet all threads end at about the same time.
template <class Body> static void parallel_ranges(int threads, int count, int least, const Body &body) {
  const int most = (count + least - 1) / least;
  int next = 0;
  parallel(threads, threads < most ? threads : most, [&](long) {
    int first = __atomic_load_n(&next, __ATOMIC_RELAXED);
    while (first < count) {
      const int half = (count - first) / (2 * threads) / least * least;
      const int wanted = first + (half > least ? half : least);
      const int end = wanted < count ? wanted : count;
      if (!__atomic_compare_exchange_n(&next, &first, end, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
      body(first, end);
      first = __atomic_load_n(&next, __ATOMIC_RELAXED);
    }
  });
}

// The threads that are worth waking for so many elements.
static inline int threads_for(long elements, int threads) {
  constexpr long MIN_ELEMENTS = 8192; // of a thread: below, waking it takes longer than the work
  const long useful = elements / MIN_ELEMENTS + 1;
  return useful < threads ? static_cast<int>(useful) : threads;
}
