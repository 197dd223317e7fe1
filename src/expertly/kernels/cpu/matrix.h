// A packed matrix as the tiles see it: blocks of 16 rows, and what one tile reads.
#pragma once

namespace {
using namespace expertly;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One expert's matrix.
struct Matrix {
  const uint8_t *data;
  const uint16_t *scales;
  const uint8_t *zeros;
  int64_t blocks, block_bytes;
  int64_t groups, steps;  // of a block: groups with a scale; chunks of 32 k, for bits 16 pairs of k
  int bits, zero_kind;
  int shift;  // log2 of the chunks in a group
};

INLINE Matrix matrix_of(const expertly_weight &w, int64_t expert) {
  Matrix m = {};
  m.bits = w.bits;
  m.zero_kind = w.zero_kind;
  m.blocks = w.rows / kLanes;
  m.steps = w.bits == 16 ? (w.cols + 1) / 2 : w.cols / kChunk;
  m.block_bytes = m.steps * (w.bits == 16 ? 64 : w.bits * 64);
  m.data = (const uint8_t *)w.data + expert * m.blocks * m.block_bytes;
  if (w.bits == 16) return m;
  m.groups = w.cols / w.group;
  m.shift = w.group == 32 ? 0 : w.group == 64 ? 1 : 2;
  int64_t first = expert * m.blocks * m.groups * kLanes;
  m.scales = w.scales + first;
  m.zeros = (const uint8_t *)w.zeros + (w.zero_kind == 0 ? 0 : first * w.zero_kind);
  return m;
}

// What is added for each activation, for 16 rows: the minimum, or -zero * scale. Where the dot
// product takes bytes as q - 128, it also makes up for that.
INLINE F minimum_of(const Matrix &m, int64_t at, F scale) {
  F taken = all((float)(m.bits == 8 ? kBytesAre : 0));
  if (m.zero_kind == 1) return mul(sub(taken, load_u8(m.zeros + at)), scale);
  return fma(taken, scale, load_half((const uint16_t *)m.zeros + at));
}

constexpr int64_t kPanelSteps = 32;  // chunks of 32 k whose unpacked weights stay in L1
constexpr int64_t kPanelPairs = 128;  // pairs of k of bfloat16, likewise

// Where a block's weights and scales begin.
struct Place {
  const uint8_t *data;
  const uint16_t *scales;
};

INLINE Place place_of(const Matrix &m, int64_t block) {
  return {m.data + block * m.block_bytes, m.scales + block * m.groups * kLanes};
}

// A few neighbouring blocks, or a range of their k, as one tile reads them.
struct Panel {
  const Matrix *matrix;
  const uint8_t *data;
  int64_t data_step;               // bytes from one block to the next
  int64_t scale_at;                // where the first block's scales begin in the matrix
  int64_t first, steps;            // the range of k, in the matrix's steps
  Place next;                      // what will be read after it
  const float *scales, *minimums;  // made ready by unpack(): (blocks, steps, 16)
};

INLINE Panel panel_of(const Matrix &m, int64_t block, const Place &next) {
  int64_t scale_at = block * m.groups * kLanes;
  return {&m, m.data + block * m.block_bytes, m.block_bytes, scale_at, 0, m.steps, next, 0, 0};
}

// A thread's room for two unpacked blocks.
struct Unpacked {
  uint8_t *bytes;
  float *scales, *minimums;
};

INLINE void unpack_scales(const Panel &p, int64_t block, const Unpacked &room) {
  const Matrix &m = *p.matrix;
  for (int64_t c = 0; c < p.steps; c++) {
    int64_t to = (block * p.steps + c) * kLanes;
    int64_t from = p.scale_at + (block * m.groups + ((p.first + c) >> m.shift)) * kLanes;
    F scale = load_half(m.scales + from);
    store(room.scales + to, scale);
    if (m.zero_kind != 0) store(room.minimums + to, minimum_of(m, from, scale));
  }
}

// A range of k for many rows of x: weights are unpacked once to bytes and scales to float32.
static Panel unpack(const Panel &whole, int64_t blocks, int64_t first, const Unpacked &room) {
  const Matrix &m = *whole.matrix;
  Panel p = whole;
  p.first = first;
  p.steps = smaller(m.bits == 16 ? kPanelPairs : kPanelSteps, m.steps - first);
  p.data += first * (m.block_bytes / m.steps);
  if (m.bits == 16) return p;
  for (int64_t b = 0; b < blocks; b++) unpack_scales(p, b, room);
  p.scales = room.scales;
  p.minimums = room.minimums;
  if (m.bits == 8) return p;
  int64_t bytes = p.steps * kChunk * kLanes;
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = 0; i < bytes; i += 128) {
      Bytes packed = load_bytes(p.data + b * m.block_bytes + i / 2);
      store_bytes(room.bytes + b * bytes + i, low_nibbles(packed));
      store_bytes(room.bytes + b * bytes + i + 64, high_nibbles(packed));
    }
  p.data = room.bytes;
  p.data_step = bytes;
  return p;
}

}  // namespace
