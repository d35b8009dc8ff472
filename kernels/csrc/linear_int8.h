// y = x w^T + bias with int8 weights and rows of x that are rounded to integers of 8 bits first. All sums are exact.
// But for GELU, the numbers are the same in every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "linear.h"

namespace {

typedef int16_t shorts __attribute__((vector_size(LANES * 4)));
typedef uint16_t ushorts __attribute__((vector_size(LANES * 4)));

// The sums of the products of neighboring integers of 16 bits.
inline ivec pair_sums(shorts a, shorts b) {
#if defined(__AVX512BW__)
  return (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(LDM2_LANES)
  return (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(LDM2_LANES)
  return (ivec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((ivec)a << 16 >> 16) * ((ivec)b << 16 >> 16) + ((ivec)a >> 16) * ((ivec)b >> 16);
#endif
}

// Words of four integers of 8 bits, a without sign and b with one; sums of 32 bits in the lanes of `sum`. Without an
// instruction for it as pairs of 16 bits: sums of two products of 8 bits do not fit into 16.
struct Int8 {
  static constexpr int STEP = 1;
  static vec multiply_add(vec sum, vec a, vec b) {
#if defined(__AVX512VNNI__)
    return (vec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    ivec even = pair_sums((shorts)a & 0xff, (shorts)b << 8 >> 8);
    ivec odd = pair_sums((shorts)((ushorts)a >> 8), (shorts)b >> 8);
    return (vec)((ivec)sum + even + odd);
#endif
  }
};

// x, and no later sum is fused with the product that it is: not all instruction sets could.
inline vec apart(vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__) && !defined(LDM2_LANES)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

inline void store(uint8_t* to, ivec x) {
#if defined(__AVX512F__)
  __m128i bytes = _mm512_cvtepi32_epi8((__m512i)x);
#else
  typedef uint8_t small __attribute__((vector_size(LANES)));
  small bytes = __builtin_convertvector(x, small);
#endif
  std::memcpy(to, &bytes, LANES);
}

// Of a row of x from k; zeros behind its end.
template <class Element>
inline vec load_part(const Element* x, int64_t k, int64_t depth) {
  if (k + LANES <= depth) return load(x + k);
  Element rest[LANES] = {};
  std::copy(x + k, x + depth, rest);
  return load(rest);
}

// The largest absolute value of a row, infinity or NaN where one is there.
template <class Element>
inline float largest_of(const Element* x, int64_t depth) {
  ivec bits = {};                                          // without the sign they have the order of the numbers
  for (int64_t k = 0; k < depth; k += LANES) {
    ivec found = (ivec)load_part(x, k, depth) & 0x7fffffff;
    bits = found > bits ? found : bits;
  }
  int32_t lanes[LANES], most = 0;
  std::memcpy(lanes, &bits, sizeof(bits));
  for (int32_t lane : lanes) most = lane > most ? lane : most;
  float result;
  std::memcpy(&result, &most, sizeof(result));
  return result;
}

template <class Type>
void round_rows(const ldm2::Rounding& job, int64_t first, int64_t end) {
  constexpr float STEP = 1.0f / 127, LEAST = std::numeric_limits<float>::min();   // a scale stays a normal number
  int64_t depth = job.depth, stride = ldm2::int8_stride(depth);
  for (int64_t row = first; row < end; row++) {
    auto x = static_cast<const typename Type::element*>(job.x) + row * job.x_stride;
    float largest = largest_of(x, depth), scale = std::max(largest * STEP, LEAST);
    job.scales[row] = largest < INFINITY ? scale : NAN;
    vec inverse = splat(1.0f / scale);
    for (int64_t k = 0; k < depth; k += LANES) {
      ivec rounded = (ivec)(apart(load_part(x, k, depth) * inverse) + ROUND_TO_INTEGER) + 128;
      uint8_t values[LANES];                               // their low bytes
      store(values, rounded);
      std::memcpy(job.rows + row * stride + k, values, std::min<int64_t>(LANES, stride - k));
    }
  }
}

// 16 rows of weights as words of four, zeros behind the depth; offsets (16): what a row of zeros (128) gives with them.
inline void lay_out_int8(const int8_t* rows, int64_t depth, float* panel, float* offsets) {
  int64_t words = ldm2::int8_stride(depth) / 4;
  auto read = [&](int64_t row, int64_t k) {
    return load(reinterpret_cast<const float*>(rows + row * depth + 4 * k));
  };
  for (int64_t k = transpose_squares(depth / 4, panel, read); k < words; k++) {
    for (int64_t lane = 0; lane < PANEL; lane++) {
      int8_t word[4] = {};
      std::memcpy(word, rows + lane * depth + 4 * k, std::min<int64_t>(4, depth - 4 * k));
      std::memcpy(panel + k * PANEL + lane, word, sizeof(word));
    }
  }
  vec zeros = (vec)(ivec{} + static_cast<int32_t>(0x80808080u));
  for (int64_t lane = 0; lane < PANEL; lane += LANES) {
    vec sum = {};
    for (int64_t k = 0; k < words; k++) sum = Int8::multiply_add(sum, zeros, load(panel + k * PANEL + lane));
    store(offsets + lane, sum);
  }
}

// LANES sums of products as results: less the offsets of their columns, times both scales, plus the bias.
inline vec complete(const ldm2::Linear& job, const float* sums, const float* offsets, int64_t column, vec factor) {
  vec exact = __builtin_convertvector((ivec)load(sums) - (ivec)load(offsets), vec);
  vec result = apart(exact * load(job.factors + column) * factor);
  return job.bias == nullptr ? result : result + load(job.bias + column);
}

// As `finish` of other weights.
template <class Type>
void finish_int8(const ldm2::Linear& job, int64_t row, int64_t rows, const int64_t* columns, int64_t panels,
                 const float* sums, const float* offsets) {
  auto added = static_cast<const typename Type::element*>(job.residual);
  for (int64_t i = 0; i < rows; i++) {
    const float* from = sums + i * PAIR;
    vec factor = splat(job.row_factors[row + i]);
    int64_t place = (row + i) * job.width + columns[0];
    auto to = static_cast<typename Type::element*>(job.y) + place;
    for (int64_t n = 0; n < (job.gated ? 1 : panels) * PANEL; n += LANES) {
      vec value = complete(job, from + n, offsets + n, columns[0] + n, factor);
      if (job.gated) {
        value *= gelu<Type>(complete(job, from + PANEL + n, offsets + PANEL + n, columns[1] + n, factor));
      }
      store(to + n, added == nullptr ? value : value + load(added + place + n));
    }
  }
}

template <class Type>
void linear_int8(const ldm2::Linear& job, int64_t first, int64_t end, float* scratch) {
  int64_t words = ldm2::int8_stride(job.depth) / 4, step = job.gated ? PANEL : PAIR;
  auto x = static_cast<const float*>(job.x);
  auto w = static_cast<const int8_t*>(job.w);
  float *weights = scratch, *sums = weights + PAIR * words, *offsets = sums + ldm2::LINEAR_TILE_ROWS * PAIR;
  int64_t most = std::max(ldm2::LINEAR_CACHE / (4 * words), ldm2::LINEAR_LEAST_ROWS);
  int64_t blocks = (job.rows + most - 1) / most;
  for (int64_t block = 0; block < blocks; block++) {
    int64_t begin = job.rows * block / blocks, rows = job.rows * (block + 1) / blocks - begin;
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t column = first * PANEL; column < end * PANEL; column += step) {
      int64_t columns[] = {column, job.gated ? job.width + column : column + PANEL};
      int64_t panels = job.gated ? 2 : std::min<int64_t>(2, end - column / PANEL);
      for (int64_t p = 0; p < panels; p++) {
        lay_out_int8(w + columns[p] * job.depth, job.depth, weights + p * PANEL * words, offsets + p * PANEL);
      }
      for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t row = begin + rows * tile / tiles, count = begin + rows * (tile + 1) / tiles - row;
        product<Int8, false>(count, words, panels, x + row * words, words, weights, words * PANEL, sums, PAIR);
        finish_int8<Type>(job, row, count, columns, panels, sums, offsets);
      }
    }
  }
}

}  // namespace
