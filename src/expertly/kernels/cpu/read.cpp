#include "read.h"

#include "team.h"

namespace expertly {
namespace {

constexpr int64_t kItem = 1 << 17;  // words that a thread takes at a time, a MiB
constexpr int kMostThreads = 4096;

struct ReadRun {
  const uint64_t *words;
  int64_t count, next;
  uint64_t sum;
};

// Eight places are read side by side: memory is prefetched page by page, so one run of addresses
// gets two thirds of what several get. Each has sums of its own, so that no addition waits.
uint64_t sum_of(const uint64_t *words, int64_t count) {
  constexpr int kPlaces = 8, kLine = 8;
  const int64_t part = count / kPlaces / kLine * kLine;
  uint64_t sums[kPlaces] = {}, sum = 0;
  for (int64_t i = 0; i < part; i += kLine)
    for (int place = 0; place < kPlaces; place++)
      for (int k = 0; k < kLine; k++) sums[place] += words[place * part + i + k];
  for (int64_t i = kPlaces * part; i < count; i++) sum += words[i];
  for (uint64_t each : sums) sum += each;
  return sum;
}

void work_on_read(void *context, int, int) {
  ReadRun &run = *(ReadRun *)context;
  uint64_t sum = 0;
  for (int64_t item; (item = take(&run.next)) * kItem < run.count;) {
    const int64_t first = item * kItem, left = run.count - first;
    sum += sum_of(run.words + first, left < kItem ? left : kItem);
  }
  __atomic_fetch_add(&run.sum, sum, __ATOMIC_RELAXED);
}

}  // namespace
}  // namespace expertly

int expertly_read(int threads, const void *data, int64_t bytes, uint64_t *sum) {
  using namespace expertly;
  if (!data || !sum) return EXPERTLY_NULL;
  if (threads < 1 || threads > kMostThreads) return EXPERTLY_THREADS;
  if (bytes < 0 || bytes % 8) return EXPERTLY_SIZE;
  if ((uintptr_t)data % 8) return EXPERTLY_ALIGNMENT;
  ReadRun run = {(const uint64_t *)data, bytes / 8, 0, 0};
  run_team(threads, work_on_read, &run);
  *sum = run.sum;
  return 0;
}
