// What stands between the packed linears when a token is decoded: attention over a KV cache, and
// the router. Plain structs and pointers, loaded by kernels/native_ops.py.
#pragma once
#include <stdint.h>

#include "expertly.h"

#ifdef __cplusplus
extern "C" {
#endif

// What a family's attention does to queries and keys. norm: 0 none, 1 of each head, 2 of all heads
// together, 3 of each head once it is rotated.
typedef struct {
  int64_t heads, kv_heads, head_dim;  // head_dim: a multiple of 32
  float scale;                        // of q k before the softmax
  float clip;                         // q, k and v are kept within +-clip; 0: they are not
  int32_t norm, norm_type;
  float eps;
  const void *q_norm, *k_norm;  // (head_dim), or (heads * head_dim) of all heads together
} expertly_attention;

// One new token per sequence, and the cache it goes to; all numbers of one type.
typedef struct {
  const void *q, *k, *v;         // (batch, heads * head_dim), and (batch, kv_heads * head_dim)
  const void *cos, *sin;         // (rotated_batch, rotated)
  int64_t rotated;               // how many numbers of a head are rotated; 0: none
  int64_t rotated_batch;         // batch, or 1 when all sequences are at the same place
  void *keys, *values;           // (batch, kv_heads, room, head_dim)
  int64_t room, length;          // length tokens are there; the new one comes behind them
} expertly_decoding;

// A routing rule. score: 0 softmax, 1 sigmoid, 2 softmax over the chosen experts.
typedef struct {
  const void *weight;  // (experts, dim)
  const float *bias;   // (experts), added to the scores for the choice alone; or null
  int32_t weight_type, score;
  int64_t experts, dim, top_k;
  int64_t groups, top_groups;  // a choice within the best groups; 1 and 1: among all experts
  int32_t renormalise;         // weights are divided by their sum
  int32_t exact;               // logits stay in float32; 0: they are rounded to x's type first
  float eps, factor;           // added to that sum; what weights are multiplied by
} expertly_router;

// Why a call was refused, besides what expertly.h says.
enum {
  EXPERTLY_HEADS = -20,
  EXPERTLY_ROOM = -21,
  EXPERTLY_ROTARY = -22,
  EXPERTLY_NORM = -23,
  EXPERTLY_TOP_K = -24,
  EXPERTLY_GROUPS = -25,
  EXPERTLY_SCORE = -26,
};

// Writes the token's keys and values into the cache; out (batch, heads * head_dim).
EXPERTLY_PUBLIC int expertly_attend(int isa, int threads, const expertly_attention *form,
                                    const expertly_decoding *now, int type, int64_t batch,
                                    void *out);

// x (tokens, dim): logits (tokens, experts), weights and ids (tokens, top_k), best expert first.
EXPERTLY_PUBLIC int expertly_route(int isa, int threads, const expertly_router *router,
                                   const void *x, int x_type, int64_t tokens, void *logits,
                                   int logits_type, void *weights, int weights_type,
                                   int64_t *ids);

#ifdef __cplusplus
}

namespace expertly {

// The arithmetic of these operations, for numbers of one type in memory; sums are in float32.
template <class T>
struct LeavesOf {
  void (*load)(const T *from, int64_t count, float clip, float *to);
  void (*store)(const float *from, int64_t count, T *to);
  void (*weigh)(float *x, int64_t dim, const T *weight, float factor);
  void (*rotate)(float *x, const T *cos, const T *sin, int64_t rotated);
  void (*products)(const float *x, const T *rows, int64_t count, int64_t dim, float *to);
  // queries and sums are "placed": in the order in which 32 numbers of T are read
  void (*place)(const float *from, int64_t count, float *to);
  // q, to (queries, dim), scores, p (queries, count)
  void (*dots)(const float *q, int64_t queries, const T *keys, int64_t count, int64_t dim,
               float *scores);
  void (*mix)(const float *p, int64_t queries, const T *values, int64_t count, int64_t dim,
              float *to);
  void (*put_back)(const float *from, int64_t count, T *to);
};

// One instruction set's.
struct Leaves {
  LeavesOf<float> float32;
  LeavesOf<uint16_t> bfloat16;
  void (*softmax)(float *x, int64_t count, float scale);
  float (*inverse_rms)(const float *x, int64_t count, float eps);

  const LeavesOf<float> &of(float) const { return float32; }
  const LeavesOf<uint16_t> &of(uint16_t) const { return bfloat16; }
};

const Leaves *portable_leaves();
const Leaves *avx2_leaves();
const Leaves *avx512_leaves();
const Leaves *leaves_of(int isa);  // null for one that this machine lacks

}  // namespace expertly
#endif
