// Calls the kernels on random sizes with buffers of exactly the size that the layout says, so that
// AddressSanitizer sees one byte too far, and compares instruction sets with the portable one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../src/expertly/kernels/cpu/expertly.h"

namespace {

std::mt19937 engine(1);

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(engine);
}
float number() { return std::normal_distribution<float>()(engine); }

// malloc'd to the byte; a vector may keep more than it shows.
template <class T>
struct Exact {
  std::unique_ptr<T[], void (*)(void *)> data;
  int64_t size;
  explicit Exact(int64_t n) : data((T *)malloc(n ? n * sizeof(T) : 1), free), size(n) {}
  operator T *() const { return data.get(); }
};

uint16_t bf16(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  return word >> 16;
}

struct Packed {
  Exact<uint8_t> data;
  Exact<uint16_t> scales;
  Exact<uint8_t> zeros;
  expertly_weight weight;
};

Packed packed(int bits, int kind, int64_t experts, int64_t out, int64_t cols, int group) {
  int64_t rows = (out + 15) / 16 * 16;
  int64_t bytes = bits == 16 ? rows * ((cols + 1) / 2) * 4 : rows * cols * bits / 8;
  int64_t groups = bits == 16 ? 0 : experts * rows * (cols / group);
  Packed p = {Exact<uint8_t>(experts * bytes), Exact<uint16_t>(groups),
              Exact<uint8_t>(groups * kind), {}};
  for (int64_t i = 0; i < p.data.size; i++) p.data[i] = between(0, 255);
  if (bits == 16)
    for (int64_t i = 0; i < p.data.size / 2; i++)
      ((uint16_t *)(uint8_t *)p.data)[i] = bf16(number());
  for (int64_t i = 0; i < groups; i++) p.scales[i] = between(0x2000, 0x2fff);  // up to 0.12
  for (int64_t i = 0; i < groups * kind; i++) p.zeros[i] = between(0, 40);
  const uint16_t *scales = bits == 16 ? nullptr : (uint16_t *)p.scales;
  const void *zeros = kind ? (uint8_t *)p.zeros : nullptr;
  if (bits == 16) group = 0;
  p.weight = {p.data, scales, zeros, bits, group, kind, experts, rows, cols, out};
  return p;
}

struct Values {
  int type;
  Exact<uint8_t> bytes;
  int64_t n;
  Values(int type, int64_t n) : type(type), bytes(n * (type ? 2 : 4)), n(n) {}
  void *data() const { return (uint8_t *)bytes; }
  void fill() {
    for (int64_t i = 0; i < n; i++)
      if (type) ((uint16_t *)data())[i] = bf16(number());
      else ((float *)data())[i] = number();
  }
  float at(int64_t i) const {
    if (!type) return ((float *)data())[i];
    uint32_t word = (uint32_t)((uint16_t *)data())[i] << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
  }
};

void need(bool ok, const char *what) {
  if (!ok) {
    printf("wrong: %s\n", what);
    exit(1);
  }
}

void same(const Values &found, const Values &expected, const char *what) {
  double error = 0, size = 0;
  for (int64_t i = 0; i < found.n; i++) {
    need(std::isfinite(found.at(i)), what);
    error += std::pow(found.at(i) - expected.at(i), 2);
    size += std::pow(expected.at(i), 2);
  }
  need(error <= size * 1e-4 + 1e-12, what);
}

Exact<float> bias_of(int64_t n) {
  Exact<float> bias(n);
  for (int64_t i = 0; i < n; i++) bias[i] = number();
  return bias;
}

struct Form {
  int bits, kind, group;
};
Form any_form() {
  const int bits[] = {4, 8, 16}, groups[] = {32, 64, 128};
  int chosen = bits[between(0, 2)];
  return {chosen, chosen == 16 ? 0 : (int)between(0, 2), groups[between(0, 2)]};
}
// Now and then wider than a panel of unpacked weights, which is 1024, or 256 at 16 bits.
int64_t any_cols(const Form &f) {
  bool wide = between(0, 19) == 0;
  return f.bits == 16 ? between(1, wide ? 600 : 90)
                      : f.group * (wide ? 1024 / f.group + between(0, 2) : between(1, 4));
}

void try_linears(int isa) {
  Form f = any_form();
  int64_t cols = any_cols(f), out = between(1, 90), tokens = between(0, 30);
  Packed w = packed(f.bits, f.kind, 1, out, cols, f.group);
  Exact<float> bias = bias_of(out);
  Values x(between(0, 1), tokens * cols), y(between(0, 1), tokens * out), slow(y.type, y.n);
  x.fill();
  const expertly_weight *weights[] = {&w.weight};
  const float *biases[] = {between(0, 1) ? (float *)bias : nullptr};
  for (int i : {0, isa}) {
    void *outs[] = {i == 0 ? slow.data() : y.data()};
    need(expertly_linears(i, between(1, 2), 1, weights, biases, x.data(), x.type, tokens, outs,
                          y.type) == 0, "linears' code");
  }
  if (isa) same(y, slow, "linears");
}

void try_grouped(int isa) {
  Form f = any_form();
  int64_t cols = any_cols(f), out = between(1, 90), experts = between(1, 5), rows = 0;
  Packed w = packed(f.bits, f.kind, experts, out, cols, f.group);
  Exact<int64_t> counts(experts);
  for (int64_t e = 0; e < experts; e++) rows += counts[e] = between(0, 12);
  Exact<float> bias = bias_of(experts * out);
  Values x(between(0, 1), rows * cols), y(between(0, 1), rows * out), slow(y.type, y.n);
  x.fill();
  for (int i : {0, isa})
    need(expertly_grouped_linear(i, between(1, 2), &w.weight, bias, x.data(), x.type, counts, rows,
                                 i == 0 ? slow.data() : y.data(), y.type) == 0, "grouped's code");
  if (isa) same(y, slow, "grouped linear");
}

void try_experts(int isa) {
  Form f = any_form(), g = any_form();
  expertly_gate gate = {(int32_t)between(0, 5), (int32_t)between(0, 1), 1.7f, 7.f};
  if (gate.act == 3) gate.gated = 1;
  int64_t cols = any_cols(f), hidden = any_cols(g);
  if (g.bits == 16) hidden = (hidden + 15) / 16 * 16;
  int64_t experts = between(1, 6), out = between(1, 90), tokens = between(0, 20), k = between(1, 3);
  Packed up = packed(f.bits, f.kind, experts, hidden * (1 + gate.gated), cols, f.group);
  Packed down = packed(g.bits, g.kind, experts, out, hidden, g.group);
  Exact<float> up_bias = bias_of(experts * up.weight.out), bias = bias_of(experts * out);
  Exact<int64_t> ids(tokens * k);
  Exact<float> weights = bias_of(tokens * k);
  for (int64_t i = 0; i < tokens * k; i++) ids[i] = between(-2, experts + 1);
  for (int64_t i = 0; i < tokens * k; i += 5) weights[i] = 0;
  Values x(between(0, 1), tokens * cols), y(between(0, 1), tokens * out), slow(y.type, y.n);
  x.fill();
  bool biased = between(0, 1);
  const float *biases[] = {biased ? (float *)up_bias : nullptr, biased ? (float *)bias : nullptr};
  for (int i : {0, isa})
    need(expertly_experts(i, between(1, 2), &up.weight, &down.weight, biases[0], biases[1], &gate,
                          x.data(), x.type, ids, weights, tokens, k,
                          i == 0 ? slow.data() : y.data(), y.type) == 0, "experts' code");
  if (isa) same(y, slow, "experts");
}

void try_norm(int isa) {
  int64_t rows = between(0, 4), dim = between(1, 70);
  Values x(between(0, 1), rows * dim), weight(between(0, 1), dim), y(between(0, 1), rows * dim);
  Values slow(y.type, y.n);
  x.fill();
  weight.fill();
  expertly_norm call = {x.data(), weight.data(), 0, rows, dim, x.type, weight.type, y.type,
                        (int)between(0, 1), 1e-6f, (float)between(0, 1)};
  for (int i : {0, isa}) {
    call.y = i == 0 ? slow.data() : y.data();
    need(expertly_rms_norm(i, &call) == 0, "norm's code");
  }
  if (isa) same(y, slow, "norm");
}

}  // namespace

int main(int, char **argv) {
  int rounds = atoi(argv[1]);
  for (int round = 0; round < rounds; round++) {
    int isa = between(0, expertly_best_isa());
    try_linears(isa);
    try_grouped(isa);
    try_experts(isa);
    try_norm(isa);
  }
  printf("%d rounds\n", rounds);
}
