// Layer and group normalization, sums in float32.
#pragma once

#include <algorithm>
#include <cmath>

#include "exp2.h"

namespace {

template <class Type>
void layer_norm(const ldm2::LayerNorm& job, int64_t first, int64_t end, float* row) {
  using element = typename Type::element;
  auto weight = static_cast<const element*>(job.weight), bias = static_cast<const element*>(job.bias);
  float count = static_cast<float>(job.width);
  for (int64_t n = first; n < end; n++) {
    int64_t place = n * job.width;
    vec total{}, squares{};
    for (int64_t c = 0; c < job.width; c += LANES) {
      vec value = load(static_cast<const element*>(job.x) + place + c);
      if (job.added != nullptr) {
        value += load(static_cast<const element*>(job.added) + place + c);
        store(static_cast<element*>(job.sum) + place + c, value);
      }
      store(row + c, value);
      total += value;
    }
    float mean = reduce_add(total) / count;
    for (int64_t c = 0; c < job.width; c += LANES) {
      vec deviation = load(row + c) - mean;
      squares += deviation * deviation;
    }
    float factor = 1 / std::sqrt(reduce_add(squares) / count + job.eps);
    for (int64_t c = 0; c < job.width; c += LANES) {
      vec normal = (load(row + c) - mean) * factor;
      store(static_cast<element*>(job.y) + place + c, normal * load(weight + c) + load(bias + c));
    }
  }
}

constexpr int64_t SUMMED = 32;                             // positions that are summed by themselves: less rounding

template <class Type>
void channel_sums(const void* x, int64_t positions, int64_t channels, const float* pivots, float* sums) {
  using element = typename Type::element;
  std::fill_n(sums, 2 * channels, 0.0f);
  for (int64_t first = 0; first < positions; first += SUMMED) {
    int64_t end = std::min(positions, first + SUMMED);
    for (int64_t c = 0; c < channels; c += LANES) {
      vec pivot = load(pivots + c), total{}, squares{};
      for (int64_t n = first; n < end; n++) {
        vec deviation = load(static_cast<const element*>(x) + n * channels + c) - pivot;
        total += deviation;
        squares += deviation * deviation;
      }
      store(sums + c, load(sums + c) + total);
      store(sums + channels + c, load(sums + channels + c) + squares);
    }
  }
}

// x / (1 + e^-x), by the power of e that is at most 1.
template <class Type>
inline vec silu(vec x) {
  constexpr float LOG2_E = 1.44269504f;
  vec power = exp2<Type>((x > 0 ? -x : x) * LOG2_E);
  return x * (x < 0 ? power : splat(1.0f)) / (1.0f + power);
}

template <class Type, bool SILU>
void scale_positions(const void* x, int64_t positions, int64_t channels, const float* factors, const float* shifts,
                     void* y) {
  using element = typename Type::element;
  for (int64_t n = 0; n < positions; n++) {
    for (int64_t c = 0; c < channels; c += LANES) {
      vec value = load(static_cast<const element*>(x) + n * channels + c) * load(factors + c) + load(shifts + c);
      if constexpr (SILU) value = silu<Type>(value);
      store(static_cast<element*>(y) + n * channels + c, value);
    }
  }
}

template <class Type>
void scale_channels(const void* x, int64_t positions, int64_t channels, const float* factors, const float* shifts,
                    bool activate, void* y) {
  (activate ? scale_positions<Type, true> : scale_positions<Type, false>)(x, positions, channels, factors, shifts, y);
}

template <class Type>
ldm2::NormKernels norms() {
  return {layer_norm<Type>, channel_sums<Type>, scale_channels<Type>};
}

}  // namespace
