// The only file that knows OpenMP. The library is not linked against a runtime: torch has loaded
// one, and two that spin against one another halve the speed.
#include "team.h"

#include <sched.h>

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace expertly {
namespace {

constexpr int kSpins = 4096;  // before a thread lets others run

void rest(int spins) {
  if (spins > kSpins) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Threads that wait for the next piece of work, and for one another.
struct Held {
  int threads = 1;
  std::atomic<int> turn{0}, arrived{0}, round{0};  // pieces of work begun; those of a barrier
  void (*work)(void *, int, int) = nullptr;         // null: it is over
  void *context = nullptr;

  void meet() {
    const int mine = round.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(mine + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; round.load(std::memory_order_acquire) == mine; i++) rest(i);
  }

  void begin(void (*next)(void *, int, int), void *with) {
    work = next;
    context = with;
    turn.fetch_add(1, std::memory_order_release);
  }

  void serve(int thread) {
    for (int seen = 0;; seen++) {
      for (int i = 0; turn.load(std::memory_order_acquire) == seen; i++) rest(i);
      if (!work) return;
      work(context, thread, threads);
      meet();
    }
  }
};

thread_local Held *held = nullptr;  // the team that this thread belongs to

}  // namespace

void run_team(int threads, void (*work)(void *, int, int), void *context) {
  if (threads > 1 && held && held->threads > 1) {
    held->begin(work, context);
    work(context, 0, held->threads);
    return held->meet();
  }
#ifdef _OPENMP
  if (threads > 1 && !held) {
#pragma omp parallel num_threads(threads)
    work(context, omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  work(context, 0, 1);
}

// A team of one must not meet the barrier: it may be a thread of somebody else's region.
void wait_for_team(int threads) {
  if (threads > 1 && held) return held->meet();
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp barrier
  }
#endif
}

void hold_team(int threads, void (*task)(void *), void *context) {
#ifdef _OPENMP
  if (threads > 1 && !held) {
    Held team;
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      if (thread == 0) team.threads = omp_get_num_threads();
#pragma omp barrier
      held = &team;
      if (thread > 0) {
        team.serve(thread);
      } else {
        task(context);
        team.begin(nullptr, nullptr);
      }
      held = nullptr;
    }
    return;
  }
#endif
  task(context);
}

}  // namespace expertly
