// One-dimensional Winograd convolutions F(m, r): m outputs of an r-tap correlation from m + r - 1 inputs and as many
// products, arXiv:1509.09308 section 4 (there "minimal filtering"), built by Toom-Cook interpolation. Points come in
// pairs +-a, whose sums and differences are shared. Each struct holds y = A^T [(G g) * (B^T d)]: `weight` is G, `input`
// B^T, `output` A^T. Two of them make the transform of a tile: one along each axis, or nested along one axis, where
// the outer one sees blocks of as many positions as the inner one has outputs, which must be as many as its taps.
#pragma once

#include "simd.h"

namespace {

// One tap, one output: the outer transform where there is none.
struct Plain {
  static constexpr int INPUTS = 1, POINTS = 1, OUTPUTS = 1, TAPS = 1;
  static void input(const vec* d, vec* v) { v[0] = d[0]; }
  static void weight(const vec* g, vec* u) { u[0] = g[0]; }
  static void output(const vec* m, vec* y) { y[0] = m[0]; }
};

// The two positions of an axis of length 2 with zeros beside it: a Toeplitz product in 3 products in place of 4.
struct Pair {
  static constexpr int INPUTS = 2, POINTS = 3, OUTPUTS = 2, TAPS = 3;
  static void input(const vec* d, vec* v) { v[0] = d[0] + d[1], v[1] = d[1], v[2] = d[0]; }
  static void weight(const vec* g, vec* u) { u[0] = g[1], u[1] = g[2] - g[1], u[2] = g[0] - g[1]; }
  static void output(const vec* m, vec* y) { y[0] = m[0] + m[1], y[1] = m[0] + m[2]; }
};

// F(2, 3), points 0, 1, -1, infinity.
struct F23 {
  static constexpr int INPUTS = 4, POINTS = 4, OUTPUTS = 2, TAPS = 3;
  static void input(const vec* d, vec* v) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[3] - d[1];
  }
  static void weight(const vec* g, vec* u) {
    u[0] = g[0], u[1] = 0.5f * (g[0] + g[1] + g[2]), u[2] = 0.5f * (g[0] - g[1] + g[2]), u[3] = g[2];
  }
  static void output(const vec* m, vec* y) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] + m[3]; }
};

// F(3, 2), points 0, 1, -1, infinity.
struct F32 {
  static constexpr int INPUTS = 4, POINTS = 4, OUTPUTS = 3, TAPS = 2;
  static void input(const vec* d, vec* v) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[3] - d[1];
  }
  static void weight(const vec* g, vec* u) {
    u[0] = g[0], u[1] = 0.5f * (g[0] + g[1]), u[2] = 0.5f * (g[0] - g[1]), u[3] = g[1];
  }
  static void output(const vec* m, vec* y) {
    vec sum = m[1] + m[2];
    y[0] = m[0] + sum, y[1] = m[1] - m[2], y[2] = sum + m[3];
  }
};

// F(4, 3), points 0, +-A, +-B, infinity. With A B = 1, A = 1/sqrt(2), the error is half of that with 0, +-1, +-2.
struct F43 {
  static constexpr int INPUTS = 6, POINTS = 6, OUTPUTS = 4, TAPS = 3;
  static constexpr float A = 0.70710678118654752f, B = 1.41421356237309505f, A2 = 0.5f, B2 = 2.0f;
  static void input(const vec* d, vec* v) {
    vec even_a = d[4] - B2 * d[2], odd_a = A * (d[3] - B2 * d[1]);
    vec even_b = d[4] - A2 * d[2], odd_b = B * (d[3] - A2 * d[1]);
    v[0] = d[0] - (A2 + B2) * d[2] + d[4];
    v[1] = even_a + odd_a, v[2] = even_a - odd_a;
    v[3] = even_b + odd_b, v[4] = even_b - odd_b;
    v[5] = d[1] - (A2 + B2) * d[3] + d[5];
  }
  static void weight(const vec* g, vec* u) {
    constexpr float a = 1 / (2 * A2 * (A2 - B2)), b = 1 / (2 * B2 * (B2 - A2));
    vec even_a = a * (g[0] + A2 * g[2]), odd_a = a * A * g[1];
    vec even_b = b * (g[0] + B2 * g[2]), odd_b = b * B * g[1];
    u[0] = g[0];
    u[1] = even_a + odd_a, u[2] = even_a - odd_a;
    u[3] = even_b + odd_b, u[4] = even_b - odd_b;
    u[5] = g[2];
  }
  static void output(const vec* m, vec* y) {
    vec sum_a = m[1] + m[2], difference_a = A * (m[1] - m[2]);
    vec sum_b = m[3] + m[4], difference_b = B * (m[3] - m[4]);
    y[0] = m[0] + sum_a + sum_b;
    y[1] = difference_a + difference_b;
    y[2] = A2 * sum_a + B2 * sum_b;
    y[3] = A2 * difference_a + B2 * difference_b + m[5];
  }
};

// F(6, 3), points 0, +-1, +-2, +-1/2, infinity. The polynomial of all roots is x E(x^2) with
// E(s) = (s - 1)(s - 4)(s - 1/4) = s^3 - 21/4 s^2 + 21/4 s - 1; the roots +-p give the rows
// x (x +- p) E(x^2) / (x^2 - p^2).
struct F63 {
  static constexpr int INPUTS = 8, POINTS = 8, OUTPUTS = 6, TAPS = 3;
  static void input(const vec* d, vec* v) {
    vec even_1 = d[2] - 4.25f * d[4] + d[6], odd_1 = d[1] - 4.25f * d[3] + d[5];
    vec even_2 = 0.25f * d[2] - 1.25f * d[4] + d[6], odd_2 = 0.5f * d[1] - 2.5f * d[3] + 2.0f * d[5];
    vec even_half = 4.0f * d[2] - 5.0f * d[4] + d[6], odd_half = 2.0f * d[1] - 2.5f * d[3] + 0.5f * d[5];
    v[0] = d[6] - d[0] + 5.25f * (d[2] - d[4]);
    v[1] = even_1 + odd_1, v[2] = even_1 - odd_1;
    v[3] = even_2 + odd_2, v[4] = even_2 - odd_2;
    v[5] = even_half + odd_half, v[6] = even_half - odd_half;
    v[7] = d[7] - d[1] + 5.25f * (d[3] - d[5]);
  }
  static void weight(const vec* g, vec* u) {
    // Divided by the derivative: -1 at 0, -9/2 at +-1, 90 at +-2, 45/32 at +-1/2.
    vec even_1 = (-2.0f / 9) * (g[0] + g[2]), odd_1 = (-2.0f / 9) * g[1];
    vec even_2 = (1.0f / 90) * (g[0] + 4.0f * g[2]), odd_2 = (1.0f / 45) * g[1];
    vec even_half = (32.0f / 45) * (g[0] + 0.25f * g[2]), odd_half = (16.0f / 45) * g[1];
    u[0] = -g[0];
    u[1] = even_1 + odd_1, u[2] = even_1 - odd_1;
    u[3] = even_2 + odd_2, u[4] = even_2 - odd_2;
    u[5] = even_half + odd_half, u[6] = even_half - odd_half;
    u[7] = g[2];
  }
  static void output(const vec* m, vec* y) {
    vec sum_1 = m[1] + m[2], difference_1 = m[1] - m[2], sum_2 = m[3] + m[4], difference_2 = m[3] - m[4];
    vec sum_half = m[5] + m[6], difference_half = m[5] - m[6];
    y[0] = m[0] + sum_1 + sum_2 + sum_half;
    y[1] = difference_1 + 2.0f * difference_2 + 0.5f * difference_half;
    y[2] = sum_1 + 4.0f * sum_2 + 0.25f * sum_half;
    y[3] = difference_1 + 8.0f * difference_2 + 0.125f * difference_half;
    y[4] = sum_1 + 16.0f * sum_2 + 0.0625f * sum_half;
    y[5] = difference_1 + 32.0f * difference_2 + 0.03125f * difference_half + m[7];
  }
};

// F(4, 4), points 0, +-1, +-2, 1/2, infinity. The polynomial of all roots is M(x) = (x - 1/2) E(x) with
// E(x) = x (x^2 - 1)(x^2 - 4) = x^5 - 5 x^3 + 4 x; a root p of E gives the row (x - 1/2) E(x) / (x - p), which is that
// of F(4, 3) on e[i] = d[i + 1] - d[i] / 2.
struct F44 {
  static constexpr int INPUTS = 7, POINTS = 7, OUTPUTS = 4, TAPS = 4;
  static void input(const vec* d, vec* v) {
    vec e[6];
    for (int i = 0; i < 6; i++) e[i] = d[i + 1] - 0.5f * d[i];
    vec even_1 = e[4] - 4.0f * e[2], odd_1 = e[3] - 4.0f * e[1];
    vec even_2 = e[4] - e[2], odd_2 = 2.0f * (e[3] - e[1]);
    v[0] = 4.0f * e[0] - 5.0f * e[2] + e[4];
    v[1] = even_1 + odd_1, v[2] = even_1 - odd_1;
    v[3] = even_2 + odd_2, v[4] = even_2 - odd_2;
    v[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
    v[6] = 4.0f * e[1] - 5.0f * e[3] + e[5];
  }
  static void weight(const vec* g, vec* u) {
    // Divided by M'(p): -2 at 0, -3 at 1, 9 at -1, 36 at 2, -60 at -2, 45/32 at 1/2.
    vec even_1 = g[0] + g[2], odd_1 = g[1] + g[3];
    vec even_2 = g[0] + 4.0f * g[2], odd_2 = 2.0f * g[1] + 8.0f * g[3];
    u[0] = -0.5f * g[0];
    u[1] = (-1.0f / 3) * (even_1 + odd_1), u[2] = (1.0f / 9) * (even_1 - odd_1);
    u[3] = (1.0f / 36) * (even_2 + odd_2), u[4] = (-1.0f / 60) * (even_2 - odd_2);
    u[5] = (32.0f / 45) * (g[0] + 0.5f * g[1] + 0.25f * g[2] + 0.125f * g[3]);
    u[6] = g[3];
  }
  static void output(const vec* m, vec* y) {
    vec sum_1 = m[1] + m[2], difference_1 = m[1] - m[2], sum_2 = m[3] + m[4], difference_2 = m[3] - m[4];
    y[0] = m[0] + sum_1 + sum_2 + m[5];
    y[1] = difference_1 + 2.0f * difference_2 + 0.5f * m[5];
    y[2] = sum_1 + 4.0f * sum_2 + 0.25f * m[5];
    y[3] = difference_1 + 8.0f * difference_2 + 0.125f * m[5] + m[6];
  }
};

}  // namespace
