// The innermost loops: a tile of a few rows of x times a few blocks of 16 weight rows.
//
// 64 bytes of weights are 16 rows x 4 k, so that one dot product instruction feeds 16 outputs and
// nothing is ever added across lanes. All sums of a tile stay in registers.
//
// For a row or two of x weights just stream, and a core reads more at once from several places
// than from one: its own prefetching works page by page. So such tiles have more blocks.
#pragma once

namespace {

// How a tile's weights lie: as packed, or with bytes and scales made ready by unpack().
enum Kind { kPacked4, kPacked8, kPacked16, kReady4, kReady8, kReady16 };
constexpr bool ready(Kind kind) { return kind >= kReady4; }
constexpr int bits_of(Kind kind) { return 4 << kind % 3; }

constexpr int kFew = kMaxTokens < 4 ? kMaxTokens : 4;  // rows of x for which weights just stream
constexpr int64_t kAhead = 4096;  // bytes of a block that are prefetched before they are read

// How many blocks meet that many rows of x at once, at most: all sums must find registers.
constexpr int most_blocks(int64_t rows) {
  return rows == 1 ? kStreams : rows == 2 && kStreams > 2 ? 4 : 2;
}
// and how many of those that are left
INLINE int64_t blocks_at_once(int64_t rows, int64_t left) {
  int64_t blocks = most_blocks(rows);
  while (blocks > left) blocks /= 2;
  return blocks;
}

template <Kind kKind>
INLINE I dot(I sum, Bytes w, Quad x) {
  return bits_of(kKind) == 4 ? dot_nibbles(sum, w, x) : dot_bytes(sum, w, x);
}

template <int M, int B>
INLINE void load_sums(const float *out, bool add, F (&sums)[M][B]) {
#pragma GCC unroll 8
  for (int t = 0; t < M; t++)
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) sums[t][b] = add ? load(out + (t * B + b) * kLanes) : zero();
}

template <int M, int B>
INLINE void store_sums(float *out, const F (&sums)[M][B]) {
#pragma GCC unroll 8
  for (int t = 0; t < M; t++)
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) store(out + (t * B + b) * kLanes, sums[t][b]);
}

// Adds the products of one chunk of 32 k. rows[t] is the t-th row's chunk.
template <Kind kKind, int M, int B>
INLINE void multiply_chunk(const uint8_t *data, const uint8_t *soon, int64_t step,
                           const Chunk *const (&rows)[M], I (&sums)[M][B]) {
#pragma GCC unroll kUnroll
  for (int k = 0; k < 8; k++) {
    Bytes w[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      if (kKind == kPacked4) {
        w[b] = load_bytes(data + b * step + k / 2 * 64);
        w[b] = k % 2 ? high_nibbles(w[b]) : low_nibbles(w[b]);
      } else {
        w[b] = load_bytes(data + b * step + k * 64);
      }
      if (!ready(kKind) && (kKind == kPacked8 || k % 2 == 0))
        __builtin_prefetch(soon + b * step + (kKind == kPacked4 ? k / 2 : k) * 64);
    }
#pragma GCC unroll 8
    for (int t = 0; t < M; t++) {
      Quad x = quad(rows[t]->q + 4 * k);
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) sums[t][b] = dot<kKind>(sums[t][b], w[b], x);
    }
  }
}

// Where a block's bytes lie that will be read some steps later: in the block, then in the next.
template <int64_t kBytes>
struct Soon {
  const uint8_t *at, *end, *next;

  inline __attribute__((always_inline)) Soon(const Panel &p)
      : at(p.data + smaller(kAhead, p.steps * kBytes)),
        end(p.data + p.steps * kBytes),
        next(p.next.data) {}
  inline __attribute__((always_inline)) const uint8_t *step() {
    if (at == end) at = next;
    at += kBytes;
    return at - kBytes;
  }
};

// Adds to out (M, B * 16) the products of M rows of chunks and B blocks. kMinimum: asymmetric.
template <Kind kKind, bool kMinimum, int M, int B>
static void tile(const Panel &p, const void *const *x, float *out) {
  const Matrix &m = *p.matrix;
  F sums[M][B];
  load_sums(out, p.first > 0, sums);
  const Chunk *rows[M];
  for (int t = 0; t < M; t++) rows[t] = (const Chunk *)x[t] + p.first;
  constexpr int64_t kBytes = bits_of(kKind) == 4 && !ready(kKind) ? 256 : 512;
  const uint8_t *data = p.data;
  Soon<kBytes> soon(p);
  for (int64_t c = 0; c < p.steps; c++, data += kBytes) {
    I dots[M][B];
#pragma GCC unroll 8
    for (int t = 0; t < M; t++)
#pragma GCC unroll 8
      for (int b = 0; b < B; b++)
        dots[t][b] = all_int(kMinimum ? 0 : rows[t]->start[bits_of(kKind) == 8]);
    multiply_chunk<kKind>(data, soon.step(), p.data_step, rows, dots);
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      int64_t ready_at = (b * p.steps + c) * kLanes;
      int64_t group = (b * m.groups + (c >> m.shift)) * kLanes, at = p.scale_at + group;
      F scale = ready(kKind) ? load(p.scales + ready_at) : load_half(m.scales + at);
      if (!ready(kKind)) __builtin_prefetch(p.next.scales + group);
#pragma GCC unroll 8
      for (int t = 0; t < M; t++)
        sums[t][b] = fma(to_float(dots[t][b]), mul(scale, all(rows[t]->scale)), sums[t][b]);
      if (kMinimum) {
        F minimum = ready(kKind) ? load(p.minimums + ready_at) : minimum_of(m, at, scale);
#pragma GCC unroll 8
        for (int t = 0; t < M; t++) sums[t][b] = fma(minimum, all(rows[t]->sum), sums[t][b]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < M; t++) rows[t]++;
  }
  store_sums(out, sums);
}

// The same for bfloat16 weights and rows of float32: 64 bytes are 16 rows x 2 k.
template <bool kReady, int M, int B>
static void tile16(const Panel &p, const void *const *x, float *out) {
  F sums[M][B];
  load_sums(out, p.first > 0, sums);
  const float *rows[M];
  for (int t = 0; t < M; t++) rows[t] = (const float *)x[t] + 2 * p.first;
  const uint8_t *data = p.data;
  Soon<64> soon(p);
  for (int64_t c = 0; c < p.steps; c++, data += 64) {
    const uint8_t *ahead = soon.step();
    F even[B], odd[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
      Bytes w = load_bytes(data + b * p.data_step);
      if (!kReady) __builtin_prefetch(ahead + b * p.data_step);
      even[b] = even_bf16(w);
      odd[b] = odd_bf16(w);
    }
#pragma GCC unroll 8
    for (int t = 0; t < M; t++)
#pragma GCC unroll 8
      for (int b = 0; b < B; b++) {
        sums[t][b] = fma(even[b], all(rows[t][2 * c]), sums[t][b]);
        sums[t][b] = fma(odd[b], all(rows[t][2 * c + 1]), sums[t][b]);
      }
  }
  store_sums(out, sums);
}

typedef void (*Tile)(const Panel &, const void *const *, float *);

template <Kind kKind, bool kMinimum, int M, int B>
INLINE Tile tile_of_blocks(int64_t blocks) {
  if constexpr (B > 1)
    if (blocks < B) return tile_of_blocks<kKind, kMinimum, M, B / 2>(blocks);
  if constexpr (bits_of(kKind) == 16)
    return tile16<ready(kKind), M, B>;
  else
    return tile<kKind, kMinimum, M, B>;
}

template <Kind kKind, bool kMinimum = false, int M = ready(kKind) ? kMaxTokens : kFew>
INLINE Tile tile_of(int64_t rows, int64_t blocks) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<kKind, kMinimum, M - 1>(rows, blocks);
  return tile_of_blocks<kKind, kMinimum, M, ready(kKind) ? 2 : most_blocks(M)>(blocks);
}

static Tile choose_tile(const Matrix &m, bool ready, int64_t rows, int64_t blocks) {
  if (m.bits == 16)
    return ready ? tile_of<kReady16>(rows, blocks) : tile_of<kPacked16>(rows, blocks);
  if (m.zero_kind != 0) {
    if (ready && m.bits == 4) return tile_of<kReady4, true>(rows, blocks);
    if (ready) return tile_of<kReady8, true>(rows, blocks);
    if (m.bits == 4) return tile_of<kPacked4, true>(rows, blocks);
    return tile_of<kPacked8, true>(rows, blocks);
  }
  if (ready && m.bits == 4) return tile_of<kReady4>(rows, blocks);
  if (ready) return tile_of<kReady8>(rows, blocks);
  if (m.bits == 4) return tile_of<kPacked4>(rows, blocks);
  return tile_of<kPacked8>(rows, blocks);
}

// While a panel is used, a part of what is read next comes into L2: [from, to) of n.
INLINE void prefetch(const void *start, int64_t bytes, int64_t from, int64_t to, int64_t n) {
  for (int64_t at = bytes * from / n; at < bytes * to / n; at += 64)
    __builtin_prefetch((const char *)start + at, 0, 2);
}

// out (count, blocks * 16): blocks of m from `block` on times count rows of x. next: what will be
// read after them.
static void multiply(const Matrix &m, int64_t block, int64_t blocks, const void *const *x,
                     int64_t count, const Place &next, const Unpacked &room, float *out) {
  Panel whole = panel_of(m, block, next);
  if (count <= kFew) return choose_tile(m, false, count, blocks)(whole, x, out);
  int64_t tiles = ceil_div(count, kMaxTokens);  // of sizes that differ by one at most
  for (int64_t step = 0; step < m.steps;) {
    Panel panel = unpack(whole, blocks, step, room);
    for (int64_t i = 0; i < tiles; i++) {
      int64_t first = count * i / tiles, rows = count * (i + 1) / tiles - first;
      choose_tile(m, true, rows, blocks)(panel, x + first, out + first * blocks * kLanes);
      int64_t from = step * tiles + panel.steps * i, n = m.steps * tiles;
      prefetch(next.data, blocks * m.block_bytes, from, from + panel.steps, n);
      prefetch(next.scales, blocks * m.groups * 32, from, from + panel.steps, n);
    }
    step += panel.steps;
  }
}

}  // namespace
