// Vectors of 16 lanes in the compiler's own vector types: any machine, and the reference.
#include "target.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared.h"
#include "team.h"

namespace {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef I Bytes;       // 16 rows x 4 bytes, each row one little-endian word
struct Quad {          // 4 activations
  I even, odd;
};

constexpr int kMaxTokens = 2;
constexpr int kUnroll = 1;        // of the 8 steps of a chunk
constexpr int kStreams = 2;         // blocks that one row of x meets at once
constexpr int32_t kBytesAre = 0;  // bytes are taken as they are, 0..255

template <class To, class From>
INLINE To bits(From x) {
  To y;
  static_assert(sizeof(x) == sizeof(y), "the same bits");
  memcpy(&y, &x, sizeof(y));
  return y;
}

INLINE F zero() { return F{}; }
INLINE F all(float x) { return F{} + x; }
INLINE I all_int(int32_t x) { return I{} + x; }
INLINE F load(const float *p) {
  F x;
  memcpy(&x, p, sizeof(x));
  return x;
}
INLINE void store(float *p, F x) { memcpy(p, &x, sizeof(x)); }
INLINE F add(F a, F b) { return a + b; }
INLINE F sub(F a, F b) { return a - b; }
INLINE F mul(F a, F b) { return a * b; }
INLINE F div(F a, F b) { return a / b; }
INLINE F fma(F a, F b, F c) { return a * b + c; }
INLINE F choose(I mask, F then, F other) {
  return bits<F>((mask & bits<I>(then)) | (~mask & bits<I>(other)));
}
// comparisons with a NaN are false, so a NaN in x stays
INLINE F at_least(F x, F low) { return choose(I(x < low), low, x); }
INLINE F at_most(F x, F high) { return choose(I(x > high), high, x); }
INLINE F absolute(F x) { return bits<F>(bits<I>(x) & 0x7fffffff); }
INLINE F where_negative(F x, F then, F other) { return choose(bits<I>(x) >> 31, then, other); }
INLINE float total(F x) {
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += x[i];
  return sum;
}
// compared as integers, so that NaN is the largest of all
INLINE float largest(F x, F y) {
  I a = bits<I>(absolute(x)), b = bits<I>(absolute(y));
  int32_t top = 0;
  for (int i = 0; i < 16; i++) {
    top = a[i] > top ? a[i] : top;
    top = b[i] > top ? b[i] : top;
  }
  return bits<float>(top);
}

// Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits, |x| < 2^22.
INLINE I round_int(F x) { return bits<I>(x + 12582912.0f) - 0x4b400000; }
INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
INLINE int32_t total_int(I x, I y) {
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += x[i] + y[i];
  return sum;
}
INLINE F power_of_2(F n) {
  typedef uint32_t U __attribute__((vector_size(64)));
  return bits<F>(bits<U>(round_int(n) + 127) << 23);
}

INLINE float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  // the exponent is rebiased by a product, which is right for subnormal numbers too
  float size = rest < 0x7c00 ? bits<float>(rest << 13) * 0x1p112f
                             : bits<float>((rest << 13) | 0x7f800000);
  return bits<float>(bits<uint32_t>(size) | sign);
}
INLINE F load_half(const uint16_t *p) {
  F x;
  for (int i = 0; i < 16; i++) x[i] = half_to_float(p[i]);
  return x;
}
INLINE F load_u8(const uint8_t *p) {
  F x;
  for (int i = 0; i < 16; i++) x[i] = p[i];
  return x;
}
INLINE F load_bf16(const uint16_t *p) {
  F x;
  for (int i = 0; i < 16; i++) x[i] = bits<float>((uint32_t)p[i] << 16);
  return x;
}
INLINE void store_bf16(uint16_t *p, F x) {
  for (int i = 0; i < 16; i++) {
    uint32_t word = bits<uint32_t>((float)x[i]);
    p[i] = x[i] != x[i] ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
}
INLINE void store_s8(int8_t *p, I x) {
  for (int i = 0; i < 16; i++) p[i] = (int8_t)x[i];
}

INLINE Bytes load_bytes(const uint8_t *p) {
  Bytes x;
  memcpy(&x, p, sizeof(x));
  return x;
}
INLINE void store_bytes(uint8_t *p, Bytes x) { memcpy(p, &x, sizeof(x)); }
INLINE Bytes low_nibbles(Bytes x) { return x & 0x0f0f0f0f; }
INLINE Bytes high_nibbles(Bytes x) { return (x >> 4) & 0x0f0f0f0f; }
INLINE F even_bf16(Bytes x) {
  typedef uint32_t U __attribute__((vector_size(64)));
  return bits<F>(bits<U>(x) << 16);
}
INLINE F odd_bf16(Bytes x) { return bits<F>(x & (int32_t)0xffff0000); }

// Two activations side by side as 16-bit numbers, in every lane.
INLINE I pair(int8_t low, int8_t high) {
  return all_int((int32_t)((uint16_t)(int16_t)low | (uint32_t)(uint16_t)(int16_t)high << 16));
}
INLINE Quad quad(const int8_t *p) { return {pair(p[0], p[2]), pair(p[1], p[3])}; }
// 255 * 127 fits into 16 bits, and there every machine can multiply
INLINE I multiply_pairs(I w, I x) {
  typedef int16_t S __attribute__((vector_size(64)));
  return bits<I>(bits<S>(w & 0x00ff00ff) * bits<S>(x));
}
INLINE I add_pair(I sum, I pairs) {
  typedef uint32_t U __attribute__((vector_size(64)));
  return sum + (bits<I>(bits<U>(pairs) << 16) >> 16) + (pairs >> 16);
}
INLINE I dot_bytes(I sum, Bytes w, Quad x) {
  sum = add_pair(sum, multiply_pairs(w, x.even));
  return add_pair(sum, multiply_pairs(w >> 8, x.odd));
}
// 15 * 127 twice does too
INLINE I dot_nibbles(I sum, Bytes w, Quad x) {
  typedef int16_t S __attribute__((vector_size(64)));
  S even = bits<S>(multiply_pairs(w, x.even)), odd = bits<S>(multiply_pairs(w >> 8, x.odd));
  return add_pair(sum, bits<I>(even + odd));
}

}  // namespace

#include "kernels.h"

namespace expertly {
const Kernels *portable_kernels() { return &kKernels; }
}  // namespace expertly
