// Rows brought to one size by powers of two, for products whose errors are relative to the sizes of both sides: those
// of Strassen's algorithm, and of pairs of words (PairedFloat32).
//
// The error of the latter grows with the sum of a0 a1, too, all of one sign where numbers are positive, or change
// slowly. So one word of each second pair changes its sign, on both sides, and neighboring pairs cancel.
#pragma once

#include <algorithm>
#include <cmath>

#include "product.h"

namespace {

// The power of two nearest to a number, by their ratio, and its inverse. Below 2^-126 that is 0: it makes zeros of all
// sums.
struct Scale {
  float factor, inverse;

  explicit Scale(float number) {
    int32_t exponent;
    number *= 1.4142135f;                                  // the power of two below that
    std::memcpy(&exponent, &number, sizeof(exponent));
    exponent = std::min(exponent >> 23 & 255, 253);        // so that the inverse is not 0
    int32_t bits = exponent << 23, opposite = (254 - exponent) << 23;
    std::memcpy(&factor, &bits, sizeof(bits));
    std::memcpy(&inverse, &opposite, sizeof(bits));
  }
};

// The sum of the squares of `count` numbers times a factor. count: a multiple of PANEL.
template <class Element>
float squares_of(const Element* from, int64_t count, float factor) {
  vec even{}, odd{};
  int64_t k = 0;
  for (; k + 2 * LANES <= count; k += 2 * LANES) {
    vec x = factor * load(from + k), y = factor * load(from + k + LANES);
    even += x * x, odd += y * y;
  }
  for (; k < count; k += LANES) even += factor * load(from + k) * (factor * load(from + k));
  return reduce_add(even + odd);
}

// Of the largest of `count` numbers. Without their signs, floats are ordered as their bits.
template <class Element>
Scale scale_of_largest(const Element* from, int64_t count) {
  ivec largest{};
  for (int64_t k = 0; k < count; k += LANES) {
    ivec bits = (ivec)load(from + k) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return Scale(reduce_max((vec)largest));
}

// Of the root of the mean square. Squares leave the range of float32 before the numbers do.
template <class Element>
Scale scale_of(const Element* from, int64_t count) {
  float squares = squares_of(from, count, 1.0f);
  if (squares > 1e-24f && squares < 1e36f) return Scale(std::sqrt(squares / count));
  Scale largest = scale_of_largest(from, count);
  return Scale(largest.factor * std::sqrt(squares_of(from, count, largest.inverse) / count));
}

// What LANES neighboring words of a row are multiplied with: 1, and -1 for one word of each second pair.
template <class Type>
inline vec signs() {
  vec result = splat(1.0f);
  for (int i = 3; Type::STEP == 2 && i < LANES; i += 4) result[i] = -1.0f;
  return result;
}

// What the sums of a product of pairs start from: a number for each row, `stride` apart, and one for each column.
template <class Type>
struct Start {
  const float *rows, *columns;
  int64_t stride;
  Start from(int64_t row, int64_t column) const { return {rows + row * stride, columns + column, stride}; }
  vec at(int64_t row, int64_t column) const {
    return Type::STEP == 1 ? vec{} : broadcast(rows + row * stride) + load(columns + column);
  }
};

// Rows of `width` words, `stride` apart, next to each other as PairedFloat32 takes them. factors: what brings products
// of a row back. starts: as in `Start`.
inline void balance_rows(const float* rows, int64_t stride, int64_t count, int64_t width, float* to, float* factors,
                         float* starts) {
  constexpr auto ALL = std::make_integer_sequence<int, LANES>{};
  for (int64_t row = 0; row < count; row++, rows += stride) {
    Scale scale = scale_of(rows, width);
    vec inverse = scale.inverse * signs<PairedFloat32>(), pairs{};
    for (int64_t k = 0; k < width; k += LANES) {
      vec words = inverse * load(rows + k);
      pairs += interleave<1, false>(words, words, ALL) * interleave<1, true>(words, words, ALL);     // each twice
      store(to + row * width + k, words);
    }
    factors[row] = scale.factor, starts[row] = -0.5f * reduce_add(pairs);
  }
}

}  // namespace
