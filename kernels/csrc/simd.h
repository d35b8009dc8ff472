// Vectors of float32 as wide as the instruction set this file is compiled for: 16 lanes (AVX-512), 8 (AVX2) or 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
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

inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof(vec));
  return value;
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof(vec)); }

inline vec splat(float value) { return value - vec{}; }

// The 32 bits at an address in every lane.
inline vec spread(const float* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  return (vec)(ivec{} + word);
}

// Four lanes, and the lanes A, B, C, D of two of them.
typedef float quad __attribute__((vector_size(16)));

template <int A, int B, int C, int D>
inline quad mix(quad a, quad b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, A, B, C, D);
#else
  typedef int32_t places __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, places{A, B, C, D});
#endif
}

}  // namespace
