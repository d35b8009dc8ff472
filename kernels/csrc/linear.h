// y = x w^T + bias with weights as PyTorch keeps them, laid out for the product in cache, two panels at a time.
#pragma once

#include <algorithm>

#include "gelu.h"
#include "product.h"

namespace {

constexpr int64_t PAIR = 2 * PANEL;
static_assert(TILE_ROWS <= ldm2::LINEAR_TILE_ROWS);

inline vec load_bias(const float* bias, int64_t column) { return bias == nullptr ? vec{} : load(bias + column); }

// sums (rows, PAIR) and the bias to the rows of y from `row`, in `columns` (and those of its gates).
template <class Type>
void finish(const ldm2::Linear& job, int64_t row, int64_t rows, const int64_t* columns, int64_t panels,
            const float* sums) {
  for (int64_t i = 0; i < rows; i++) {
    const float* from = sums + i * PAIR;
    auto to = static_cast<typename Type::element*>(job.y) + (row + i) * job.width + columns[0];
    if (job.gated) {
      for (int64_t n = 0; n < PANEL; n += LANES) {
        vec value = load(from + n) + load_bias(job.bias, columns[0] + n);
        vec gate = load(from + PANEL + n) + load_bias(job.bias, columns[1] + n);
        store(to + n, value * gelu<Type>(gate));
      }
    } else {
      for (int64_t n = 0; n < panels * PANEL; n += LANES) {
        store(to + n, load(from + n) + load_bias(job.bias, columns[0] + n));
      }
    }
  }
}

template <class Type>
void linear(const ldm2::Linear& job, int64_t first, int64_t end, float* scratch) {
  int64_t words = job.depth / Type::PER_WORD, stride = job.x_stride / Type::PER_WORD;
  auto x = static_cast<const float*>(job.x), w = static_cast<const float*>(job.w);
  float *weights = scratch, *sums = weights + PAIR * words;
  int64_t most = std::max(ldm2::LINEAR_CACHE / (4 * words), ldm2::LINEAR_LEAST_ROWS);
  int64_t blocks = (job.rows + most - 1) / most;
  for (int64_t block = 0; block < blocks; block++) {
    int64_t begin = job.rows * block / blocks, rows = job.rows * (block + 1) / blocks - begin;
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t column = first * PANEL; column < end * PANEL; column += job.gated ? PANEL : PAIR) {
      int64_t columns[] = {column, job.gated ? job.width + column : column + PANEL};
      int64_t panels = job.gated ? 2 : std::min<int64_t>(2, end - column / PANEL);
      for (int64_t p = 0; p < panels; p++) {
        transpose(w + columns[p] * words, words, PANEL, words, weights + p * PANEL * words);
      }
      for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t row = begin + rows * tile / tiles, count = begin + rows * (tile + 1) / tiles - row;
        product<Type, false>(count, words, panels, x + row * stride, stride, weights, words * PANEL, sums, PAIR);
        finish<Type>(job, row, count, columns, panels, sums);
      }
    }
  }
}

}  // namespace
