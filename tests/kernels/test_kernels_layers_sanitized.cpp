// Calls decoder layers of random sizes with buffers of exactly the size that the headers say, so
// that a sanitizer sees one byte too far, or two threads that meet where they must not; and with
// parts that must be refused. The portable kernels alone: the layers are the same for all.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../src/expertly/kernels/cpu/layer.h"
#include "../../src/expertly/kernels/cpu/shared.h"

#ifdef __SANITIZE_THREAD__
// In the place of the OpenMP runtime, whose own waiting ThreadSanitizer does not see.
#include <pthread.h>

namespace {
struct Team {
  pthread_barrier_t barrier;
  int size;
};
thread_local Team *team;
thread_local int number;
}  // namespace

extern "C" {
int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team ? team->size : 1; }
void GOMP_barrier() { pthread_barrier_wait(&team->barrier); }
void GOMP_parallel(void (*work)(void *), void *data, unsigned size, unsigned) {
  Team made;
  made.size = (int)size;
  pthread_barrier_init(&made.barrier, nullptr, size);
  auto one = [&](int index) {
    team = &made, number = index;
    work(data);
    team = nullptr, number = 0;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < size; i++) others.emplace_back(one, i);
  one(0);
  for (std::thread &each : others) each.join();
  pthread_barrier_destroy(&made.barrier);
}
}
#endif

namespace expertly {
const Kernels *avx2_kernels() { return nullptr; }
const Kernels *avx512_kernels() { return nullptr; }
const Leaves *avx2_leaves() { return nullptr; }
const Leaves *avx512_leaves() { return nullptr; }
}  // namespace expertly

namespace {

using Memory = std::shared_ptr<void>;  // malloc'd to the byte

Memory memory(int64_t bytes) { return Memory(malloc(bytes ? bytes : 1), free); }

void expect(int code, int want, const char *what) {
  if (code == want) return;
  printf("%s: %d, not %d\n", what, code, want);
  exit(1);
}

struct Case {
  std::mt19937 engine;
  std::vector<Memory> held;
  explicit Case(int seed) : engine(seed) {}

  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  }

  void *keep(int64_t bytes) {
    held.push_back(memory(bytes));
    return held.back().get();
  }

  // n numbers of a type, up to 2
  void *values(int type, int64_t n) {
    void *made = keep(n * (type ? 2 : 4));
    for (int64_t i = 0; i < n; i++) {
      const float x = std::uniform_real_distribution<float>(-2, 2)(engine);
      uint32_t word;
      memcpy(&word, &x, 4);
      if (type) ((uint16_t *)made)[i] = word >> 16;
      else ((float *)made)[i] = x;
    }
    return made;
  }

  float *bias(int64_t n) { return between(0, 1) ? (float *)values(0, n) : nullptr; }

  const expertly_weight *packed(int64_t experts, int64_t out, int64_t cols) {
    const int bits = 4 << between(0, 2), kind = bits == 16 ? 0 : (int)between(0, 2);
    int group = 32 << between(0, 2);
    while (cols % group) group /= 2;
    const int64_t rows = (out + 15) / 16 * 16, weights = experts * rows * cols;
    const int64_t groups = bits == 16 ? 0 : weights / group;
    auto *scales = (uint16_t *)keep(groups * 2);
    for (int64_t i = 0; i < groups; i++) scales[i] = between(0x2000, 0x2fff);  // up to 0.12
    uint8_t *zeros = (uint8_t *)keep(groups * kind);
    for (int64_t i = 0; i < groups * kind; i++) zeros[i] = between(0, 40);
    void *data = bits == 16 ? values(1, weights) : keep(weights * bits / 8);
    for (int64_t i = 0; bits < 16 && i < weights * bits / 8; i++)
      ((uint8_t *)data)[i] = between(0, 255);
    auto *made = (expertly_weight *)keep(sizeof(expertly_weight));
    *made = {data, bits == 16 ? nullptr : scales, kind ? zeros : nullptr, bits,
             bits == 16 ? 0 : group, kind, experts, rows, cols, out};
    return made;
  }

  expertly_norm norm(int64_t dim) {
    const int type = (int)between(0, 1);
    expertly_norm made = {};
    made.weight = values(type, dim), made.dim = dim, made.w_type = type;
    made.once = (int)between(0, 1), made.eps = 1e-5f, made.offset = (float)between(0, 1);
    return made;
  }

  void experts(expertly_layer *layer, int64_t dim) {
    const int type = (int)between(0, 1);
    const int64_t groups = between(1, 2), size = between(1, 3), experts = groups * size;
    const int64_t best = between(1, groups), hidden = 32 * between(1, 2);
    layer->router = {values(type, experts * dim), bias(experts), type, (int)between(0, 2), experts,
                     dim, between(1, best * size), groups, best, (int)between(0, 1),
                     (int)between(0, 1), 0, 1};
    layer->weights_type = (int)between(0, 1);
    layer->gate = {(int32_t)between(0, 5), (int32_t)between(0, 1), 1.7f, 7.f};
    if (layer->gate.act == 3) layer->gate.gated = 1;
    const int64_t rows = hidden * (1 + layer->gate.gated);
    layer->gate_up = packed(experts, rows, dim), layer->down = packed(experts, dim, hidden);
    layer->gate_up_bias = bias(experts * rows), layer->down_bias = bias(experts * dim);
  }

  expertly_layer layer(int64_t dim, int64_t kv, int64_t head_dim, bool with_experts) {
    const int64_t heads = kv * between(1, 2), wide = heads * head_dim, slim = kv * head_dim;
    const int64_t outs[] = {wide, slim, slim, dim};
    const int norm_kind = (int)between(0, 3), type = (int)between(0, 1);
    const bool all = norm_kind == 2;
    expertly_layer made = {};
    for (expertly_norm &each : made.norms) each = norm(dim);
    for (int i = 0; i < 4; i++) {
      made.projections[i] = packed(1, outs[i], i < 3 ? dim : wide);
      made.biases[i] = bias(outs[i]);
    }
    made.attention = {heads, kv, head_dim, 0.1f, 0, norm_kind, type, 1e-6f,
                      values(type, all ? wide : head_dim), values(type, all ? slim : head_dim)};
    if (with_experts) experts(&made, dim);
    return made;
  }
};

// A call, and all that it writes.
struct Stack {
  Case drawn;
  int type;
  int64_t batch, dim, cached, width;
  std::vector<expertly_layer> layers;
  std::vector<expertly_decoding> places;
  const void *x;
  void *y, *normed;

  explicit Stack(int seed) : drawn(seed) {
    type = (int)drawn.between(0, 1), width = type ? 2 : 4;
    batch = drawn.between(1, 3), dim = 32 * drawn.between(1, 3);
    const int64_t kv = drawn.between(1, 2), head_dim = 32 * drawn.between(1, 2);
    const bool longer = drawn.between(0, 9) == 0;  // so that threads share attention
    const int64_t room = longer ? 1100 : drawn.between(1, 20), length = drawn.between(0, room - 1);
    const int64_t rotated = 2 * drawn.between(0, head_dim / 2), count = drawn.between(1, 3);
    const int64_t apart = drawn.between(0, 1) ? batch : 1;
    cached = batch * kv * room * head_dim;
    for (int64_t i = 0; i < count; i++) {
      layers.push_back(drawn.layer(dim, kv, head_dim, i + 1 < count || drawn.between(0, 2) > 0));
      expertly_decoding now = {};
      now.cos = drawn.values(type, apart * rotated), now.sin = drawn.values(type, apart * rotated);
      now.rotated = rotated, now.rotated_batch = apart, now.room = room;
      now.length = longer ? room - 1 : length;
      now.keys = drawn.values(type, cached), now.values = drawn.values(type, cached);
      places.push_back(now);
    }
    x = drawn.values(type, batch * dim);
    y = drawn.values(type, batch * dim), normed = drawn.values(type, batch * dim);
  }

  int decode(int threads) {
    return expertly_decode_layers(0, threads, layers.size(), layers.data(), places.data(), x, type,
                                  batch, y, normed);
  }

  bool same_cache(const Stack &other) const {
    bool equal = true;
    for (size_t i = 0; i < places.size(); i++)
      equal = equal && !memcmp(places[i].keys, other.places[i].keys, cached * width) &&
              !memcmp(places[i].values, other.places[i].values, cached * width);
    return equal;
  }

  bool same(const Stack &other) const {
    return same_cache(other) && !memcmp(y, other.y, batch * dim * width) &&
           !memcmp(normed, other.normed, batch * dim * width);
  }
};

void refuse(int seed, const char *what, int want, const std::function<void(Stack *)> &change,
            int threads = 1) {
  Stack changed(seed), untouched(seed);
  change(&changed);
  expect(changed.decode(threads), want, what);
  expect(changed.same_cache(untouched), true, "no token was written");
}

expertly_weight wider(const expertly_weight *weight) {
  expertly_weight made = *weight;
  made.cols += 128;
  return made;
}

void refused(int seed) {
  expertly_weight odd;
  refuse(seed, "no threads", EXPERTLY_THREADS, [](Stack *) {}, 0);
  refuse(seed, "type", EXPERTLY_TYPE, [](Stack *s) { s->type = 2; });
  refuse(seed, "batch", EXPERTLY_SIZE, [](Stack *s) { s->batch = 0; });
  refuse(seed, "dim", EXPERTLY_SIZE, [](Stack *s) { s->layers[0].norms[0].dim = -1; });
  refuse(seed, "norms", EXPERTLY_PAIR, [](Stack *s) { s->layers[0].norms[1].dim++; });
  refuse(seed, "heads", EXPERTLY_HEADS, [](Stack *s) { s->layers[0].attention.heads = 0; });
  refuse(seed, "many", EXPERTLY_HEADS, [](Stack *s) { s->layers[0].attention.heads = 1 << 30; });
  refuse(seed, "width", EXPERTLY_PAIR, [](Stack *s) { s->layers[0].attention.head_dim += 32; });
  refuse(seed, "missing", EXPERTLY_PAIR, [](Stack *s) { s->layers[0].projections[2] = nullptr; });
  for (int i = 0; i < 4; i++)
    refuse(seed, "projection", EXPERTLY_PAIR, [&](Stack *s) {
      odd = wider(s->layers[0].projections[i]);
      s->layers[0].projections[i] = &odd;
    });
  refuse(seed, "full", EXPERTLY_ROOM, [](Stack *s) { s->places[0].length = s->places[0].room; });
  if (Stack(seed).layers.size() > 1)
    refuse(seed, "no experts", EXPERTLY_NULL, [](Stack *s) { s->layers[0].router.weight = nullptr; });
  if (!Stack(seed).layers[0].router.weight) return;
  refuse(seed, "top_k", EXPERTLY_TOP_K, [](Stack *s) { s->layers[0].router.top_k = 99; });
  refuse(seed, "no expert", EXPERTLY_SIZE, [](Stack *s) { s->layers[0].router.experts = 0; });
  refuse(seed, "router", EXPERTLY_PAIR, [](Stack *s) { s->layers[0].router.dim++; });
  refuse(seed, "weights", EXPERTLY_TYPE, [](Stack *s) { s->layers[0].weights_type = 2; });
  refuse(seed, "no down", EXPERTLY_PAIR, [](Stack *s) { s->layers[0].down = nullptr; });
  refuse(seed, "up", EXPERTLY_PAIR, [&](Stack *s) {
    odd = wider(s->layers[0].gate_up);
    s->layers[0].gate_up = &odd;
  });
}

void alike(int seed) {
  Stack alone(seed), team(seed);
  expect(alone.decode(1), 0, "one thread");
  expect(team.decode(2 + seed % 2), 0, "threads");
  expect(team.same(alone), true, "the same answer");
}

}  // namespace

int main(int, char **arguments) {
  const int rounds = atoi(arguments[1]);
  for (int round = 0; round < rounds; round++) {
    alike(round);
    if (round % 8 == 0) refused(round);
  }
  std::thread one([&] { for (int i = 0; i < rounds; i++) alike(i); });
  for (int i = rounds; i < 2 * rounds; i++) alike(i);
  one.join();
  printf("%d rounds\n", rounds);
}
