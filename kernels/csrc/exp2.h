// Powers of two.
#pragma once

#include "product.h"

namespace {

// 2^x for x <= 0, 2^-126 below -126: a polynomial for 2^f, |f| <= 1/2, to a relative error of 2e-8. Weights that are to
// be rounded to bfloat16 have a shorter one, to 1e-4.
template <class Type>
inline vec exp2(vec x) {
  x = vmax(splat(-126.0f), x);                             // NaN stays
  vec shifted = x + ROUND_TO_INTEGER;                      // the low bits are x rounded to an integer
  vec f = x - (shifted - ROUND_TO_INTEGER), p;
  if constexpr (Type::PER_WORD == 1) {
    p = splat(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
  } else {
    p = splat(5.517166e-2f);
    p = p * f + 2.4261112e-1f;
    p = p * f + 6.9326099e-1f;
    p = p * f + 9.9992807e-1f;
  }
  return (vec)((ivec)p + ((ivec)shifted << 23));
}

}  // namespace
