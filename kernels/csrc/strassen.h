// Linear layers in float32 by one level of Strassen's algorithm in Winograd's form: 7 products of half the size along
// each axis in place of 8.
//
//   x: rows 2p      [ A11 | A12 ]      w^T: left halves   [ B11 | B12 ]      y: [ C11 | C12 ]
//      rows 2p + 1  [ A21 | A22 ]           of its depth  [ B21 | B22 ]         [ C21 | C22 ]
//
//   S1 = A21 + A22       T1 = B12 - B11       U   = A11 B11           C21 = V - A22 (T2 - B21)
//   S2 = S1 - A11        T2 = B22 - T1        C11 = U + A12 B21       C22 = V + S1 T1
//   S3 = A11 - A21       T3 = B22 - B12       U'  = U + S2 T2         C12 = U' + S1 T1 + S4 B22
//   S4 = A12 - S2                             V   = U' + S3 T3
//
// Rows are paired with their neighbors, and PAIR output channels with the next. The sums of x are made once, those of
// the weights while these are laid out. A product is added to tiles of sums that stay in cache until `finish` takes
// them, as in "Strassen's Algorithm Reloaded" (SC16): nothing but operands and results is written to memory.
//
// An error is relative to the larger row of a pair, and the larger of two paired output channels. So all are brought to
// one size first, by powers of two, and brought back by `finish` ("outside scaling", arXiv:1507.00687, section 6). What
// remains is normwise: relative to |row| |channel|, where that of the ordinary product is to the sum of |a b|.
#pragma once

#include <iterator>

#include "linear.h"

namespace {

enum { A11, A12, A22, S1, S2, S3, S4 };                    // operands as they lie in memory
enum { B11, B21, B22, T1, T2, T3, T4, B12 = T3 };          // T4 = B21 - T2; T3 takes the place of B12
enum { C11, C21, C12, C22, U, ZERO, NONE };                // tiles; U' is kept in U, V in C21

// to = from + a b, and also_to = also_from + a b.
struct Step {
  int a, b, from, to, also_from = NONE, also_to = NONE;
};

constexpr Step STEPS[] = {
    {A11, B11, ZERO, U}, {A12, B21, U, C11}, {S2, T2, U, U}, {S3, T3, U, C21},
    {S1, T1, C21, C22, U, C12}, {S4, B22, C12, C12}, {A22, T4, C21, C21},
};
static_assert(std::size(STEPS) == ldm2::STRASSEN_PRODUCTS);

// A target of products: `to` becomes `given` and the sums.
struct Onto {
  static constexpr int64_t STRIDE = 2 * PAIR;              // rows of a pair are neighbors
  const float* given;
  float* to;
  Onto from(int64_t row, int64_t column) const {
    return {given + row * STRIDE + column, to + row * STRIDE + column};
  }
  void put(int64_t row, int64_t column, vec sum) const {
    store(to + row * STRIDE + column, load(given + row * STRIDE + column) + sum);
  }
};

struct OntoBoth {
  Onto one, other;
  OntoBoth from(int64_t row, int64_t column) const { return {one.from(row, column), other.from(row, column)}; }
  void put(int64_t row, int64_t column, vec sum) const {
    one.put(row, column, sum);
    other.put(row, column, sum);
  }
};

// The power of two below a number, and its inverse. Below 2^-126 that is 0: it makes zeros of all sums.
struct Scale {
  float factor, inverse;

  explicit Scale(float number) {
    int32_t exponent;
    std::memcpy(&exponent, &number, sizeof(exponent));
    exponent = std::min(exponent >> 23 & 255, 253);        // so that the inverse is not 0
    int32_t bits = exponent << 23, opposite = (254 - exponent) << 23;
    std::memcpy(&factor, &bits, sizeof(bits));
    std::memcpy(&inverse, &opposite, sizeof(bits));
  }
};

// Of the largest of `count` numbers. Without their signs, floats are ordered as their bits.
inline Scale scale_of(const float* from, int64_t count) {
  ivec largest{};
  for (int64_t k = 0; k < count; k += LANES) {
    ivec bits = (ivec)load(from + k) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return Scale(reduce_max((vec)largest));
}

void strassen_rows(const ldm2::Linear& job, int64_t first, int64_t end, float* operands, float* factors) {
  int64_t half = job.depth / 2;
  for (int64_t pair = first; pair < end; pair++) {
    const float *top = static_cast<const float*>(job.x) + 2 * pair * job.x_stride, *bottom = top + job.x_stride;
    float* to = operands + pair * ldm2::strassen_stride(job.depth);
    Scale upper = scale_of(top, job.depth), lower = scale_of(bottom, job.depth);
    factors[2 * pair] = upper.factor, factors[2 * pair + 1] = lower.factor;
    for (int64_t k = 0; k < half; k += LANES) {
      vec a11 = upper.inverse * load(top + k), a12 = upper.inverse * load(top + half + k);
      vec a21 = lower.inverse * load(bottom + k), a22 = lower.inverse * load(bottom + half + k);
      vec s1 = a21 + a22, s2 = s1 - a11;
      vec made[] = {a11, a12, a22, s1, s2, a11 - a21, a12 - s2};
      for (int n = 0; n < ldm2::STRASSEN_PRODUCTS; n++) store(to + n * half + k, made[n]);
    }
  }
}

// The weights of 16 output channels from `left` and 16 from `right`: each operand's panel, `stride` apart.
inline void strassen_panels(const ldm2::Linear& job, int64_t left, int64_t right, float* factors, float* panels,
                            int64_t stride) {
  int64_t half = job.depth / 2, columns[] = {left, right};
  float inverses[2][PANEL];
  for (int side = 0; side < 2; side++) {
    for (int64_t i = 0; i < PANEL; i++) {
      int64_t column = columns[side] + i;
      Scale scale = scale_of(static_cast<const float*>(job.w) + column * job.depth, job.depth);
      factors[column] = scale.factor, inverses[side][i] = scale.inverse;
    }
  }
  constexpr int QUADRANTS[2][2] = {{B11, B21}, {B12, B22}};
  for (int64_t k = 0; k < half; k += LANES) {
    for (int n = 0; n < 4; n++) {
      int side = n / 2, part = n % 2;
      const float* from = static_cast<const float*>(job.w) + columns[side] * job.depth + part * half + k;
      transpose_squares(LANES, panels + QUADRANTS[side][part] * stride + k * PANEL, [&](int64_t row, int64_t) {
        return broadcast(inverses[side] + row) * load(from + row * job.depth);
      });
    }
    for (int64_t n = k * PANEL; n < (k + LANES) * PANEL; n += LANES) {
      auto at = [&](int operand) { return panels + operand * stride + n; };
      vec b12 = load(at(B12)), b22 = load(at(B22)), t1 = b12 - load(at(B11)), t2 = b22 - t1;
      store(at(T1), t1);
      store(at(T2), t2);
      store(at(T3), b22 - b12);
      store(at(T4), load(at(B21)) - t2);
    }
  }
}

// One step for `rows` pairs of rows and two panels, both of `depth` words.
inline void strassen_step(const Step& step, int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b,
                          float* const* tiles, Ahead& ahead) {
  Onto target{tiles[step.from], tiles[step.to]};
  if (step.also_to == NONE) {
    product<Float32>(rows, depth, 2, a, lda, b, depth * PANEL, target, ahead);
  } else {
    OntoBoth targets{target, {tiles[step.also_from], tiles[step.also_to]}};
    product<Float32>(rows, depth, 2, a, lda, b, depth * PANEL, targets, ahead);
  }
}

void strassen(const ldm2::Linear& given, int64_t first, int64_t end, const float* operands, float* scratch) {
  int64_t half = given.depth / 2, panel = half * PANEL, stride = ldm2::strassen_stride(given.depth);
  int64_t pairs = given.rows / 2, count = (pairs + TILE_ROWS - 1) / TILE_ROWS;
  constexpr int64_t SIZE = TILE_ROWS * Onto::STRIDE;       // of two tiles: the rows of y, or U and zeros
  float *weights = scratch, *sums = weights + ldm2::STRASSEN_PRODUCTS * 2 * panel, *factors = sums + 3 * SIZE;
  float* tiles[] = {sums, sums + PAIR, sums + SIZE, sums + SIZE + PAIR, sums + 2 * SIZE, sums + 2 * SIZE + PAIR};
  std::fill(tiles[U], tiles[U] + SIZE, 0.0f);
  ldm2::Linear job = given;
  job.factors = factors;
  int64_t unit = ldm2::strassen_unit(given.gated), gates = given.gated ? given.width : PANEL;
  for (int64_t column = first * unit; column < end * unit; column += unit) {
    int64_t left[] = {column, column + gates}, right[] = {column + unit / 2, column + unit / 2 + gates};
    for (int n = 0; n < 2; n++) strassen_panels(given, left[n], right[n], factors, weights + n * panel, 2 * panel);
    Ahead ahead[] = {rows_ahead<Float32>(given, column + unit, unit, end * unit), {}};
    if (given.gated) ahead[1] = rows_ahead<Float32>(given, gates + column + unit, unit, gates + end * unit);
    for (int64_t tile = 0; tile < count; tile++) {
      int64_t pair = pairs * tile / count, height = pairs * (tile + 1) / count - pair;
      for (const Step& step : STEPS) {
        strassen_step(step, height, half, operands + pair * stride + step.a * half, stride,
                      weights + step.b * 2 * panel, tiles, ahead[ahead[0].next < ahead[0].end ? 0 : 1]);
      }
      finish<Float32>(job, 2 * pair, 2 * height, left, 2, sums);
      finish<Float32>(job, 2 * pair, 2 * height, right, 2, sums + SIZE);
    }
  }
}

}  // namespace
