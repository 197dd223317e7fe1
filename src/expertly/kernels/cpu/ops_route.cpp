// A router in one call: logits, scores, the choice of experts and their weights.
//
// Rules: softmax over all experts (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, as in
// Mixtral and OLMoE), softmax over the chosen ones (Granite), sigmoid with a selection bias and
// groups of experts (DeepSeek-V3, https://arxiv.org/abs/2412.19437). Sums are in float32.
#include <math.h>
#include <string.h>

#include <new>
#include <vector>

#include "ops.h"
#include "team.h"

namespace expertly {
namespace {

struct Row {
  std::vector<float> x, placed, logits, scores, choice, weights;
  std::vector<char> used;
};

// As torch.topk ranks: NaN above all, so that a broken router shows.
bool above(float a, float b) { return a > b || (a != a && b == b); }

// The places of the largest, largest first; of equals the first one.
void largest(const float *x, int64_t count, int64_t wanted, int64_t *places,
             std::vector<char> *used) {
  used->assign(count, 0);
  for (int64_t k = 0; k < wanted; k++) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++)
      if (!(*used)[i] && (best < 0 || above(x[i], x[best]))) best = i;
    (*used)[best] = 1;
    places[k] = best;
  }
}

// Experts outside the best groups are out; a group counts as much as its two best experts.
void keep_groups(const expertly_router &router, Row *row) {
  const int64_t size = router.experts / router.groups;
  std::vector<float> worth(router.groups);
  std::vector<int64_t> best(router.top_groups);
  for (int64_t group = 0; group < router.groups; group++) {
    int64_t two[2];
    const float *own = row->choice.data() + group * size;
    largest(own, size, size > 1 ? 2 : 1, two, &row->used);
    worth[group] = own[two[0]] + (size > 1 ? own[two[1]] : 0);
  }
  largest(worth.data(), router.groups, router.top_groups, best.data(), &row->used);
  for (int64_t group = 0; group < router.groups; group++)
    for (int64_t i = 0; i < size && !row->used[group]; i++)
      row->choice[group * size + i] = -INFINITY;
}

// From the logits to the ids and the weights.
void choose(const Leaves &leaves, const expertly_router &router, Row *row, int64_t *ids) {
  row->scores = row->logits;
  if (router.score == 0) leaves.softmax(row->scores.data(), router.experts, 1);
  if (router.score == 1)
    for (float &score : row->scores) score = 1 / (1 + expf(-score));
  row->choice = row->scores;
  if (router.bias)
    for (int64_t i = 0; i < router.experts; i++) row->choice[i] += router.bias[i];
  if (router.top_groups < router.groups) keep_groups(router, row);
  largest(row->choice.data(), router.experts, router.top_k, ids, &row->used);
  row->weights.resize(router.top_k);
  for (int64_t k = 0; k < router.top_k; k++) row->weights[k] = row->scores[ids[k]];
  if (router.score == 2) leaves.softmax(row->weights.data(), router.top_k, 1);
  float sum = router.eps;
  for (float weight : row->weights) sum += weight;
  for (float &weight : row->weights)
    weight = (router.renormalise ? weight / sum : weight) * router.factor;
}

constexpr int64_t kRows = 16;  // of the weight, that a thread takes at a time

template <class W>
struct Product {
  const LeavesOf<W> *leaf;
  const expertly_router *router;
  Row *row;
  int64_t next;  // row
};

template <class W>
void work(void *context, int, int) {
  Product<W> &all = *(Product<W> *)context;
  const expertly_router &router = *all.router;
  const W *weight = (const W *)router.weight;
  for (int64_t first; (first = kRows * take(&all.next)) < router.experts;) {
    const int64_t left = router.experts - first, count = left < kRows ? left : kRows;
    float *logits = all.row->logits.data() + first;
    if (router.dim % 32)
      all.leaf->products(all.row->x.data(), weight + first * router.dim, count, router.dim, logits);
    else
      all.leaf->dots(all.row->placed.data(), 1, weight + first * router.dim, count, router.dim,
                     logits);
  }
}

// logits = weight x; rows that divide into 32 numbers are read several at a time.
template <class W>
void product(const LeavesOf<W> &leaf, const expertly_router &router, int threads, Row *row) {
  row->placed.resize(router.dim);
  if (router.dim % 32 == 0) leaf.place(row->x.data(), router.dim, row->placed.data());
  Product<W> all = {&leaf, &router, row, 0};
  run_team(threads, work<W>, &all);
}

// Rounded to x's type where the family computes them in it.
void logits_of(const Leaves &leaves, const expertly_router &router, int threads, const void *x,
               int x_type, int64_t token, Row *row) {
  const int64_t dim = router.dim, at = token * dim;
  row->x.resize(dim), row->logits.resize(router.experts);
  if (x_type == EXPERTLY_FLOAT32)
    leaves.float32.load((const float *)x + at, dim, 0, row->x.data());
  else
    leaves.bfloat16.load((const uint16_t *)x + at, dim, 0, row->x.data());
  if (router.weight_type == EXPERTLY_FLOAT32)
    product(leaves.float32, router, threads, row);
  else
    product(leaves.bfloat16, router, threads, row);
  if (router.exact || x_type == EXPERTLY_FLOAT32) return;
  std::vector<uint16_t> rounded(router.experts);
  leaves.bfloat16.store(row->logits.data(), router.experts, rounded.data());
  leaves.bfloat16.load(rounded.data(), router.experts, 0, row->logits.data());
}

void put(const Leaves &leaves, const std::vector<float> &from, void *to, int type, int64_t token) {
  const int64_t count = (int64_t)from.size();
  if (type == EXPERTLY_FLOAT32)
    leaves.float32.store(from.data(), count, (float *)to + token * count);
  else
    leaves.bfloat16.store(from.data(), count, (uint16_t *)to + token * count);
}

bool known(int type) { return type == EXPERTLY_FLOAT32 || type == EXPERTLY_BFLOAT16; }

int check_router(const expertly_router &router, int64_t tokens) {
  const int64_t experts = router.experts, groups = router.groups;
  if (!router.weight) return EXPERTLY_NULL;
  if (!known(router.weight_type)) return EXPERTLY_TYPE;
  if (tokens < 0 || experts < 1 || router.dim < 1) return EXPERTLY_SIZE;
  if (router.top_k < 1 || router.top_k > experts) return EXPERTLY_TOP_K;
  if (groups < 1 || router.top_groups < 1 || router.top_groups > groups || experts % groups ||
      router.top_k > router.top_groups * (experts / groups))
    return EXPERTLY_GROUPS;
  if (router.score < 0 || router.score > 2) return EXPERTLY_SCORE;
  const int64_t most = INT64_MAX / 8;
  if (experts > most / router.dim || tokens > most / router.dim || tokens > most / experts)
    return EXPERTLY_OVERFLOW;
  return 0;
}

}  // namespace
}  // namespace expertly

int expertly_route(int isa, int threads, const expertly_router *router, const void *x, int x_type,
                   int64_t tokens, void *logits, int logits_type, void *weights, int weights_type,
                   int64_t *ids) {
  using namespace expertly;
  const Leaves *leaves = leaves_of(isa);
  if (!leaves) return EXPERTLY_ISA;
  if (threads < 1 || threads > 4096) return EXPERTLY_THREADS;
  if (!router) return EXPERTLY_NULL;
  if (!known(x_type) || !known(logits_type) || !known(weights_type)) return EXPERTLY_TYPE;
  const int code = check_router(*router, tokens);
  if (code || !tokens) return code;  // an empty tensor has no address
  if (!x || !logits || !weights || !ids) return EXPERTLY_NULL;
  try {
    Row row;
    for (int64_t token = 0; token < tokens; token++) {
      logits_of(*leaves, *router, threads, x, x_type, token, &row);
      choose(*leaves, *router, &row, ids + token * router->top_k);
      put(*leaves, row.logits, logits, logits_type, token);
      put(*leaves, row.weights, weights, weights_type, token);
    }
  } catch (const std::bad_alloc &) {
    return EXPERTLY_MEMORY;
  }
  return 0;
}
