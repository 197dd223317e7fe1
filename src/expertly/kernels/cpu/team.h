// Threads that work on one call: one parallel region, and items taken in order from a counter.
#pragma once
#include <stdint.h>

namespace expertly {

// Calls work(context, thread, threads) on each thread of a team; the team may come out smaller.
void run_team(int threads, void (*work)(void *, int, int), void *context);
void wait_for_team(int threads);

// The next item, counted across the team: whoever is free takes it.
static inline int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

}  // namespace expertly
