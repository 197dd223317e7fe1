// The leaves themselves, compiled once for each instruction set in the compiler's own vector types.
// Included after the target is set: nothing of the standard library may be instantiated here.
#pragma once
#include <string.h>

#include "ops.h"
#include "target.h"

namespace {

typedef float Wide __attribute__((vector_size(64)));  // split where the machine's are narrower
typedef float Half __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(32)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Places){__VA_ARGS__})
#endif

constexpr int64_t kPair = 32;  // numbers read at a time: two vectors
constexpr int64_t kRows = 4;   // tokens read side by side, from as many parts of the cache: a core
                               // reads more at once from several places than from one
constexpr int64_t kAhead = 4096;  // bytes from a token to what is prefetched

struct Two {
  Wide low, high;
};

template <class V, class T>
INLINE V get(const T *from) {
  V x;
  memcpy(&x, from, sizeof(x));
  return x;
}

INLINE float widen(float x) { return x; }
INLINE float widen(uint16_t x) {
  uint32_t word = (uint32_t)x << 16;
  return get<float>(&word);
}
INLINE void narrow(float x, float *to) { *to = x; }
INLINE void narrow(float x, uint16_t *to) {  // to the nearest, ties to even
  uint32_t word = get<uint32_t>(&x);
  *to = x != x ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// 32 numbers. Of float32 the first and the last 16; of bfloat16 those at even and at odd places,
// for a pair of them is one word, and a shift or a mask makes a float32 of each.
INLINE Two read(const float *x) { return {get<Wide>(x), get<Wide>(x + 16)}; }
INLINE Two read(const uint16_t *x) {
  Words pairs = get<Words>(x), even = pairs << 16, odd = pairs & 0xffff0000u;
  return {get<Wide>(&even), get<Wide>(&odd)};
}

// Where the i-th pair's two numbers lie in that order.
INLINE void place_of(int64_t i, int64_t *first, int64_t *second, const float *) {
  *first = 2 * i, *second = 2 * i + 1;
}
INLINE void place_of(int64_t i, int64_t *first, int64_t *second, const uint16_t *) {
  *first = i, *second = i + kPair / 2;
}

template <class T>
void place(const float *from, int64_t count, float *to) {
  for (int64_t block = 0; block < count; block += kPair)
    for (int64_t i = 0; i < kPair / 2; i++) {
      int64_t first, second;
      place_of(i, &first, &second, (const T *)0);
      to[block + first] = from[block + 2 * i];
      to[block + second] = from[block + 2 * i + 1];
    }
}

template <class T>
void put_back(const float *from, int64_t count, T *to) {
  for (int64_t block = 0; block < count; block += kPair)
    for (int64_t i = 0; i < kPair / 2; i++) {
      int64_t first, second;
      place_of(i, &first, &second, to);
      narrow(from[block + first], to + block + 2 * i);
      narrow(from[block + second], to + block + 2 * i + 1);
    }
}

template <class T>
void load(const T *from, int64_t count, float clip, float *to) {
  for (int64_t i = 0; i < count; i++) to[i] = widen(from[i]);
  if (clip > 0)
    for (int64_t i = 0; i < count; i++) {
      to[i] = to[i] > clip ? clip : to[i];
      to[i] = to[i] < -clip ? -clip : to[i];
    }
}

template <class T>
void store(const float *from, int64_t count, T *to) {
  for (int64_t i = 0; i < count; i++) narrow(from[i], to + i);
}

float inverse_rms(const float *x, int64_t count, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += x[i] * x[i];
  return 1 / __builtin_sqrtf(sum / (float)count + eps);
}

template <class T>
void weigh(float *x, int64_t dim, const T *weight, float factor) {
  for (int64_t i = 0; i < dim; i++) x[i] *= factor * widen(weight[i]);
}

template <class T>
void rotate(float *x, const T *cos, const T *sin, int64_t rotated) {
  int64_t half = rotated / 2;
  for (int64_t i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * widen(cos[i]) - b * widen(sin[i]);
    x[i + half] = b * widen(cos[i + half]) + a * widen(sin[i + half]);
  }
}

template <class T>
void products(const float *x, const T *rows, int64_t count, int64_t dim, float *to) {
  for (int64_t row = 0; row < count; row++, rows += dim) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) sum += x[i] * widen(rows[i]);
    to[row] = sum;
  }
}

template <class T>
INLINE void ahead(const T *x) {
  for (int64_t at = 0; at < kPair * (int64_t)sizeof(T); at += 64)
    __builtin_prefetch((const char *)x + kAhead + at);
}

// Without taking an address, so that x stays in a register.
INLINE Half halves(Wide x) {
  return Half{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]} +
         Half{x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15]};
}

// The sums of four vectors, each time adding halves of two of them.
INLINE void add_up(Wide a, Wide b, Wide c, Wide d, float *to) {
  Half w = halves(a), x = halves(b), y = halves(c), z = halves(d);
  Half wx = PICK(w, x, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(w, x, 4, 5, 6, 7, 12, 13, 14, 15);
  Half yz = PICK(y, z, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(y, z, 4, 5, 6, 7, 12, 13, 14, 15);
  Half all = PICK(wx, yz, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(wx, yz, 2, 3, 10, 11, 6, 7, 14, 15);
  to[0] = all[0] + all[1], to[1] = all[4] + all[5];
  to[2] = all[2] + all[3], to[3] = all[6] + all[7];
}

// Several queries meet each key while it is in a register.
template <int kQueries, class T>
void dots_of(const float *q, const T *keys, int64_t count, int64_t dim, float *scores) {
  const int64_t part = (count + kRows - 1) / kRows;
  for (int64_t t = 0; t < part; t++) {
    int64_t at[kRows];
    for (int64_t r = 0; r < kRows; r++)  // the last one again where there are none left
      at[r] = t + r * part < count ? t + r * part : count - 1;
    Wide sum[kQueries][kRows] = {};
    for (int64_t i = 0; i < dim; i += kPair) {
      Two query[kQueries];
#pragma GCC unroll 4
      for (int64_t j = 0; j < kQueries; j++)
        query[j] = {get<Wide>(q + j * dim + i), get<Wide>(q + j * dim + i + 16)};
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; r++) {
        const T *key = keys + at[r] * dim + i;
        ahead(key);
        Two x = read(key);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kQueries; j++) {
          sum[j][r] += query[j].low * x.low;
          sum[j][r] += query[j].high * x.high;
        }
      }
    }
    for (int64_t j = 0; j < kQueries; j++) {
      float four[kRows];
      add_up(sum[j][0], sum[j][1], sum[j][2], sum[j][3], four);
      for (int64_t r = 0; r < kRows; r++) scores[j * count + at[r]] = four[r];
    }
  }
}

// The sums of kPairs * 32 columns for several queries, which stay in registers.
template <int kQueries, int kPairs, class T>
void mix_columns(const float *p, const T *values, int64_t count, int64_t dim, float *to) {
  const int64_t part = (count + kRows - 1) / kRows;
  Two sum[kQueries][kPairs] = {};
  for (int64_t t = 0; t < part; t++)
    for (int64_t at = t; at < count; at += part) {
      float weight[kQueries];
      for (int64_t j = 0; j < kQueries; j++) weight[j] = p[j * count + at];
#pragma GCC unroll 4
      for (int64_t i = 0; i < kPairs; i++) {
        const T *value = values + at * dim + i * kPair;
        ahead(value);
        Two x = read(value);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kQueries; j++)
          sum[j][i].low += weight[j] * x.low, sum[j][i].high += weight[j] * x.high;
      }
    }
  for (int64_t j = 0; j < kQueries; j++) memcpy(to + j * dim, sum[j], sizeof(sum[j]));
}

template <int kQueries, class T>
void mix_of(const float *p, const T *values, int64_t count, int64_t dim, float *to) {
  int64_t i = 0;
  if (kQueries == 1)  // else registers do not do
    for (; i + 4 * kPair <= dim; i += 4 * kPair)
      mix_columns<kQueries, 4>(p, values + i, count, dim, to + i);
  for (; i + 2 * kPair <= dim; i += 2 * kPair)
    mix_columns<kQueries, 2>(p, values + i, count, dim, to + i);
  if (i < dim) mix_columns<kQueries, 1>(p, values + i, count, dim, to + i);
}

template <class T>
void dots(const float *q, int64_t queries, const T *keys, int64_t count, int64_t dim,
          float *scores) {
  int64_t j = 0;
  for (; j + 4 <= queries; j += 4) dots_of<4>(q + j * dim, keys, count, dim, scores + j * count);
  for (; j + 2 <= queries; j += 2) dots_of<2>(q + j * dim, keys, count, dim, scores + j * count);
  if (j < queries) dots_of<1>(q + j * dim, keys, count, dim, scores + j * count);
}

template <class T>
void mix(const float *p, int64_t queries, const T *values, int64_t count, int64_t dim, float *to) {
  int64_t j = 0;
  for (; j + 4 <= queries; j += 4) mix_of<4>(p + j * count, values, count, dim, to + j * dim);
  for (; j + 2 <= queries; j += 2) mix_of<2>(p + j * count, values, count, dim, to + j * dim);
  if (j < queries) mix_of<1>(p + j * count, values, count, dim, to + j * dim);
}

// e^x for x <= 0 within 2 units in the last place, in steps that become vectors: x = n ln 2 + r,
// a polynomial for e^r, and n goes into the exponent.
INLINE float power(float x) {
  x = x < -87.0f ? -87.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: n is in its low bits
  float n = shifted - 12582912.0f;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t exponent = (get<uint32_t>(&shifted) + 127u) << 23;
  return p * get<float>(&exponent);
}

void softmax(float *x, int64_t count, float scale) {
  float top = x[0] * scale, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < count; i++) {
    x[i] *= scale;
    top = x[i] > top ? x[i] : top;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) {
    x[i] = power(x[i] - top);
    sum += x[i];
  }
  float factor = 1 / sum;
  for (int64_t i = 0; i < count; i++) x[i] *= factor;
}

template <class T>
constexpr expertly::LeavesOf<T> leaves_for() {
  return {load<T>,  store<T>, weigh<T>, rotate<T>,  products<T>,
          place<T>, dots<T>,  mix<T>,       put_back<T>};
}

const expertly::Leaves kLeaves = {leaves_for<float>(), leaves_for<uint16_t>(), softmax, inverse_rms};

}  // namespace
