// Vectors of 16 lanes on AVX-512 with VNNI.
#include "target.h"
#if EXPERTLY_X86
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared.h"
#include "team.h"
#ifdef __clang__
#pragma clang attribute push(                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")
#endif

namespace {

typedef __m512 F;
typedef __m512i I;
typedef __m512i Bytes;  // 16 rows x 4 bytes
typedef __m512i Quad;   // 4 activations, in every lane

constexpr int kMaxTokens = 6;     // x 2 blocks: 12 integer and 12 float sums in 32 registers
constexpr int kUnroll = 8;        // of the 8 steps of a chunk
constexpr int kStreams = 4;         // blocks that one row of x meets at once
constexpr int32_t kBytesAre = 0;  // bytes are taken as they are, 0..255

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F all(float x) { return _mm512_set1_ps(x); }
INLINE F load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, F x) { _mm512_storeu_ps(p, x); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// a NaN in x stays: the instruction returns its second operand
INLINE F at_least(F x, F low) { return _mm512_max_ps(low, x); }
INLINE F at_most(F x, F high) { return _mm512_min_ps(high, x); }
INLINE F absolute(F x) { return _mm512_abs_ps(x); }
INLINE F where_negative(F x, F then, F other) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), other, then);
}
INLINE float total(F x) { return _mm512_reduce_add_ps(x); }
// compared as integers, so that NaN is the largest of all
INLINE float largest(F x, F y) {
  __m512i a = _mm512_castps_si512(_mm512_abs_ps(x)), b = _mm512_castps_si512(_mm512_abs_ps(y));
  int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE I all_int(int32_t x) { return _mm512_set1_epi32(x); }
INLINE I round_int(F x) { return _mm512_cvtps_epi32(x); }
INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
INLINE int32_t total_int(I x, I y) { return _mm512_reduce_add_epi32(_mm512_add_epi32(x, y)); }
INLINE F power_of_2(F n) { return _mm512_scalef_ps(all(1), n); }

INLINE F load_half(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE F load_u8(const uint8_t *p) {
  return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE F load_bf16(const uint16_t *p) {
  I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE void store_bf16(uint16_t *p, F x) {
  I bits = _mm512_castps_si512(x);
  I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all_int(1));
  I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, all_int(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, all_int(0x7fc00000));
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
INLINE void store_s8(int8_t *p, I x) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(x));
}

INLINE Bytes load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE void store_bytes(uint8_t *p, Bytes x) { _mm512_storeu_si512(p, x); }
INLINE Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
INLINE F even_bf16(Bytes x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
INLINE F odd_bf16(Bytes x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, all_int((int32_t)0xffff0000)));
}

INLINE Quad quad(const int8_t *p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}
INLINE I dot_nibbles(I sum, Bytes w, Quad x) { return _mm512_dpbusd_epi32(sum, w, x); }
INLINE I dot_bytes(I sum, Bytes w, Quad x) { return _mm512_dpbusd_epi32(sum, w, x); }

}  // namespace

#include "kernels.h"

namespace expertly {
const Kernels *avx512_kernels() { return &kKernels; }
}  // namespace expertly
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
