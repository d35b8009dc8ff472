// Vectors of float32 as wide as the instruction set this file is compiled for: 16 lanes (AVX-512), 8 (AVX2) or 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(LDM2_LANES)                                    // for tests of the wider code on a machine that lacks it
constexpr int LANES = LDM2_LANES;
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof(vec));
  return value;
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof(vec)); }

inline vec splat(float value) { return value - vec{}; }

// The 32 bits at an address in every lane.
inline vec broadcast(const float* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  return (vec)(ivec{} + word);
}

inline vec vmax(vec a, vec b) { return a > b ? a : b; }

// Halves of a vector, combined until one number is left.
template <int COUNT, class Combine>
inline float reduce(const float* x, Combine combine) {
  if constexpr (COUNT == 1) {
    return x[0];
  } else {
    float halved[COUNT / 2];
    for (int i = 0; i < COUNT / 2; i++) halved[i] = combine(x[i], x[i + COUNT / 2]);
    return reduce<COUNT / 2>(halved, combine);
  }
}

inline float reduce_max(vec x) {
  float lanes[LANES];
  store(lanes, x);
  return reduce<LANES>(lanes, [](float a, float b) { return a > b ? a : b; });
}

// The low 16 bits of each lane, and lanes made of 16 bits.
inline halves low_halves(ivec x) {
#if defined(__AVX512F__)
  return (halves)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, halves);
#endif
}

inline ivec widen(halves x) {
#if defined(__AVX512F__)
  return (ivec)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, ivec);
#endif
}

// bfloat16 is the upper half of a float32. Stores round to nearest, ties to even.
inline float bf16_to_f32(uint16_t value) {
  uint32_t word = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &word, sizeof(result));
  return result;
}
inline float bf16_to_f32(float value) { return value; }

// Of a number that bfloat16 can hold.
inline uint16_t f32_to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return static_cast<uint16_t>(word >> 16);
}

inline vec load(const uint16_t* from) {
  halves value;
  std::memcpy(&value, from, sizeof(value));
  return (vec)(widen(value) << 16);
}

inline void store(uint16_t* to, vec x) {
#if defined(__AVX512BF16__)
  __m256bh result = _mm512_cvtneps_pbh((__m512)x);
#else
  ivec word = (ivec)x;
  halves result = low_halves((word + 0x7fff + ((word >> 16) & 1)) >> 16);
#endif
  std::memcpy(to, &result, sizeof(result));
}

// Two numbers in each lane as bfloat16, rounded: the first in the lower half.
inline vec bf16_pairs(vec low, vec high) {
#if defined(__AVX512BF16__)
  __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  ivec order = widen(halves{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
  return (vec)_mm512_permutexvar_epi16((__m512i)(order | (order + 16) << 16), pairs);
#else
  auto rounded = [](ivec word) { return word + 0x7fff + ((word >> 16) & 1); };
  return (vec)((rounded((ivec)low) >> 16 & 0xffff) | (rounded((ivec)high) & static_cast<int32_t>(0xffff0000u)));
#endif
}

// Integers of 8 bits as float32.
inline vec load(const int8_t* from) {
  bytes value;
  std::memcpy(&value, from, sizeof(value));
#if defined(__AVX512F__)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)value));
#else
  return __builtin_convertvector(__builtin_convertvector(value, ivec), vec);
#endif
}

// Pairs of them as pairs of bfloat16, in words: exact, as both have 8 bits.
inline vec load_pairs(const int8_t* from) {
  halves pairs;
  std::memcpy(&pairs, from, sizeof(pairs));
  ivec word = widen(pairs), low = word << 24 >> 24, high = word << 16 >> 24;
  ivec low_float = (ivec)__builtin_convertvector(low, vec), high_float = (ivec)__builtin_convertvector(high, vec);
  return (vec)((low_float >> 16 & 0xffff) | high_float);   // the low half of what 8 bits make is zero
}

// x, |x| < 2^15, rounded to integers of 16 bits: the low bits of x + 1.5 * 2^23.
constexpr float ROUND_TO_INTEGER = 12582912.0f;

// Of each block of 2 STEP lanes: the first halves of a and b, or their second halves.
template <int STEP, bool SECOND, int... LANE>
inline vec interleave(vec a, vec b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((LANE & STEP) != 0 ? LANES + LANE : LANE) + (SECOND ? STEP : 0) -
                                           ((LANE & STEP) != 0 ? STEP : 0)...);
#else
  return __builtin_shuffle(a, b, ivec{((LANE & STEP) != 0 ? LANES + LANE : LANE) + (SECOND ? STEP : 0) -
                                      ((LANE & STEP) != 0 ? STEP : 0)...});
#endif
}

// In lanes that have the bit STEP, sums of b, in the others, sums of a: each of two lanes STEP apart.
template <int STEP>
inline vec fold(vec a, vec b) {
  constexpr auto ALL = std::make_integer_sequence<int, LANES>{};
  return interleave<STEP, false>(a, b, ALL) + interleave<STEP, true>(a, b, ALL);
}

template <int STEP = LANES / 2>
inline float reduce_add(vec x) {
  if constexpr (STEP == 0) {
    return x[0];
  } else {
    return reduce_add<STEP / 2>(fold<STEP>(x, x));
  }
}

// The transpose of a square of LANES vectors: blocks of 1, 2, 4, ... lanes change places.
template <int STEP = 1>
inline void transpose_square(vec* rows) {
  if constexpr (STEP < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if ((i & STEP) != 0) continue;
      vec a = rows[i], b = rows[i + STEP];
      rows[i] = interleave<STEP, false>(a, b, std::make_integer_sequence<int, LANES>{});
      rows[i + STEP] = interleave<STEP, true>(a, b, std::make_integer_sequence<int, LANES>{});
    }
    transpose_square<2 * STEP>(rows);
  }
}

}  // namespace
