// RMS norm, rounded where transformers rounds.
#pragma once

namespace {

INLINE F rounded_bf16(F x) {
  uint16_t words[kLanes];
  store_bf16(words, x);
  return load_bf16(words);
}

// Once: all is float32 until the end; else x / rms(x) is rounded to x's type before the weight.
static void norm_row(const Norm &call, int64_t row) {
  int64_t at = row * call.dim;
  F squares = zero();
  for (int64_t i = 0; i < call.dim; i += kLanes) {
    F x = load_first(call.x, at + i, call.dim - i);
    squares = fma(x, x, squares);
  }
  F scale = all(1 / sqrtf(total(squares) / (float)call.dim + call.eps));
  bool round = call.x.type == EXPERTLY_BFLOAT16 && !call.once;
  for (int64_t i = 0; i < call.dim; i += kLanes) {
    int64_t n = call.dim - i;
    F x = mul(load_first(call.x, at + i, n), scale);
    F weight = add(load_first(call.weight, i, n), all(call.offset));
    store_first(call.y, at + i, mul(round ? rounded_bf16(x) : x, weight), n);
  }
}

static void run_rms_norm(const Norm &call) {
  for (int64_t row = 0; row < call.rows; row++) norm_row(call, row);
}

}  // namespace
