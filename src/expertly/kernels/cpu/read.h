// How fast this machine reads memory, as the kernels do; loaded by kernels/native_read.py.
#pragma once
#include <stdint.h>

#include "expertly.h"

#ifdef __cplusplus
extern "C" {
#endif

// sum: of all 64-bit words, so that each of them has to be read. data: aligned to 8 bytes; bytes: a
// multiple of 8.
EXPERTLY_PUBLIC int expertly_read(int threads, const void *data, int64_t bytes, uint64_t *sum);

#ifdef __cplusplus
}
#endif
