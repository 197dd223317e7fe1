// Calls attention and the router on random sizes with buffers of exactly the size that ops.h says,
// so that AddressSanitizer sees one byte too far, and with bounds that must be refused.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "../../src/expertly/kernels/cpu/ops.h"

namespace {

std::mt19937 engine(1);

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(engine);
}

// malloc'd to the byte, and filled with small numbers of a type.
struct Values {
  std::unique_ptr<void, void (*)(void *)> data;
  Values(int type, int64_t n) : data(malloc(n * (type ? 2 : 4) + !n), free) {
    for (int64_t i = 0; i < n; i++)
      if (type) ((uint16_t *)data.get())[i] = (uint16_t)between(0x3c00, 0x4000);
      else ((float *)data.get())[i] = std::normal_distribution<float>()(engine);
  }
  operator void *() const { return data.get(); }
};

void expect(int code, int want, const char *what) {
  if (code == want) return;
  printf("%s: %d, not %d\n", what, code, want);
  exit(1);
}

void attention(int isa) {
  const int type = (int)between(0, 1), norm_type = (int)between(0, 1), norm = (int)between(0, 3);
  const int64_t kv = between(1, 3), heads = kv * between(1, 3), dim = 32 * between(1, 3);
  const int64_t batch = between(1, 3), room = between(1, 70), length = between(0, room - 1);
  const int64_t rotated = 2 * between(0, dim / 2), places = between(0, 1) ? batch : 1;
  const int64_t all = norm == 2 ? heads : 1, all_kv = norm == 2 ? kv : 1;
  Values q(type, batch * heads * dim), k(type, batch * kv * dim), v(type, batch * kv * dim);
  Values cos(type, places * rotated), sin(type, places * rotated), out(type, batch * heads * dim);
  Values keys(type, batch * kv * room * dim), values(type, batch * kv * room * dim);
  Values q_norm(norm_type, all * dim), k_norm(norm_type, all_kv * dim);
  expertly_attention form = {heads, kv, dim, 0.1f, between(0, 1) ? 0.5f : 0, norm, norm_type, 1e-6f,
                             q_norm, k_norm};
  expertly_decoding now = {q, k, v, cos, sin, rotated, places, keys, values, room, length};
  const int threads = (int)between(1, 3);
  expect(expertly_attend(isa, threads, &form, &now, type, batch, out), 0, "attend");
  expertly_decoding full = now;
  full.length = room;
  expect(expertly_attend(isa, threads, &form, &full, type, batch, out), EXPERTLY_ROOM, "full");
  full.length = -1;
  expect(expertly_attend(isa, threads, &form, &full, type, batch, out), EXPERTLY_ROOM, "before");
  full = now, full.room = INT64_MAX;
  expect(expertly_attend(isa, threads, &form, &full, type, batch, out), EXPERTLY_OVERFLOW, "huge");
  full = now, full.rotated = dim + 2;
  expect(expertly_attend(isa, threads, &form, &full, type, batch, out), EXPERTLY_ROTARY, "turn");
  full = now, full.rotated_batch = batch + 1;
  expect(expertly_attend(isa, threads, &form, &full, type, batch, out), EXPERTLY_ROTARY, "batch");
  full = now, full.keys = nullptr;
  expect(expertly_attend(isa, threads, &form, &full, type, batch, out), EXPERTLY_NULL, "null");
  expertly_attention odd = form;
  odd.head_dim = dim + 1;
  expect(expertly_attend(isa, threads, &odd, &now, type, batch, out), EXPERTLY_HEADS, "dim");
  odd = form, odd.heads = heads * INT32_MAX;
  expect(expertly_attend(isa, threads, &odd, &now, type, batch, out), EXPERTLY_HEADS, "heads");
  odd = form, odd.norm = 4;
  expect(expertly_attend(isa, threads, &odd, &now, type, batch, out), EXPERTLY_NORM, "norm");
  expect(expertly_attend(isa, 0, &form, &now, type, batch, out), EXPERTLY_THREADS, "threads");
  expect(expertly_attend(9, 1, &form, &now, type, batch, out), EXPERTLY_ISA, "isa");
  expect(expertly_attend(isa, 1, &form, &now, 2, batch, out), EXPERTLY_TYPE, "type");
}

void router(int isa) {
  const int x_type = (int)between(0, 1), w_type = (int)between(0, 1), y_type = (int)between(0, 1);
  const int64_t groups = between(1, 4), size = between(1, 6), experts = groups * size;
  const int64_t best = between(1, groups), top_k = between(1, best * size);
  const int64_t dim = between(1, 130), tokens = between(0, 5);
  Values x(x_type, tokens * dim), weight(w_type, experts * dim), bias(0, experts);
  Values logits(y_type, tokens * experts), weights(y_type, tokens * top_k);
  std::unique_ptr<int64_t, void (*)(void *)> ids((int64_t *)malloc(tokens * top_k * 8 + 1), free);
  expertly_router rule = {weight, between(0, 1) ? (float *)(void *)bias : nullptr, w_type,
                          (int)between(0, 2), experts, dim, top_k, groups, best,
                          (int)between(0, 1), (int)between(0, 1), 0, 1};
  auto call = [&](const expertly_router &r) {
    return expertly_route(isa, 1, &r, x, x_type, tokens, logits, y_type, weights, y_type, ids.get());
  };
  expect(call(rule), 0, "route");
  for (int64_t i = 0; i < tokens * top_k; i++)
    if (ids.get()[i] < 0 || ids.get()[i] >= experts) expect(1, 0, "an id");
  expertly_router bad = rule;
  bad.top_k = experts + 1;
  expect(call(bad), EXPERTLY_TOP_K, "top_k");
  bad = rule, bad.top_groups = groups + 1;
  expect(call(bad), EXPERTLY_GROUPS, "groups");
  bad = rule, bad.score = 3;
  expect(call(bad), EXPERTLY_SCORE, "score");
  bad = rule, bad.dim = INT64_MAX;
  expect(call(bad), EXPERTLY_OVERFLOW, "overflow");
  bad = rule, bad.weight = nullptr;
  expect(call(bad), EXPERTLY_NULL, "null");
  bad = rule, bad.weight_type = 5;
  expect(call(bad), EXPERTLY_TYPE, "type");
}

}  // namespace

int main(int, char **arguments) {
  const int rounds = atoi(arguments[1]);
  for (int round = 0; round < rounds; round++)
    for (int isa = 0; isa <= expertly_best_isa(); isa++) attention(isa), router(isa);
  printf("%d rounds\n", rounds);
}
