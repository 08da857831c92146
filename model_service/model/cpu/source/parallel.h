// Parallel loops on the threads of a team.
#pragma once

#include "team.h"

// Calls body(0) to body(tasks - 1), each once, in any order. A task must compute the same whichever
// thread runs it. Thread i of those that take part begins with task i.
template <class Body> static void parallel(int threads, long tasks, const Body &body) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (long task = 0; task < tasks; task++) body(task);
    return;
  }
  Team *team = Team::current();
  if (!team) return Team::assemble(threads, [&] { parallel(threads, tasks, body); });
  if (threads > team->size()) threads = team->size();
  long next = threads;
  team->run([&](int thread) {
    if (thread >= threads) return;
    for (long task = thread; task < tasks; task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) body(task);
  });
}

// The first range of each thread in `parallel_ranges`: half of its share, in steps that every `least`
// divides.
static inline int first_range(int threads, int count) {
  constexpr int STEP = 8;
  return count / (2 * threads) / STEP * STEP;
}

// Calls body(first, end) for ranges that together are 0 to count; all but the last are multiples of
// `least`, which divides 8. A thread takes half of its share of what is left (guided self-scheduling,
// Polychronopoulos and Kuck, 1987): so it reads long stretches of memory, which is a tenth faster than
// short ones, and yet all threads end at about the same time.
template <class Body> static void parallel_ranges(int threads, int count, int least, const Body &body) {
  const auto range = [&](int left) {
    const int half = first_range(threads, left);
    return half > least ? half : least;
  };
  const int most = (count + least - 1) / least, size = range(count);
  if (threads > most) threads = most;
  int next = threads * size;
  parallel(threads, threads, [&](long thread) {
    for (int first = static_cast<int>(thread) * size, end = first + size; first < count;) {
      body(first, end < count ? end : count);
      first = __atomic_load_n(&next, __ATOMIC_RELAXED);
      do
        end = first + range(count - first);
      while (first < count && !__atomic_compare_exchange_n(&next, &first, end, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    }
  });
}

// The threads that are worth waking for so many elements.
static inline int threads_for(long elements, int threads) {
  constexpr long MIN_ELEMENTS = 8192; // of a thread: below, waking it takes longer than the work
  const long useful = elements / MIN_ELEMENTS + 1;
  return useful < threads ? static_cast<int>(useful) : threads;
}
