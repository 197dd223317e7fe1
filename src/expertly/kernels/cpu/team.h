// Threads that work on one call: a parallel region, and items taken in order from a counter.
#pragma once
#include <stdint.h>

namespace expertly {

// Calls work(context, thread, threads) on each thread of a team; the team may come out smaller.
void run_team(int threads, void (*work)(void *, int, int), void *context);
void wait_for_team(int threads);

// Runs task(context) on this thread; between the teams that it runs their threads stay awake,
// because waking one takes as long as a small layer.
void hold_team(int threads, void (*task)(void *), void *context);

// The next item, counted across the team: whoever is free takes it.
static inline int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

}  // namespace expertly
