// The exact GELU.
#pragma once

#include "product.h"

namespace {

// erf(z) = z P(z^2) / Q(z^2) for |z| < 4, fitted to a relative error of 2.5e-8; beyond, erf is 1 within 2e-8.
inline vec erf(vec z, Float32) {
  constexpr float P[] = {1.1283791065216064f, 0.19354495406150818f, 0.05310172215104103f,
                         0.003883335506543517f, 0.00028456500149331987f, 1.9867745777446544e-06f};
  constexpr float Q[] = {1.0f, 0.5048573017120361f, 0.11534994840621948f,
                         0.015207236632704735f, 0.001185567700304091f, 3.742004628293216e-05f};
  vec u = z * z, p = splat(P[5]), q = splat(Q[5]);
  for (int i = 4; i >= 0; i--) p = p * u + P[i], q = q * u + Q[i];
  return z > 4.0f ? splat(1.0f) : z < -4.0f ? splat(-1.0f) : z * p / q;
}

// erf(z) = z P(z^2) for |z| < 3, to 9e-5, which rounding to bfloat16 outweighs; beyond, erf is 1 within 2e-5.
inline vec erf(vec z, BFloat16) {
  constexpr float P[] = {1.12789571f, -3.73231381e-1f, 1.07717820e-1f, -2.26857960e-2f,
                         3.31871025e-3f, -3.14595381e-4f, 1.71598349e-5f, -4.05536184e-7f};
  vec u = z * z, p = splat(P[7]);
  for (int i = 6; i >= 0; i--) p = p * u + P[i];
  return z > 3.0f ? splat(1.0f) : z < -3.0f ? splat(-1.0f) : z * p;
}

template <class Type>
inline vec gelu(vec x) {
  return 0.5f * x * (1.0f + erf(0.70710678118654752f * x, Type{}));
}

}  // namespace
