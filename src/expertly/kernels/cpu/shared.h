// What the entry points hand to the kernels of each instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "expertly.h"

namespace expertly {

constexpr int64_t kLanes = 16;  // rows of a block, the lanes of a vector
constexpr int64_t kChunk = 32;  // activations that share a scale

// 32 quantised activations with all that a dot product needs, so that a row has one pointer.
struct Chunk {
  int8_t q[kChunk];
  float scale;
  float sum;         // scale * sum of q, times the minimum of asymmetric weights
  int32_t start[2];  // where the integer sum of symmetric 4 and 8 bits starts: -zero * sum of q
};
static_assert(sizeof(Chunk) == 48, "three 16-byte words");

// Values in float32 or bfloat16.
struct Input {
  const void *data;
  int type;
};
struct Output {
  void *data;
  int type;
};

// Rows of x that meet one matrix: y (rows, weight->out).
struct Job {
  const expertly_weight *weight;
  int64_t expert, first, rows;  // first: where its rows begin in x
  const float *bias;            // of this expert, or null
  Output y;                     // where its first row goes
};

struct Linears {
  int threads;
  const Job *jobs;
  int64_t n, tokens, cols;  // x is (tokens, cols)
  Input x;
  bool fine;  // 8-bit weights meet x in two int8 terms: all but a 30,000th of it
};

struct Experts {
  int threads;
  const expertly_weight *gate_up, *down;
  const float *gate_up_bias, *down_bias;
  expertly_gate gate;
  Input x;
  const int64_t *ids;
  const float *weights;
  int64_t tokens, top_k;
  Output y;
};

struct Norm {
  Input x, weight;
  float eps, offset;
  bool once;
  int64_t rows, dim;
  Output y;
};

// One instruction set's functions; arguments have been checked.
struct Kernels {
  int (*linears)(const Linears &);
  int (*experts)(const Experts &);
  void (*rms_norm)(const Norm &);
};

const Kernels *portable_kernels();
const Kernels *avx2_kernels();
const Kernels *avx512_kernels();

int check_linears(int n, const expertly_weight *const *w, const float *const *bias, Input x,
                  int64_t tokens, void *const *y, int y_type);
int check_grouped(const expertly_weight *w, const float *bias, Input x, const int64_t *counts,
                  int64_t rows, Output y);
int check_experts(const Experts &call, const expertly_gate *gate);
int check_norm(const Norm &call);

}  // namespace expertly
