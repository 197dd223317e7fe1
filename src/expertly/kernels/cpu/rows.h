// Rows of activations: read, quantised, written; and a thread's room to work in.
#pragma once

namespace {

INLINE F load_input(Input x, int64_t at) {
  return x.type == EXPERTLY_BFLOAT16 ? load_bf16((const uint16_t *)x.data + at)
                                     : load((const float *)x.data + at);
}

INLINE float input_value(Input x, int64_t at) {
  if (x.type == EXPERTLY_FLOAT32) return ((const float *)x.data)[at];
  uint32_t word = (uint32_t)((const uint16_t *)x.data)[at] << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// The first n of 16 values; the rest are 0.
INLINE F load_first(Input x, int64_t at, int64_t n) {
  if (n >= kLanes) return load_input(x, at);
  float values[kLanes] = {0};
  for (int64_t i = 0; i < n; i++) values[i] = input_value(x, at + i);
  return load(values);
}

INLINE void store_first(Output y, int64_t at, F x, int64_t n) {
  if (y.type == EXPERTLY_BFLOAT16) {
    uint16_t words[kLanes];
    store_bf16(words, x);
    memcpy((uint16_t *)y.data + at, words, (size_t)smaller(n, kLanes) * 2);
  } else if (n >= kLanes) {
    store((float *)y.data + at, x);
  } else {
    float values[kLanes];
    store(values, x);
    memcpy((float *)y.data + at, values, (size_t)n * 4);
  }
}

// What quantize() has lost of a chunk's two halves.
struct Rest {
  F a, b;
};

// 32 values to int8 with the scale absmax / 127. A NaN or an infinity makes the chunk NaN.
INLINE Rest quantize(F a, F b, Chunk *to) {
  float top = largest(a, b);
  if (!(top <= 3e38f)) {
    memset(to->q, 0, sizeof(to->q));
    to->scale = to->sum = NAN;
    to->start[0] = to->start[1] = 0;
    return {all(NAN), all(NAN)};
  }
  F inverse = all(top > 1e-30f ? 127 / top : 0);
  I low = round_int(mul(a, inverse)), high = round_int(mul(b, inverse));
  store_s8(to->q, low);
  store_s8(to->q + kLanes, high);
  int32_t sum = total_int(low, high);
  to->scale = top / 127;
  to->sum = to->scale * (float)sum;
  to->start[0] = -8 * sum;
  to->start[1] = (kBytesAre - 128) * sum;
  F scale = all(to->scale);
  return {sub(a, mul(to_float(low), scale)), sub(b, mul(to_float(high), scale))};
}

// x as the tiles read it: chunks for 4 and 8 bits, float32 for 16. Strides in bytes.
struct Rows {
  Input x;
  int64_t cols;
  char *chunks, *floats;
  char *rests;  // chunks of what rounding to the others has lost; null where that is let go
  int64_t chunk_stride, float_stride;
  int64_t next;  // row to be made ready

  const void *row(int bits, int64_t i) const {
    return bits == 16 ? floats + i * float_stride : chunks + i * chunk_stride;
  }
};

INLINE int64_t chunks_stride(int64_t cols) { return cols / kChunk * (int64_t)sizeof(Chunk); }
// pairs of k are read together
INLINE int64_t floats_stride(int64_t cols) { return (cols + cols % 2) * 4; }

static void prepare_row(const Rows &r, int64_t i) {
  if (r.chunks) {
    Chunk *to = (Chunk *)(r.chunks + i * r.chunk_stride);
    Chunk *rests = (Chunk *)(r.rests ? r.rests + i * r.chunk_stride : 0);
    for (int64_t k = 0; k < r.cols; k += kChunk, to++) {
      F a = load_input(r.x, i * r.cols + k), b = load_input(r.x, i * r.cols + k + kLanes);
      Rest rest = quantize(a, b, to);
      if (rests) quantize(rest.a, rest.b, rests++);
    }
  }
  if (r.floats && r.floats != r.x.data) {
    Output to = {r.floats + i * r.float_stride, EXPERTLY_FLOAT32};
    int64_t padded = r.cols + r.cols % 2;
    for (int64_t k = 0; k < padded; k += kLanes)
      store_first(to, k, load_first(r.x, i * r.cols + k, smaller(r.cols - k, kLanes)), padded - k);
  }
}

constexpr int64_t kRowsTaken = 8;  // at a time

static void prepare_rows(Rows &r, int64_t count) {
  for (int64_t i; (i = kRowsTaken * take(&r.next)) < count;)
    for (int64_t j = i; j < smaller(i + kRowsTaken, count); j++) prepare_row(r, j);
}

// Memory in one piece. Laid out twice: once to measure, once over the real base.
struct Arena {
  char *base;
  size_t used;

  template <class T>
  T *get(int64_t count) {
    T *place = (T *)(base + used);
    used += ((size_t)count * sizeof(T) + 63) / 64 * 64;
    return base ? place : 0;
  }
};

// Memory for all that place() asks of it for a run; null where there is none.
template <class Run>
static void *lay_out(Run *run, void (*place)(Run *, Arena *)) {
  Arena arena = {};
  place(run, &arena);
  void *memory = 0;
  if (posix_memalign(&memory, 64, arena.used) != 0) return 0;
  arena = {(char *)memory, 0};
  place(run, &arena);
  return memory;
}

// For floats of x that lie ready no copy is made.
INLINE void place_rows(Rows *r, Arena *arena, int64_t count, bool chunks, bool floats) {
  r->chunk_stride = chunks_stride(r->cols);
  r->float_stride = floats_stride(r->cols);
  if (chunks) r->chunks = arena->get<char>(count * r->chunk_stride);
  if (!floats) return;
  if (r->x.type == EXPERTLY_FLOAT32 && r->cols % 2 == 0)
    r->floats = (char *)r->x.data;
  else
    r->floats = arena->get<char>(count * r->float_stride);
}

constexpr int64_t kMaxRows = 252;        // of x in one item of work
constexpr int64_t kRowBytes = 1 << 19;   // of x in one item: they stay in L2
constexpr int64_t kSerial = 1 << 15;     // values of x that one thread makes ready faster than two
constexpr int64_t kWide = 2 * kLanes;    // outputs of two blocks

// How many rows of x meet a pair of blocks at a time.
INLINE int64_t rows_at_once(int64_t row_bytes) {
  int64_t rows = smaller(kRowBytes / larger(row_bytes, 1), kMaxRows) / kMaxTokens * kMaxTokens;
  return larger(rows, 4 * kMaxTokens);
}

// What one thread writes in: unpacked weights, products of two matrices, and sums.
struct Desk {
  Unpacked room;
  const void **x;      // (kMaxRows)
  float *out, *other;  // (kMaxRows, kWide)
  float *sums;
};

INLINE Desk place_desk(Arena *arena, int64_t sums) {
  Desk desk;
  desk.room.bytes = arena->get<uint8_t>(kPanelSteps * kChunk * kWide);
  desk.room.scales = arena->get<float>(kPanelSteps * kWide);
  desk.room.minimums = arena->get<float>(kPanelSteps * kWide);
  desk.x = arena->get<const void *>(kMaxRows);
  desk.out = arena->get<float>(kMaxRows * kWide);
  desk.other = arena->get<float>(kMaxRows * kWide);
  desk.sums = arena->get<float>(sums);
  return desk;
}

}  // namespace
