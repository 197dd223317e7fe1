// What differs between compilers and machines.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define EXPERTLY_X86 1
#else
#define EXPERTLY_X86 0
#endif

// Internal linkage throughout: a copy compiled for one instruction set never serves another.
#define INLINE static inline __attribute__((always_inline))
