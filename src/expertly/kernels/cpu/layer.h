// Decoder layers for one new token per sequence. Plain structs and pointers, loaded by
// kernels/native_layers.py.
#pragma once
#include <stdint.h>

#include "ops.h"

#ifdef __cplusplus
extern "C" {
#endif

// x + attention(norm(x)), then that + experts(norm(that)). Of the norms x, y, rows and their types
// are not read, nor is what now says of q, k and v.
typedef struct {
  expertly_norm norms[2];
  const expertly_weight *projections[4];  // of queries, keys, values, and the output's
  const float *biases[4];                 // or null
  expertly_attention attention;
  expertly_router router;  // weight null: no experts
  int32_t weights_type;    // to which the router rounds them
  const expertly_weight *gate_up, *down;
  const float *gate_up_bias, *down_bias;
  expertly_gate gate;
} expertly_layer;

// x (batch, dim) through count layers to y (batch, dim), each with its own place in now; all of one
// type, the cache's. Where the last one has no experts, y is what stands between its halves, and
// normed (batch, dim) what comes out of its second norm.
EXPERTLY_PUBLIC int expertly_decode_layers(int isa, int threads, int64_t count,
                                           const expertly_layer *layers,
                                           const expertly_decoding *now, const void *x, int type,
                                           int64_t batch, void *y, void *normed);

#ifdef __cplusplus
}
#endif
