// Vectors of 16 lanes as two halves, on AVX2 with FMA and F16C.
#include "target.h"
#if EXPERTLY_X86
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared.h"
#include "team.h"
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

namespace {

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
typedef I Bytes;       // 16 rows x 4 bytes
typedef __m256i Quad;  // 4 activations, in every lane

constexpr int kMaxTokens = 2;       // 16 registers
constexpr int kUnroll = 8;        // of the 8 steps of a chunk
constexpr int kStreams = 4;         // blocks that one row of x meets at once
constexpr int32_t kBytesAre = 128;  // dot_bytes takes a byte q as q - 128

INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float *p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
// a NaN in x stays: the instruction returns its second operand
INLINE F at_least(F x, F low) { return {_mm256_max_ps(low.a, x.a), _mm256_max_ps(low.b, x.b)}; }
INLINE F at_most(F x, F high) { return {_mm256_min_ps(high.a, x.a), _mm256_min_ps(high.b, x.b)}; }
INLINE F absolute(F x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE F where_negative(F x, F then, F other) {
  return {_mm256_blendv_ps(other.a, then.a, x.a), _mm256_blendv_ps(other.b, then.b, x.b)};
}
INLINE float total(F x) {
  __m256 sum = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
// compared as integers, so that NaN is the largest of all
INLINE __m256i largest_of_halves(F x) {
  F size = absolute(x);
  return _mm256_max_epi32(_mm256_castps_si256(size.a), _mm256_castps_si256(size.b));
}
INLINE float largest(F x, F y) {
  __m256i top = _mm256_max_epi32(largest_of_halves(x), largest_of_halves(y));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(four));
}

INLINE I all_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE I round_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE int32_t total_int(I x, I y) {
  __m256i sum = _mm256_add_epi32(_mm256_add_epi32(x.a, x.b), _mm256_add_epi32(y.a, y.b));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
INLINE __m256 half_power_of_2(__m256 n) {
  __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
INLINE F power_of_2(F n) { return {half_power_of_2(n.a), half_power_of_2(n.b)}; }

INLINE __m128i load_16_bytes(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE F load_half(const uint16_t *p) {
  return {_mm256_cvtph_ps(load_16_bytes(p)), _mm256_cvtph_ps(load_16_bytes(p + 8))};
}
INLINE F load_u8(const uint8_t *p) {
  __m128i bytes = load_16_bytes(p);
  return to_float({_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
}
INLINE __m256 half_load_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bytes(p)), 16));
}
INLINE F load_bf16(const uint16_t *p) { return {half_load_bf16(p), half_load_bf16(p + 8)}; }
INLINE __m256i half_round_bf16(__m256 x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q), word = _mm256_castsi256_ps(bits);
  word = _mm256_blendv_ps(word, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
  return _mm256_srli_epi32(_mm256_castps_si256(word), 16);
}
INLINE void store_bf16(uint16_t *p, F x) {
  __m256i words = _mm256_packus_epi32(half_round_bf16(x.a), half_round_bf16(x.b));
  _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(words, 0xd8));
}
INLINE void store_s8(int8_t *p, I x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(low, high));
}

INLINE __m256i load_32_bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE Bytes load_bytes(const uint8_t *p) { return {load_32_bytes(p), load_32_bytes(p + 32)}; }
INLINE void store_bytes(uint8_t *p, Bytes x) {
  _mm256_storeu_si256((__m256i *)p, x.a);
  _mm256_storeu_si256((__m256i *)(p + 32), x.b);
}
INLINE Bytes low_nibbles(Bytes x) {
  __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
INLINE Bytes high_nibbles(Bytes x) {
  return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
INLINE F even_bf16(Bytes x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
INLINE F odd_bf16(Bytes x) {
  __m256i mask = _mm256_set1_epi32((int32_t)0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, mask)),
          _mm256_castsi256_ps(_mm256_and_si256(x.b, mask))};
}

INLINE Quad quad(const int8_t *p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return _mm256_set1_epi32(bits);
}
// pairs are added in 16 bits, which saturate: 15 * 127 * 2 fits
INLINE __m256i half_dot(__m256i sum, __m256i w, __m256i x) {
  __m256i pairs = _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE I dot_nibbles(I sum, Bytes w, Quad x) {
  return {half_dot(sum.a, w.a, x), half_dot(sum.b, w.b, x)};
}
// 255 * 127 * 2 does not, but 128 * 127 * 2 does: the sign of q - 128 moves to the activation
INLINE __m256i half_dot_signed(__m256i sum, __m256i w, __m256i x) {
  w = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
  return half_dot(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
INLINE I dot_bytes(I sum, Bytes w, Quad x) {
  return {half_dot_signed(sum.a, w.a, x), half_dot_signed(sum.b, w.b, x)};
}

}  // namespace

#include "kernels.h"

namespace expertly {
const Kernels *avx2_kernels() { return &kKernels; }
}  // namespace expertly
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
