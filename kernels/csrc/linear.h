// y = x w^T + bias with weights as PyTorch keeps them, laid out for the product in cache, two panels at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "gelu.h"
#include "product.h"

namespace {

constexpr int64_t PAIR = 2 * PANEL;
static_assert(TILE_ROWS <= ldm2::LINEAR_TILE_ROWS);

// LANES sums of products as results: times the factors of their row and their columns, plus the bias.
inline vec complete(const ldm2::Linear& job, const float* sums, int64_t row, int64_t column) {
  vec result = load(sums);
  if (job.factors != nullptr) result *= load(job.factors + column);
  if (job.row_factors != nullptr) result *= job.row_factors[row];
  return job.bias == nullptr ? result : result + load(job.bias + column);
}

// sums (rows, PAIR) and the bias to the rows of y from `row`, in `columns` (and those of its gates).
template <class Type>
void finish(const ldm2::Linear& job, int64_t row, int64_t rows, const int64_t* columns, int64_t panels,
            const float* sums) {
  for (int64_t i = 0; i < rows; i++) {
    const float* from = sums + i * PAIR;
    auto to = static_cast<typename Type::element*>(job.y) + (row + i) * job.width + columns[0];
    if (job.gated) {
      for (int64_t n = 0; n < PANEL; n += LANES) {
        vec value = complete(job, from + n, row + i, columns[0] + n);
        vec gate = complete(job, from + PANEL + n, row + i, columns[1] + n);
        store(to + n, value * gelu<Type>(gate));
      }
    } else {
      auto added = static_cast<const typename Type::element*>(job.residual);
      if (added != nullptr) added += (row + i) * job.width + columns[0];
      for (int64_t n = 0; n < panels * PANEL; n += LANES) {
        vec value = complete(job, from + n, row + i, columns[0] + n);
        store(to + n, added == nullptr ? value : value + load(added + n));
      }
    }
  }
}

#if defined(__AVX512BF16__)
constexpr bool WIDENED = false;
#else
constexpr bool WIDENED = true;                             // bfloat16 is multiplied as float32
#endif

// panel (words, PANEL) of pairs of bfloat16 -> (2 * words, PANEL) of float32, in place.
inline void widen_panel(float* panel, int64_t words) {
  for (int64_t k = words - 1; k >= 0; k--) {
    for (int64_t lane = 0; lane < PANEL; lane += LANES) {
      ivec pair = (ivec)load(panel + k * PANEL + lane);
      store(panel + 2 * k * PANEL + lane, (vec)(pair << 16));
      store(panel + (2 * k + 1) * PANEL + lane, (vec)(pair & static_cast<int32_t>(0xffff0000u)));
    }
  }
}

inline void widen_row(const uint16_t* from, int64_t count, float* to) {
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) store(to + k, load(from + k));
  for (; k < count; k++) to[k] = bf16_to_f32(from[k]);
}

// 16 rows of weights from `row` as the product takes them.
template <class Type, class Product>
void lay_out(const ldm2::Linear& job, int64_t row, float* panel) {
  int64_t words = job.depth / Type::PER_WORD;
  if (job.factors != nullptr) {
    auto from = static_cast<const int8_t*>(job.w) + row * job.depth;
    transpose_integers<Product>(from, job.depth / Product::PER_WORD, panel);
  } else {
    transpose(static_cast<const float*>(job.w) + row * words, words, PANEL, words, panel);
    if constexpr (Product::PER_WORD < Type::PER_WORD) widen_panel(panel, words);
  }
}

// `count` rows of weights from `row`, where there are so many, to be fetched.
template <class Type>
Ahead rows_ahead(const ldm2::Linear& job, int64_t row, int64_t count, int64_t limit) {
  int64_t bytes = job.depth * (job.factors != nullptr ? 1 : sizeof(typename Type::element));
  auto w = static_cast<const char*>(job.w);
  return row + count > limit ? Ahead{} : Ahead{w + row * bytes, w + (row + count) * bytes};
}

template <class Type>
void linear(const ldm2::Linear& job, int64_t first, int64_t end, float* scratch) {
  constexpr bool WIDE = WIDENED && Type::PER_WORD == 2;
  using Product = std::conditional_t<WIDE, Float32, Type>;
  int64_t words = job.depth / Type::PER_WORD, stride = job.x_stride / Type::PER_WORD;
  int64_t depth = job.depth / Product::PER_WORD;           // words of the product
  auto x = static_cast<const float*>(job.x);
  float *weights = scratch, *sums = weights + PAIR * depth, *wide = sums + ldm2::LINEAR_TILE_ROWS * PAIR;
  int64_t most = std::max(ldm2::LINEAR_CACHE / (4 * words), ldm2::LINEAR_LEAST_ROWS);
  int64_t blocks = (job.rows + most - 1) / most;
  for (int64_t block = 0; block < blocks; block++) {
    int64_t begin = job.rows * block / blocks, rows = job.rows * (block + 1) / blocks - begin;
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t column = first * PANEL; column < end * PANEL; column += job.gated ? PANEL : PAIR) {
      int64_t columns[] = {column, job.gated ? job.width + column : column + PANEL};
      int64_t panels = job.gated ? 2 : std::min<int64_t>(2, end - column / PANEL);
      for (int64_t p = 0; p < panels; p++) lay_out<Type, Product>(job, columns[p], weights + p * PANEL * depth);
      Ahead ahead[] = {rows_ahead<Type>(job, columns[0] + (job.gated ? PANEL : PAIR), PANEL, end * PANEL),
                       rows_ahead<Type>(job, columns[1] + (job.gated ? PANEL : PAIR), PANEL,
                                        (job.gated ? job.width : 0) + end * PANEL)};
      for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t row = begin + rows * tile / tiles, count = begin + rows * (tile + 1) / tiles - row;
        const float* a = x + row * stride;
        for (int64_t i = 0; WIDE && i < count; i++) {
          widen_row(static_cast<const uint16_t*>(job.x) + (row + i) * job.x_stride, depth, wide + i * depth);
        }
        product<Product, false>(count, depth, panels, WIDE ? wide : a, WIDE ? depth : stride, weights, depth * PANEL,
                                sums, PAIR, ahead[0].next < ahead[0].end ? ahead[0] : ahead[1]);
        finish<Type>(job, row, count, columns, panels, sums);
      }
    }
  }
}

}  // namespace
