// The only file that knows OpenMP. The library is not linked against a runtime: torch has loaded
// one, and two that spin against one another halve the speed.
#include "team.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace expertly {

void run_team(int threads, void (*work)(void *, int, int), void *context) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(context, omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  work(context, 0, 1);
}

// A team of one must not meet the barrier: it may be a thread of somebody else's region.
void wait_for_team(int threads) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp barrier
  }
#else
  (void)threads;
#endif
}

}  // namespace expertly
