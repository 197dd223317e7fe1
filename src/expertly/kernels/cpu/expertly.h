// The C interface of the packed kernels: plain structs and pointers, loaded by kernels/native.py.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// One packed matrix (experts = 1) or a stack of experts; kernels/packed.py describes the layout.
typedef struct {
  const void *data;
  const uint16_t *scales;  // float16; null for bits 16
  const void *zeros;       // what zero_kind says; null when symmetric
  int32_t bits, group;     // 4, 8 or 16; 32, 64 or 128 (0 for bits 16)
  int32_t zero_kind;       // 0 symmetric, 1 uint8 zero points, 2 float16 minimum
  int64_t experts, rows, cols;  // rows is padded to a multiple of 16
  int64_t out;                  // rows that count
} expertly_weight;

// act: 0 silu, 1 gelu, 2 gelu by tanh, 3 the clamped swiglu of gpt-oss, 4 relu, 5 relu squared
typedef struct {
  int32_t act, gated;
  float alpha, limit;  // of act 3
} expertly_gate;

// One struct, for it is called often and a caller from Python pays for each argument.
typedef struct {
  const void *x, *weight;
  void *y;
  int64_t rows, dim;
  int32_t x_type, w_type, y_type, once;
  float eps, offset;
} expertly_norm;

enum { EXPERTLY_ABI = 2 };  // one more whenever a struct or a function's arguments change

enum { EXPERTLY_FLOAT32 = 0, EXPERTLY_BFLOAT16 = 1 };

// Why a call was refused; kernels/native.py has a sentence for each.
enum {
  EXPERTLY_NULL = -1,
  EXPERTLY_ISA = -2,
  EXPERTLY_THREADS = -3,
  EXPERTLY_BITS = -4,
  EXPERTLY_GROUP = -5,
  EXPERTLY_COLS = -6,
  EXPERTLY_ZEROS = -7,
  EXPERTLY_SIZE = -8,
  EXPERTLY_OVERFLOW = -9,
  EXPERTLY_TYPE = -10,
  EXPERTLY_COUNTS = -11,
  EXPERTLY_GATE = -12,
  EXPERTLY_PAIR = -13,
  EXPERTLY_MEMORY = -14,
  EXPERTLY_ALIGNMENT = -15,
};

#if defined(__GNUC__)
#define EXPERTLY_PUBLIC __attribute__((visibility("default")))
#else
#define EXPERTLY_PUBLIC
#endif

// EXPERTLY_ABI of these sources: kernels/native_abi.py refuses a library of others.
EXPERTLY_PUBLIC int expertly_abi(void);

// The best instruction set of this machine: 0 portable, 1 AVX2, 2 AVX-512 VNNI.
EXPERTLY_PUBLIC int expertly_best_isa(void);

// n weights that share x (tokens, cols): y[i] (tokens, w[i]->out). With 8 bits x is taken in two
// int8 terms, so that the weights' own rounding is all that counts.
EXPERTLY_PUBLIC int expertly_linears(int isa, int threads, int n, const expertly_weight *const *w,
                                     const float *const *bias, const void *x, int x_type,
                                     int64_t tokens, void *const *y, int y_type);

// Rows of x sorted by expert, counts[e] of them for expert e: y (rows, out).
EXPERTLY_PUBLIC int expertly_grouped_linear(int isa, int threads, const expertly_weight *w,
                                            const float *bias, const void *x, int x_type,
                                            const int64_t *counts, int64_t rows, void *y,
                                            int y_type);

// A whole experts layer. ids outside the experts and weights of 0 are skipped.
EXPERTLY_PUBLIC int expertly_experts(int isa, int threads, const expertly_weight *gate_up,
                                     const expertly_weight *down, const float *gate_up_bias,
                                     const float *down_bias, const expertly_gate *gate,
                                     const void *x, int x_type, const int64_t *ids,
                                     const float *weights, int64_t tokens, int64_t top_k, void *y,
                                     int y_type);

// x / rms(x) * (weight + offset), row by row. Once: rounded to y's type at the end and nowhere
// else (Gemma); else x / rms(x) is rounded to x's type before the weight (Llama).
EXPERTLY_PUBLIC int expertly_rms_norm(int isa, const expertly_norm *norm);

#ifdef __cplusplus
}
#endif
