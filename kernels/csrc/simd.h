// Vectors of float32 as wide as the instruction set this file is compiled for: 16 lanes (AVX-512), 8 (AVX2) or 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));

inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof(vec));
  return value;
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof(vec)); }

inline vec splat(float value) { return value - vec{}; }

}  // namespace
