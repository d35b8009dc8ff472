// y = x w^T + bias with weights as PyTorch keeps them, laid out for the product in cache, two panels at a time.
#pragma once

#include <algorithm>

#include "gelu.h"
#include "product.h"

namespace {

constexpr int64_t LINEAR_DEPTH = 384;                      // of a piece of a panel: 24 KB
constexpr int64_t PAIR = 2 * PANEL;
static_assert(PAIR * (LINEAR_DEPTH + ldm2::LINEAR_ROWS) <= ldm2::LINEAR_SCRATCH);

inline vec shift(const float* bias, int64_t place) { return bias == nullptr ? vec{} : load(bias + place); }

// sums (rows, PAIR) = x (rows, depth) times the panels of w that begin at the given columns.
inline void pair_product(const ldm2::Linear& job, int64_t row, int64_t rows, const int64_t* columns, int64_t panels,
                         float* weights, float* sums) {
  int64_t pieces = (job.depth + LINEAR_DEPTH - 1) / LINEAR_DEPTH;
  for (int64_t piece = 0; piece < pieces; piece++) {
    int64_t k = job.depth * piece / pieces, depth = job.depth * (piece + 1) / pieces - k;
    for (int64_t p = 0; p < panels; p++) {
      transpose(job.w + columns[p] * job.depth + k, job.depth, PANEL, depth, weights + p * PANEL * depth);
    }
    const float* x = job.x + row * job.x_stride + k;
    auto multiply = piece == 0 ? product<Float32, false> : product<Float32, true>;
    multiply(rows, depth, panels, x, job.x_stride, weights, depth * PANEL, sums, PAIR);
  }
}

void linear(const ldm2::Linear& job, int64_t first, int64_t end, float* scratch) {
  float *weights = scratch, *sums = weights + PAIR * LINEAR_DEPTH;
  for (int64_t row = 0; row < job.rows; row += ldm2::LINEAR_ROWS) {
    int64_t rows = std::min(ldm2::LINEAR_ROWS, job.rows - row);
    for (int64_t column = first * PANEL; column < end * PANEL; column += job.gated ? PANEL : PAIR) {
      int64_t columns[] = {column, job.gated ? job.width + column : column + PANEL};
      int64_t panels = job.gated ? 2 : std::min<int64_t>(2, end - column / PANEL);
      pair_product(job, row, rows, columns, panels, weights, sums);
      for (int64_t i = 0; i < rows; i++) {
        float *from = sums + i * PAIR, *to = job.y + (row + i) * job.width + column;
        if (job.gated) {
          for (int64_t n = 0; n < PANEL; n += LANES) {
            vec value = load(from + n) + shift(job.bias, column + n);
            vec gate = load(from + PANEL + n) + shift(job.bias, columns[1] + n);
            store(to + n, value * gelu(gate));
          }
        } else {
          for (int64_t n = 0; n < panels * PANEL; n += LANES) {
            store(to + n, load(from + n) + shift(job.bias, column + n));
          }
        }
      }
    }
  }
}

}  // namespace
