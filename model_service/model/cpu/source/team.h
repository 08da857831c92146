// Threads that stay together for loops that follow each other closely.
//
// They are those of the OpenMP runtime that PyTorch has loaded: a runtime of our own would compete with
// it for the cores. So its functions are not linked in, but found among the libraries of the process,
// and no compiler needs support for OpenMP. Its own loops begin and end by a barrier each, at which
// threads only wait; these threads ask meanwhile for the memory that the next loop begins with.
#pragma once

#include <sched.h>

extern "C" {
void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}

// Memory that thread i of a team will read next: `size` bytes from begin + i * step on.
struct Stretch {
  const char *begin;
  long step, size;
};

class Team {
public:
  // Calls body() in this thread, as the team's first. `Team::current` is the team meanwhile.
  template <class Body> static void assemble(int threads, const Body &body) {
    struct Assembly {
      Team team;
      const Body &body;
    } assembly = {{}, body};
    GOMP_parallel(
        [](void *data) {
          Assembly &assembly = *static_cast<Assembly *>(data);
          const int thread = omp_get_thread_num();
          if (thread)
            assembly.team.serve(thread);
          else
            assembly.team.lead(assembly.body);
        },
        &assembly, static_cast<unsigned>(threads), 0);
  }

  // The team that the calling thread leads; null if it leads none, or takes part in a loop.
  static Team *current() { return led; }

  int size() const { return threads; }

  // What the threads ask for while they wait, from the end of the next loop on.
  void ask_ahead(const Stretch &stretch) { next_stretch = stretch; }

  // Calls share(i) in each thread i, and waits for all of them.
  template <class Share> void run(const Share &share) {
    function = [](const void *data, int thread) { (*static_cast<const Share *>(data))(thread); };
    argument = &share;
    stretch = next_stretch;
    __atomic_store_n(&running, threads - 1, __ATOMIC_RELAXED);
    led = nullptr;
    begin_next();
    share(0);
    wait(0, stretch, [&] { return __atomic_load_n(&running, __ATOMIC_ACQUIRE) == 0; });
    led = this;
  }

private:
  template <class Body> void lead(const Body &body) {
    threads = omp_get_num_threads();
    led = this;
    body();
    led = nullptr;
    function = nullptr;
    begin_next();
  }

  void begin_next() { __atomic_store_n(&generation, generation + 1, __ATOMIC_RELEASE); }

  void serve(int thread) {
    Stretch ahead = {};
    for (unsigned seen = 1;; seen++) {
      wait(thread, ahead, [&] { return __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == seen; });
      if (!function) return;
      function(argument, thread);
      ahead = stretch; // before the first thread may change it for the next loop
      __atomic_fetch_sub(&running, 1, __ATOMIC_RELEASE);
    }
  }

  // Asks for the stretch until done(); then spins, and soon lets threads of other programs run between.
  template <class Done> static void wait(int thread, const Stretch &stretch, const Done &done) {
    constexpr int LINE = 64, LINES_AT_ONCE = 4, SECOND_CACHE = 2, SPINS = 200;
    const char *at = stretch.begin + thread * stretch.step, *end = at + stretch.size;
    for (int spins = 0; !done();) {
      if (at < end) {
        for (int i = 0; i < LINES_AT_ONCE; i++, at += LINE) __builtin_prefetch(at, 0, SECOND_CACHE);
      } else if (spins++ < SPINS) {
        __builtin_ia32_pause();
      } else {
        sched_yield();
      }
    }
  }

  static inline thread_local Team *led = nullptr;

  int threads = 1;
  Stretch stretch = {}, next_stretch = {};
  void (*function)(const void *argument, int thread) = nullptr;
  const void *argument = nullptr;
  // Each in a line of the cache of its own: one is read, and the other written, by waiting threads.
  alignas(64) unsigned generation = 0;
  alignas(64) int running = 0;
};
