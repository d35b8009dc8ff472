// Matrix products with a packed right side, sums in registers over the whole depth. Both sides are made of words of 32
// bits along the depth: a float32, or two neighboring numbers of 16 bits.
//
// The register tile of AVX-512 (AVX2: 6 rows of one panel), a word k of the depth at a time:
//
//                       b: panel p     panel p + 1        16 columns each, contiguous: two loads
//                       [ 16 words ] [ 16 words ]
//   a: row 0   [word]   [ 16 sums  ] [ 16 sums  ]
//      row 1   [word]   [ 16 sums  ] [ 16 sums  ]         a word of a is broadcast to all lanes
//        ...                      ...                     24 registers of sums, each += word * column
//      row 11  [word]   [ 16 sums  ] [ 16 sums  ]
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using ldm2::PANEL;

struct Float32 {
  using element = float;
  static constexpr int PER_WORD = 1, STEP = 1;             // STEP: words of the depth at a time
  static vec multiply_add(vec sum, vec a, vec b) { return sum + a * b; }
};

// sum + a0 * b0 + a1 * b1 in each lane.
struct BFloat16 {
  using element = uint16_t;
  static constexpr int PER_WORD = 2, STEP = 1;
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

// float32 by Winograd's algorithm for inner products (IEEE Transactions on Computers C-17, 1968), a pair of words of
// the depth at a time:
//
//   sum of a b = sum over pairs of (a0 + b1) (a1 + b0) - sum of a0 a1 - sum of b0 b1
//
// The last two sums are each of one row, or one column: they are made once, and a tile starts from them. What is left
// has half the multiplications, and two additions for each. Processors of AMD add beside what they multiply, as many
// numbers a cycle. So 4 products, 2 multiply-adds and 4 additions, take 3 cycles in place of 4 if one addition is made
// as a multiply-add, by 1. Both sides must be of one size, as errors are relative to the squares.
struct PairedFloat32 {
  static constexpr int PER_WORD = 1, STEP = 2;
};

// Pairs of integers of 16 bits, sums of 32 bits in the lanes of `sum`.
struct Int16 {
  static constexpr int PER_WORD = 2, STEP = 1;
  static vec multiply_add(vec sum, vec a, vec b) {
#if defined(__AVX512VNNI__)
    return (vec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    ivec low = ((ivec)a << 16 >> 16) * ((ivec)b << 16 >> 16), high = ((ivec)a >> 16) * ((ivec)b >> 16);
    return (vec)((ivec)sum + low + high);
#endif
  }
};

// Memory that a later product reads. It is fetched into the cache during this one: a line after each STRIDE words of the
// depth of a tile.
struct Ahead {
  static constexpr int STRIDE = 4, LINE = 64;              // LINE: bytes
  const char *next = nullptr, *end = nullptr;
};

// The same address, of unknown origin to the compiler: it keeps it in a register, where it would make it anew from
// others at each use.
inline const float* opaque(const float* address) {
  asm("" : "+r"(address));
  return address;
}

// The same vector, of unknown origin to the compiler.
inline vec opaque(vec value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#endif
  return value;
}

// Where sums go: to c, or they are added to it. `start` gives what LANES of them start from, `put` takes them, `from`
// gives the part from a place on.
template <bool ADD>
struct Into {
  float* c;
  int64_t ldc;
  vec start(int64_t, int64_t) const { return vec{}; }
  Into from(int64_t row, int64_t column) const { return {c + row * ldc + column, ldc}; }
  void put(int64_t row, int64_t column, vec sum) const {
    float* to = c + row * ldc + column;
    store(to, ADD ? load(to) + sum : sum);
  }
};

// The products of the words at a (STEP) and `columns` to the sums of a row.
template <class Type, int COLUMNS>
inline void add_products(vec* sums, const float* a, const vec columns[Type::STEP][COLUMNS], vec one) {
  if constexpr (Type::STEP == 1) {
    vec value = broadcast(a);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) sums[j] = Type::multiply_add(sums[j], value, columns[0][j]);
  } else {
    vec even = broadcast(a), odd = broadcast(a + 1);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) {
      vec other = j % 2 == 0 ? odd + columns[0][j] : odd * one + columns[0][j];
      sums[j] += (even + columns[1][j]) * other;
    }
  }
}

// a (ROWS, depth) x b (PANELS, depth, 16) into a target (ROWS, PANELS * 16). ldb: words from panel to panel.
template <class Type, int ROWS, int PANELS, class Target>
void register_tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, const Target& target,
                   const Ahead& ahead) {
  constexpr int WIDTH = PANEL / LANES, COLUMNS = PANELS * WIDTH, GROUPS = (ROWS + 3) / 4;
  vec sums[ROWS][COLUMNS], one = Type::STEP == 1 ? vec{} : opaque(splat(1.0f));
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) sums[i][j] = target.start(i, j * LANES);
  }
  const float *rows[GROUPS], *panels[PANELS];              // every fourth row
#pragma GCC unroll 8
  for (int g = 0; g < GROUPS; g++) rows[g] = opaque(a + 4 * g * lda);
#pragma GCC unroll 8
  for (int p = 0; p < PANELS; p++) panels[p] = opaque(b + p * ldb);
  bool any = ahead.next < ahead.end;
  const char* line = any ? ahead.next : reinterpret_cast<const char*>(b);
  int64_t step = any ? Ahead::LINE : 0;
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k += Type::STEP) {
    if (k % Ahead::STRIDE == 0) {
      __builtin_prefetch(line, 0, 2);
      line += step;
    }
    vec columns[Type::STEP][COLUMNS];
#pragma GCC unroll 2
    for (int n = 0; n < Type::STEP; n++) {
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; j++) columns[n][j] = load(panels[j / WIDTH] + n * PANEL + j % WIDTH * LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) add_products<Type, COLUMNS>(sums[i], rows[i / 4] + i % 4 * lda, columns, one);
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; g++) rows[g] += Type::STEP;
#pragma GCC unroll 8
    for (int p = 0; p < PANELS; p++) panels[p] += Type::STEP * PANEL;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) target.put(i, j * LANES, sums[i][j]);
  }
}

constexpr int TILE_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 3;   // 24 sums of 32 registers, 12 or 12 of 16
constexpr int TILE_PANELS = LANES == 16 ? 2 : 1;

template <class Type, int ROWS, int PANELS, class Target>
void register_tile_of(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                      const Target& target, const Ahead& ahead) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      register_tile<Type, ROWS, PANELS>(depth, a, lda, b, ldb, target, ahead);
    } else {
      register_tile_of<Type, ROWS - 1, PANELS>(rows, depth, a, lda, b, ldb, target, ahead);
    }
  }
}

template <class Type, int PANELS, class Target>
void panel_columns(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                   const Target& target, Ahead& ahead) {
  int64_t blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t n = 0; n < blocks; n++) {                   // blocks of nearly equal height: no thin last one
    int64_t begin = rows * n / blocks, end = rows * (n + 1) / blocks;
    register_tile_of<Type, TILE_ROWS, PANELS>(end - begin, depth, a + begin * lda, lda, b, ldb, target.from(begin, 0),
                                              ahead);
    if (ahead.next < ahead.end) ahead.next += depth / Ahead::STRIDE * Ahead::LINE;
  }
}

// Moves `ahead` on by what it has fetched.
template <class Type, class Target>
void product(int64_t rows, int64_t depth, int64_t panels, const float* a, int64_t lda, const float* b, int64_t ldb,
             const Target& target, Ahead& ahead) {
  int64_t p = 0;
  for (; p + TILE_PANELS <= panels; p += TILE_PANELS) {
    panel_columns<Type, TILE_PANELS>(rows, depth, a, lda, b + p * ldb, ldb, target.from(0, p * PANEL), ahead);
  }
  for (; p < panels; p++) {
    panel_columns<Type, 1>(rows, depth, a, lda, b + p * ldb, ldb, target.from(0, p * PANEL), ahead);
  }
}

template <class Type, bool ADD>
void product(int64_t rows, int64_t depth, int64_t panels, const float* a, int64_t lda, const float* b, int64_t ldb,
             float* c, int64_t ldc, Ahead& ahead) {
  product<Type>(rows, depth, panels, a, lda, b, ldb, Into<ADD>{c, ldc}, ahead);
}

template <class Type, bool ADD>
void product(int64_t rows, int64_t depth, int64_t panels, const float* a, int64_t lda, const float* b, int64_t ldb,
             float* c, int64_t ldc) {
  Ahead nothing;
  product<Type, ADD>(rows, depth, panels, a, lda, b, ldb, c, ldc, nothing);
}

// The columns [0, depth) of 16 rows to panel (depth, 16), as far as whole squares go. read(row, k) gives LANES words of
// a row. Returns the number of columns.
template <class Read>
inline int64_t transpose_squares(int64_t depth, float* panel, Read read) {
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    for (int lane = 0; lane < PANEL; lane += LANES) {
      vec square[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) square[i] = read(lane + i, k);
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) store(panel + (k + i) * PANEL + lane, square[i]);
    }
  }
  return k;
}

// panel (depth, 16) = the columns of 16 rows of words, `stride` apart. Rows from `count` on are zeros.
inline void transpose(const float* rows, int64_t stride, int64_t count, int64_t depth, float* panel) {
  auto read = [&](int64_t row, int64_t k) { return load(rows + row * stride + k); };
  int64_t k = count == PANEL ? transpose_squares(depth, panel, read) : 0;
  for (; k < depth; k++) {
    for (int64_t lane = 0; lane < PANEL; lane++) panel[k * PANEL + lane] = lane < count ? rows[lane * stride + k] : 0;
  }
}

// The same of 16 rows of integers of 8 bits, next to each other: panel (words, 16) as Type has its words.
template <class Type>
void transpose_integers(const int8_t* rows, int64_t words, float* panel) {
  constexpr int PER_WORD = Type::PER_WORD;
  int64_t stride = words * PER_WORD;
  int64_t k = transpose_squares(words, panel, [&](int64_t row, int64_t word) {
    const int8_t* from = rows + row * stride + word * PER_WORD;
    if constexpr (PER_WORD == 1) {
      return load(from);
    } else {
      return load_pairs(from);
    }
  });
  for (; k < words; k++) {
    for (int64_t lane = 0; lane < PANEL; lane++) {
      const int8_t* from = rows + lane * stride + k * PER_WORD;
      if constexpr (PER_WORD == 1) {
        panel[k * PANEL + lane] = from[0];
      } else {
        uint32_t word = f32_to_bf16(from[0]) | static_cast<uint32_t>(f32_to_bf16(from[1])) << 16;
        std::memcpy(panel + k * PANEL + lane, &word, sizeof(word));
      }
    }
  }
}

}  // namespace
