// The leaves on AVX-512.
#include "target.h"
#if EXPERTLY_X86
#include <string.h>

#include "ops.h"
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "ops_leaves.h"

namespace expertly {
const Leaves *avx512_leaves() { return &kLeaves; }
}  // namespace expertly

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
