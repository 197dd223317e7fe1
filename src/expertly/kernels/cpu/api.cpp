// The entry points: check the arguments, then run the kernels of the instruction set asked for.
#include <stdlib.h>

#include "shared.h"
#include "target.h"

namespace expertly {
namespace {

constexpr int kMostThreads = 4096;

const Kernels *kernels_of(int isa) {
  if (isa < 0 || isa > expertly_best_isa()) return 0;
#if EXPERTLY_X86
  if (isa == 2) return avx512_kernels();
  if (isa == 1) return avx2_kernels();
#endif
  return portable_kernels();
}

int check_machine(int isa, int threads) {
  if (!kernels_of(isa)) return EXPERTLY_ISA;
  return threads < 1 || threads > kMostThreads ? EXPERTLY_THREADS : 0;
}

// One job for each expert that has rows.
int run_grouped(int isa, int threads, const expertly_weight *w, const float *bias, Input x,
                const int64_t *counts, int64_t rows, Output y) {
  Job *jobs = (Job *)malloc((size_t)w->experts * sizeof(Job));
  if (!jobs) return EXPERTLY_MEMORY;
  int64_t n = 0, first = 0, bytes = y.type == EXPERTLY_BFLOAT16 ? 2 : 4;
  for (int64_t e = 0; e < w->experts; first += counts[e++])
    if (counts[e] > 0)
      jobs[n++] = {w, e, first, counts[e], bias ? bias + e * w->out : 0,
                   {(char *)y.data + first * w->out * bytes, y.type}};
  int code = kernels_of(isa)->linears({threads, jobs, n, rows, w->cols, x, false});
  free(jobs);
  return code;
}

}  // namespace
}  // namespace expertly

using namespace expertly;

int expertly_abi(void) { return EXPERTLY_ABI; }

int expertly_best_isa(void) {
#if EXPERTLY_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vnni");
  return avx2 ? 1 + avx512 : 0;
#else
  return 0;
#endif
}

int expertly_linears(int isa, int threads, int n, const expertly_weight *const *w,
                     const float *const *bias, const void *x, int x_type, int64_t tokens,
                     void *const *y, int y_type) {
  if (int code = check_machine(isa, threads)) return code;
  if (int code = check_linears(n, w, bias, {x, x_type}, tokens, y, y_type)) return code;
  if (tokens == 0) return 0;
  Job few[8], *jobs = n <= 8 ? few : (Job *)malloc((size_t)n * sizeof(Job));
  if (!jobs) return EXPERTLY_MEMORY;
  for (int i = 0; i < n; i++) jobs[i] = {w[i], 0, 0, tokens, bias[i], {y[i], y_type}};
  Linears call = {threads, jobs, n, tokens, w[0]->cols, {x, x_type}, true};
  int code = kernels_of(isa)->linears(call);
  if (jobs != few) free(jobs);
  return code;
}

int expertly_grouped_linear(int isa, int threads, const expertly_weight *w, const float *bias,
                            const void *x, int x_type, const int64_t *counts, int64_t rows,
                            void *y, int y_type) {
  if (int code = check_machine(isa, threads)) return code;
  Input input = {x, x_type};
  Output output = {y, y_type};
  if (int code = check_grouped(w, bias, input, counts, rows, output)) return code;
  return rows == 0 ? 0 : run_grouped(isa, threads, w, bias, input, counts, rows, output);
}

int expertly_experts(int isa, int threads, const expertly_weight *gate_up,
                     const expertly_weight *down, const float *gate_up_bias,
                     const float *down_bias, const expertly_gate *gate, const void *x, int x_type,
                     const int64_t *ids, const float *weights, int64_t tokens, int64_t top_k,
                     void *y, int y_type) {
  if (int code = check_machine(isa, threads)) return code;
  Experts call = {threads,     gate_up, down,    gate_up_bias, down_bias, {},
                  {x, x_type}, ids,     weights, tokens,       top_k,     {y, y_type}};
  if (int code = check_experts(call, gate)) return code;
  call.gate = *gate;
  return kernels_of(isa)->experts(call);
}

int expertly_rms_norm(int isa, const expertly_norm *n) {
  if (int code = check_machine(isa, 1)) return code;
  if (!n) return EXPERTLY_NULL;
  Norm call = {{n->x, n->x_type}, {n->weight, n->w_type}, n->eps, n->offset,
               n->once != 0,      n->rows,                n->dim, {n->y, n->y_type}};
  if (int code = check_norm(call)) return code;
  kernels_of(isa)->rms_norm(call);
  return 0;
}
