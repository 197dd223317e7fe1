// The gate of an expert on 16 values at once; relative error within some 3e-7.
#pragma once

namespace {

// e^x for -87 <= x <= 88, and infinity above 88.4, where n is 128, so that what is divided by it is
// 0: 2^n e^r, |r| <= ln(2)/2, the polynomial of Cephes' expf.
INLINE F exponential(F x) {
  x = at_most(at_least(x, all(-87.3f)), all(89));
  F n = to_float(round_int(mul(x, all(1.44269504f))));
  F r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  F p = fma(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), all(1));
  return mul(p, power_of_2(n));
}

// by * sigmoid(x)
INLINE F times_sigmoid(F by, F x) { return div(by, add(all(1), exponential(sub(zero(), x)))); }

// x * Phi(x), with erfc by the Chebyshev fit of Numerical Recipes: its relative error is 1.2e-7.
INLINE F gelu(F x) {
  F z = mul(absolute(x), all(0.70710678f));
  F t = div(all(1), fma(z, all(0.5f), all(1)));
  constexpr float kFit[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                            0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  F p = all(0.17087277f);
#pragma GCC unroll 9
  for (float c : kFit) p = fma(p, t, all(c));
  F erfc = mul(t, exponential(fma(sub(zero(), z), z, p)));
  return mul(mul(x, all(0.5f)), where_negative(x, erfc, sub(all(2), erfc)));
}

INLINE F activate(int act, F x) {
  if (act == 0) return times_sigmoid(x, x);
  if (act == 1) return gelu(x);
  if (act == 2) {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    F u = fma(mul(mul(x, x), x), all(0.044715f), x);
    return times_sigmoid(x, mul(u, all(2 * 0.79788456f)));
  }
  F positive = at_least(x, zero());
  return act == 5 ? mul(positive, positive) : positive;
}

INLINE F apply_gate(const expertly_gate &g, F gate, F up) {
  if (g.act != 3) return g.gated ? mul(activate(g.act, gate), up) : activate(g.act, gate);
  gate = at_most(gate, all(g.limit));
  up = at_most(at_least(up, all(-g.limit)), all(g.limit));
  return mul(add(up, all(1)), times_sigmoid(gate, mul(gate, all(g.alpha))));
}

}  // namespace
