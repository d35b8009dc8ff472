// y = x w^T + bias with weights as PyTorch keeps them, laid out for the product in cache, two panels at a time.
#pragma once

#include <algorithm>

#include "gelu.h"
#include "product.h"

namespace {

constexpr int64_t LINEAR_DEPTH = 384;                      // words of a piece of a panel: 24 KB
constexpr int64_t PAIR = 2 * PANEL;
static_assert(PAIR * (LINEAR_DEPTH + ldm2::LINEAR_ROWS) <= ldm2::LINEAR_SCRATCH);

inline vec load_bias(const float* bias, int64_t column) { return bias == nullptr ? vec{} : load(bias + column); }

// sums (rows, PAIR) = x (rows, depth) times the panels of w that begin at the given columns.
template <class Type>
void pair_product(const ldm2::Linear& job, int64_t row, int64_t rows, const int64_t* columns, int64_t panels,
                  float* weights, float* sums) {
  int64_t words = job.depth / Type::PER_WORD, stride = job.x_stride / Type::PER_WORD;
  auto x = static_cast<const float*>(job.x) + row * stride, w = static_cast<const float*>(job.w);
  int64_t pieces = (words + LINEAR_DEPTH - 1) / LINEAR_DEPTH;
  for (int64_t piece = 0; piece < pieces; piece++) {
    int64_t k = words * piece / pieces, depth = words * (piece + 1) / pieces - k;
    for (int64_t p = 0; p < panels; p++) {
      transpose(w + columns[p] * words + k, words, PANEL, depth, weights + p * PANEL * depth);
    }
    auto multiply = piece == 0 ? product<Type, false> : product<Type, true>;
    multiply(rows, depth, panels, x + k, stride, weights, depth * PANEL, sums, PAIR);
  }
}

template <class Type>
void linear(const ldm2::Linear& job, int64_t first, int64_t end, float* scratch) {
  float *weights = scratch, *sums = weights + PAIR * LINEAR_DEPTH;
  for (int64_t row = 0; row < job.rows; row += ldm2::LINEAR_ROWS) {
    int64_t rows = std::min(ldm2::LINEAR_ROWS, job.rows - row);
    for (int64_t column = first * PANEL; column < end * PANEL; column += job.gated ? PANEL : PAIR) {
      int64_t columns[] = {column, job.gated ? job.width + column : column + PANEL};
      int64_t panels = job.gated ? 2 : std::min<int64_t>(2, end - column / PANEL);
      pair_product<Type>(job, row, rows, columns, panels, weights, sums);
      for (int64_t i = 0; i < rows; i++) {
        const float* from = sums + i * PAIR;
        auto to = static_cast<typename Type::element*>(job.y) + (row + i) * job.width + column;
        if (job.gated) {
          for (int64_t n = 0; n < PANEL; n += LANES) {
            vec value = load(from + n) + load_bias(job.bias, column + n);
            vec gate = load(from + PANEL + n) + load_bias(job.bias, columns[1] + n);
            store(to + n, value * gelu(gate));
          }
        } else {
          for (int64_t n = 0; n < panels * PANEL; n += LANES) {
            store(to + n, load(from + n) + load_bias(job.bias, column + n));
          }
        }
      }
    }
  }
}

}  // namespace
