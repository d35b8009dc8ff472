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
//
// The 7 products are ordinary ones (Float32), or such of pairs of words (PairedFloat32), whose error is normwise too if
// both sides are of one size: see balance.h.
#pragma once

#include <iterator>

#include "balance.h"
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

// Rows of x for which products save more than laying out weights costs.
template <class Type>
constexpr int64_t STRASSEN_ROWS_LEAST = Type::STEP == 2 ? 64 : 128;

// A target of products: `to` becomes `given` and the sums.
template <class Type>
struct Onto {
  static constexpr int64_t STRIDE = 2 * PAIR;              // rows of a pair are neighbors
  const float* given;
  float* to;
  Start<Type> begin;
  Onto from(int64_t row, int64_t column) const {
    return {given + row * STRIDE + column, to + row * STRIDE + column, begin.from(row, column)};
  }
  vec start(int64_t row, int64_t column) const { return begin.at(row, column); }
  void put(int64_t row, int64_t column, vec sum) const {
    store(to + row * STRIDE + column, load(given + row * STRIDE + column) + sum);
  }
};

template <class Type>
struct OntoBoth {
  Onto<Type> one, other;
  vec start(int64_t row, int64_t column) const { return one.start(row, column); }
  OntoBoth from(int64_t row, int64_t column) const { return {one.from(row, column), other.from(row, column)}; }
  void put(int64_t row, int64_t column, vec sum) const {
    one.put(row, column, sum);
    other.put(row, column, sum);
  }
};

// Of LANES words of each operand, the products of those of a pair: operand 2n in even lanes of sums[n], 2n + 1 in odd.
inline void add_pairs(const vec made[ldm2::STRASSEN_PRODUCTS], vec sums[4]) {
  constexpr auto ALL = std::make_integer_sequence<int, LANES>{};
#pragma GCC unroll 4
  for (int n = 0; n < 4; n++) {
    vec a = made[2 * n], b = made[std::min(2 * n + 1, 6)];
    sums[n] += interleave<1, false>(a, b, ALL) * interleave<1, true>(a, b, ALL);
  }
}

// Of x in the numbers of Given, for products of Type.
template <class Type, class Given>
void strassen_rows(const ldm2::Linear& job, int64_t first, int64_t end, float* operands, float* factors) {
  int64_t half = job.depth / 2;
  for (int64_t pair = first; pair < end; pair++) {
    auto top = static_cast<const typename Given::element*>(job.x) + 2 * pair * job.x_stride;
    auto bottom = top + job.x_stride;
    float* to = operands + pair * ldm2::strassen_stride(job.depth);
    Scale upper = scale_of(top, job.depth), lower = scale_of(bottom, job.depth);
    factors[2 * pair] = upper.factor, factors[2 * pair + 1] = lower.factor;
    vec above = upper.inverse * signs<Type>(), below = lower.inverse * signs<Type>(), pairs[4] = {};
    for (int64_t k = 0; k < half; k += LANES) {
      vec a11 = above * load(top + k), a12 = above * load(top + half + k);
      vec a21 = below * load(bottom + k), a22 = below * load(bottom + half + k);
      vec s1 = a21 + a22, s2 = s1 - a11;
      vec made[] = {a11, a12, a22, s1, s2, a11 - a21, a12 - s2};
      for (int n = 0; n < ldm2::STRASSEN_PRODUCTS; n++) store(to + n * half + k, made[n]);
      if constexpr (Type::STEP == 2) add_pairs(made, pairs);
    }
    if constexpr (Type::STEP == 2) {                       // behind the operands, a number for each
      vec sums = fold<4>(fold<2>(pairs[0], pairs[1]), fold<2>(pairs[2], pairs[3]));
      for (int n = 0; n < ldm2::STRASSEN_PRODUCTS; n++) to[ldm2::STRASSEN_PRODUCTS * half + n] = -sums[n] - sums[n + 8];
    }
  }
}

// The weights of 16 output channels from `left` and 16 from `right`: each operand's panel, `stride` apart. starts: of
// PairedFloat32, a number for each column of each operand, PAIR apart.
template <class Type, class Element>
void strassen_panels(const ldm2::Linear& job, int64_t left, int64_t right, float* factors, float* panels,
                     int64_t stride, float* starts) {
  auto w = static_cast<const Element*>(job.w);
  int64_t half = job.depth / 2, columns[] = {left, right};
  float inverses[2][PANEL];
  for (int side = 0; side < 2; side++) {
    for (int64_t i = 0; i < PANEL; i++) {
      int64_t column = columns[side] + i;
      Scale scale = scale_of(w + column * job.depth, job.depth);
      factors[column] = job.factors == nullptr ? scale.factor : scale.factor * job.factors[column];
      inverses[side][i] = scale.inverse;
    }
  }
  constexpr int QUADRANTS[2][2] = {{B11, B21}, {B12, B22}};
  vec sums[ldm2::STRASSEN_PRODUCTS] = {};
  for (int64_t k = 0; k < half; k += LANES) {
    for (int n = 0; n < 4; n++) {
      int side = n / 2, part = n % 2;
      const Element* from = w + columns[side] * job.depth + part * half + k;
      transpose_squares(LANES, panels + QUADRANTS[side][part] * stride + k * PANEL, [&](int64_t row, int64_t) {
        return broadcast(inverses[side] + row) * signs<Type>() * load(from + row * job.depth);
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
    for (int n = 0; Type::STEP == 2 && n < ldm2::STRASSEN_PRODUCTS; n++) {
      const float* from = panels + n * stride + k * PANEL;
      for (int i = 0; i < LANES; i += 2) sums[n] -= load(from + i * PANEL) * load(from + (i + 1) * PANEL);
    }
  }
  for (int n = 0; Type::STEP == 2 && n < ldm2::STRASSEN_PRODUCTS; n++) store(starts + n * PAIR, sums[n]);
}

// One step for `rows` pairs of rows and two panels, both of `depth` words.
template <class Type>
void strassen_step(const Step& step, int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b,
                   const Start<Type>& start, float* const* tiles, Ahead& ahead) {
  Onto<Type> target{tiles[step.from], tiles[step.to], start};
  if (step.also_to == NONE) {
    product<Type>(rows, depth, 2, a, lda, b, depth * PANEL, target, ahead);
  } else {
    OntoBoth<Type> targets{target, {tiles[step.also_from], tiles[step.also_to], start}};
    product<Type>(rows, depth, 2, a, lda, b, depth * PANEL, targets, ahead);
  }
}

// Rows of y, and of what is added to it, are fetched while their products are made.
template <class Element>
void fetch_results(const ldm2::Linear& job, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  constexpr int64_t LINE = Ahead::LINE / sizeof(Element);
  for (int64_t i = row; i < row + rows; i++) {
    for (int64_t n = column; n < column + columns; n += LINE) {
      __builtin_prefetch(static_cast<const Element*>(job.y) + i * job.width + n, 1);
      if (job.residual != nullptr) __builtin_prefetch(static_cast<const Element*>(job.residual) + i * job.width + n);
    }
  }
}

// x, y and weights in the numbers of Given, or weights in integers of 8 bits.
template <class Type, class Given>
void strassen(const ldm2::Linear& given, int64_t first, int64_t end, const float* operands, float* scratch) {
  constexpr int64_t PRODUCTS = ldm2::STRASSEN_PRODUCTS;
  int64_t half = given.depth / 2, panel = half * PANEL, stride = ldm2::strassen_stride(given.depth);
  int64_t pairs = given.rows / 2, count = (pairs + TILE_ROWS - 1) / TILE_ROWS;
  constexpr int64_t SIZE = TILE_ROWS * Onto<Type>::STRIDE;           // of two tiles: the rows of y, or U and zeros
  float *weights = scratch, *sums = weights + PRODUCTS * 2 * panel, *starts = sums + 3 * SIZE;
  float* tiles[] = {sums, sums + PAIR, sums + SIZE, sums + SIZE + PAIR, sums + 2 * SIZE, sums + 2 * SIZE + PAIR};
  std::fill(tiles[U], tiles[U] + SIZE, 0.0f);
  ldm2::Linear job = given;
  float* factors = starts + PRODUCTS * PAIR;
  job.factors = factors;
  auto lay_out = given.factors != nullptr ? strassen_panels<Type, int8_t>
                                          : strassen_panels<Type, typename Given::element>;
  int64_t unit = ldm2::strassen_unit(given.gated), gates = given.gated ? given.width : PANEL;
  for (int64_t column = first * unit; column < end * unit; column += unit) {
    int64_t left[] = {column, column + gates}, right[] = {column + unit / 2, column + unit / 2 + gates};
    for (int n = 0; n < 2; n++) {
      lay_out(given, left[n], right[n], factors, weights + n * panel, 2 * panel, starts + n * PANEL);
    }
    Ahead ahead[] = {rows_ahead<Given>(given, column + unit, unit, end * unit), {}};
    if (given.gated) ahead[1] = rows_ahead<Given>(given, gates + column + unit, unit, gates + end * unit);
    for (int64_t tile = 0; tile < count; tile++) {
      int64_t pair = pairs * tile / count, height = pairs * (tile + 1) / count - pair;
      const float* rows = operands + pair * stride;
      fetch_results<typename Given::element>(given, 2 * pair, 2 * height, column, unit);
      for (const Step& step : STEPS) {
        Start<Type> start{rows + PRODUCTS * half + step.a, starts + step.b * PAIR, stride};
        strassen_step(step, height, half, rows + step.a * half, stride, weights + step.b * 2 * panel, start, tiles,
                      ahead[ahead[0].next < ahead[0].end ? 0 : 1]);
      }
      finish<Given>(job, 2 * pair, 2 * height, left, 2, sums);
      finish<Given>(job, 2 * pair, 2 * height, right, 2, sums + SIZE);
    }
  }
}

template <class Type>
ldm2::StrassenKernels strassen_float() {
  return {STRASSEN_ROWS_LEAST<Type>, strassen_rows<Type, Float32>, strassen<Type, Float32>};
}

template <class Type>
ldm2::StrassenKernels strassen_bfloat16() {
  if constexpr (WIDENED) {
    return {STRASSEN_ROWS_LEAST<Type>, strassen_rows<Type, BFloat16>, strassen<Type, BFloat16>};
  } else {
    return {};
  }
}

}  // namespace
