// Every bound that a caller could violate, before any memory is touched.
#include "shared.h"

namespace expertly {
namespace {

constexpr int64_t kMost = INT64_MAX / 64;  // leaves room for the sizes computed from a product

bool fits(int64_t a, int64_t b, int64_t c = 1) {
  int64_t product;
  return !__builtin_mul_overflow(a, b, &product) && !__builtin_mul_overflow(product, c, &product) &&
         product <= kMost;
}

bool aligned(const void *p, uintptr_t to) { return (uintptr_t)p % to == 0; }

// One line for each bound: the first that is violated decides.
#define REQUIRE(condition, code) \
  if (!(condition)) return code

int check_zeros(const expertly_weight &w) {
  REQUIRE(w.zero_kind >= 0 && w.zero_kind <= 2, EXPERTLY_ZEROS);
  REQUIRE((w.zero_kind != 0) == (w.zeros != 0), EXPERTLY_ZEROS);
  REQUIRE(w.bits != 16 || w.zero_kind == 0, EXPERTLY_ZEROS);
  REQUIRE(w.zero_kind != 2 || aligned(w.zeros, 2), EXPERTLY_ALIGNMENT);
  return 0;
}

int check_weight(const expertly_weight *w) {
  REQUIRE(w && w->data, EXPERTLY_NULL);
  REQUIRE(w->bits == 4 || w->bits == 8 || w->bits == 16, EXPERTLY_BITS);
  REQUIRE(w->experts > 0 && w->rows > 0 && w->cols > 0, EXPERTLY_SIZE);
  REQUIRE(w->rows % kLanes == 0 && w->out > 0 && w->out <= w->rows, EXPERTLY_SIZE);
  REQUIRE(fits(w->experts, w->rows, w->cols), EXPERTLY_OVERFLOW);
  if (w->bits == 16) {
    REQUIRE(w->group == 0, EXPERTLY_GROUP);
  } else {
    REQUIRE(w->scales, EXPERTLY_NULL);
    REQUIRE(w->group == 32 || w->group == 64 || w->group == 128, EXPERTLY_GROUP);
    REQUIRE(w->cols % w->group == 0, EXPERTLY_COLS);
    REQUIRE(aligned(w->scales, 2), EXPERTLY_ALIGNMENT);
  }
  return check_zeros(*w);
}

bool known(int type) { return type == EXPERTLY_FLOAT32 || type == EXPERTLY_BFLOAT16; }

// x or y of (rows, cols).
int check_values(const void *data, int type, int64_t rows, int64_t cols) {
  REQUIRE(known(type), EXPERTLY_TYPE);
  REQUIRE(rows >= 0, EXPERTLY_SIZE);
  REQUIRE(fits(rows, cols), EXPERTLY_OVERFLOW);
  REQUIRE(data || rows == 0, EXPERTLY_NULL);
  REQUIRE(aligned(data, type == EXPERTLY_BFLOAT16 ? 2 : 4), EXPERTLY_ALIGNMENT);
  return 0;
}

int check_gate(const Experts &call, const expertly_gate *gate) {
  REQUIRE(gate, EXPERTLY_NULL);
  REQUIRE(gate->act >= 0 && gate->act <= 5, EXPERTLY_GATE);
  REQUIRE(gate->gated == 0 || gate->gated == 1, EXPERTLY_GATE);
  REQUIRE(gate->act != 3 || (gate->gated && gate->limit >= 0), EXPERTLY_GATE);
  const expertly_weight &up = *call.gate_up, &down = *call.down;
  REQUIRE(up.experts == down.experts && up.out == down.cols * (1 + gate->gated), EXPERTLY_PAIR);
  REQUIRE(down.cols % kLanes == 0, EXPERTLY_PAIR);  // gate and up begin at a block
  return 0;
}

}  // namespace

int check_linears(int n, const expertly_weight *const *w, const float *const *bias, Input x,
                  int64_t tokens, void *const *y, int y_type) {
  REQUIRE(n > 0, EXPERTLY_SIZE);
  REQUIRE(w && bias && y, EXPERTLY_NULL);
  for (int i = 0; i < n; i++) {
    if (int code = check_weight(w[i])) return code;
    REQUIRE(w[i]->experts == 1, EXPERTLY_SIZE);
    REQUIRE(w[i]->cols == w[0]->cols, EXPERTLY_PAIR);
    REQUIRE(aligned(bias[i], 4), EXPERTLY_ALIGNMENT);
    if (int code = check_values(y[i], y_type, tokens, w[i]->out)) return code;
  }
  return check_values(x.data, x.type, tokens, w[0]->cols);
}

int check_grouped(const expertly_weight *w, const float *bias, Input x, const int64_t *counts,
                  int64_t rows, Output y) {
  if (int code = check_weight(w)) return code;
  REQUIRE(counts, EXPERTLY_NULL);
  REQUIRE(aligned(bias, 4) && aligned(counts, 8), EXPERTLY_ALIGNMENT);
  int64_t sum = 0;
  for (int64_t e = 0; e < w->experts; e++) {
    REQUIRE(counts[e] >= 0 && counts[e] <= rows - sum, EXPERTLY_COUNTS);
    sum += counts[e];
  }
  REQUIRE(sum == rows, EXPERTLY_COUNTS);
  if (int code = check_values(x.data, x.type, rows, w->cols)) return code;
  return check_values(y.data, y.type, rows, w->out);
}

int check_experts(const Experts &call, const expertly_gate *gate) {
  if (int code = check_weight(call.gate_up)) return code;
  if (int code = check_weight(call.down)) return code;
  if (int code = check_gate(call, gate)) return code;
  REQUIRE(call.tokens >= 0 && call.top_k > 0, EXPERTLY_SIZE);
  REQUIRE(call.tokens == 0 || (call.ids && call.weights), EXPERTLY_NULL);
  REQUIRE(fits(call.tokens, call.top_k, call.down->cols), EXPERTLY_OVERFLOW);
  REQUIRE(aligned(call.ids, 8) && aligned(call.weights, 4), EXPERTLY_ALIGNMENT);
  REQUIRE(aligned(call.gate_up_bias, 4) && aligned(call.down_bias, 4), EXPERTLY_ALIGNMENT);
  if (int code = check_values(call.x.data, call.x.type, call.tokens, call.gate_up->cols))
    return code;
  return check_values(call.y.data, call.y.type, call.tokens, call.down->out);
}

int check_norm(const Norm &call) {
  REQUIRE(call.dim > 0, EXPERTLY_SIZE);
  if (int code = check_values(call.weight.data, call.weight.type, 1, call.dim)) return code;
  if (int code = check_values(call.x.data, call.x.type, call.rows, call.dim)) return code;
  return check_values(call.y.data, call.y.type, call.rows, call.dim);
}

}  // namespace expertly
