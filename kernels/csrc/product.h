// Matrix products with a packed right side, sums in registers over the whole depth. Both sides are made of words of 32
// bits along the depth: a float32, or two neighbouring bfloat16 numbers.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using ldm2::PANEL;

struct Float32 {
  using element = float;
  static constexpr int PER_WORD = 1;
  static vec multiply_add(vec sum, vec a, vec b) { return sum + a * b; }
};

// sum + a0 * b0 + a1 * b1 in each lane.
struct BFloat16 {
  using element = uint16_t;
  static constexpr int PER_WORD = 2;
  static vec multiply_add(vec sum, vec a, vec b) {
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    ivec high = ivec{} + static_cast<int32_t>(0xffff0000u);
    sum += (vec)((ivec)a << 16) * (vec)((ivec)b << 16);
    return sum + (vec)((ivec)a & high) * (vec)((ivec)b & high);
#endif
  }
};

// c (ROWS, PANELS * 16) = a (ROWS, depth) x b (PANELS, depth, 16), or c += it. ldb: words from panel to panel.
template <class Kind, bool ADD, int ROWS, int PANELS>
void block(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int WIDTH = PANEL / LANES;
  vec sums[ROWS][PANELS * WIDTH] = {};
  if (ADD) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 8
      for (int j = 0; j < PANELS * WIDTH; j++) sums[i][j] = load(c + i * ldc + j * LANES);
    }
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++) {
    vec column[PANELS * WIDTH];
#pragma GCC unroll 8
    for (int j = 0; j < PANELS * WIDTH; j++) {
      column[j] = load(b + (j / WIDTH) * ldb + k * PANEL + (j % WIDTH) * LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      vec value = spread(a + i * lda + k);
#pragma GCC unroll 8
      for (int j = 0; j < PANELS * WIDTH; j++) sums[i][j] = Kind::multiply_add(sums[i][j], value, column[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < PANELS * WIDTH; j++) store(c + i * ldc + j * LANES, sums[i][j]);
  }
}

constexpr int MOST_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 3;   // 24 sums of 32 registers, 12 or 12 of 16
constexpr int MOST_PANELS = LANES == 16 ? 2 : 1;

template <class Kind, bool ADD, int ROWS, int PANELS>
void block_of(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      block<Kind, ADD, ROWS, PANELS>(depth, a, lda, b, ldb, c, ldc);
    } else {
      block_of<Kind, ADD, ROWS - 1, PANELS>(rows, depth, a, lda, b, ldb, c, ldc);
    }
  }
}

template <class Kind, bool ADD, int PANELS>
void rows_of_panels(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc) {
  int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int64_t n = 0; n < blocks; n++) {                   // blocks of nearly equal height: no thin last one
    int64_t begin = rows * n / blocks, end = rows * (n + 1) / blocks;
    block_of<Kind, ADD, MOST_ROWS, PANELS>(end - begin, depth, a + begin * lda, lda, b, ldb, c + begin * ldc, ldc);
  }
}

template <class Kind, bool ADD>
void product(int64_t rows, int64_t depth, int64_t panels, const float* a, int64_t lda, const float* b, int64_t ldb,
             float* c, int64_t ldc) {
  int64_t p = 0;
  for (; p + MOST_PANELS <= panels; p += MOST_PANELS) {
    rows_of_panels<Kind, ADD, MOST_PANELS>(rows, depth, a, lda, b + p * ldb, ldb, c + p * PANEL, ldc);
  }
  for (; p < panels; p++) {
    rows_of_panels<Kind, ADD, 1>(rows, depth, a, lda, b + p * ldb, ldb, c + p * PANEL, ldc);
  }
}

// panel (depth, 16) = the columns of 16 rows of words, `stride` apart. Rows from `count` on are zeros.
inline void transpose(const float* rows, int64_t stride, int64_t count, int64_t depth, float* panel) {
  int64_t k = 0;
  if (count == PANEL) {
    for (; k + 4 <= depth; k += 4) {
#pragma GCC unroll 4
      for (int lane = 0; lane < PANEL; lane += 4) {
        quad r[4], halves[4];
        for (int i = 0; i < 4; i++) std::memcpy(&r[i], rows + (lane + i) * stride + k, sizeof(quad));
        for (int i = 0; i < 2; i++) {
          halves[i] = mix<0, 4, 1, 5>(r[2 * i], r[2 * i + 1]);
          halves[i + 2] = mix<2, 6, 3, 7>(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 2; i++) {
          quad first = mix<0, 1, 4, 5>(halves[2 * i], halves[2 * i + 1]);
          quad second = mix<2, 3, 6, 7>(halves[2 * i], halves[2 * i + 1]);
          std::memcpy(panel + (k + 2 * i) * PANEL + lane, &first, sizeof(quad));
          std::memcpy(panel + (k + 2 * i + 1) * PANEL + lane, &second, sizeof(quad));
        }
      }
    }
  }
  for (; k < depth; k++) {
    for (int64_t lane = 0; lane < PANEL; lane++) panel[k * PANEL + lane] = lane < count ? rows[lane * stride + k] : 0;
  }
}

}  // namespace
