// The exact GELU.
#pragma once

#include "simd.h"

namespace {

inline vec gelu(vec x) {
  // erf(z) = z P(z^2) / Q(z^2) for |z| < 4, fitted to a relative error of 2.5e-8; beyond, erf is 1 within 2e-8.
  constexpr float P[] = {1.1283791065216064f, 0.19354495406150818f, 0.05310172215104103f,
                         0.003883335506543517f, 0.00028456500149331987f, 1.9867745777446544e-06f};
  constexpr float Q[] = {1.0f, 0.5048573017120361f, 0.11534994840621948f,
                         0.015207236632704735f, 0.001185567700304091f, 3.742004628293216e-05f};
  vec z = 0.70710678118654752f * x;
  vec u = z * z, p = splat(P[5]), q = splat(Q[5]);
  for (int i = 4; i >= 0; i--) p = p * u + P[i], q = q * u + Q[i];
  vec erf = z > 4.0f ? splat(1.0f) : z < -4.0f ? splat(-1.0f) : z * p / q;
  return 0.5f * x * (1.0f + erf);
}

}  // namespace
