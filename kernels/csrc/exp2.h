// Powers of two.
#pragma once

#include "product.h"

namespace {

// 2^x for x <= 0 as a polynomial for 2^f, 0 <= f <= 1, times a power of two. To a relative error of 1.5e-7 down to
// 2^-126; below, it is at most 2^-126. Weights that are to be rounded to bfloat16 have a shorter one, to 1e-4.
template <class Type>
inline vec exp2(vec x) {
#if defined(__AVX512DQ__)
  vec f = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);           // x - floor(x), of -inf 0
#else
  x = vmax(splat(-126.0f), x);                             // NaN stays
  vec shifted = x - 0.5f + ROUND_TO_INTEGER;               // the low bits are an integer next below x
  vec f = x - (shifted - ROUND_TO_INTEGER);
#endif
  vec p;
  if constexpr (Type::PER_WORD == 1) {
    p = splat(1.86713005e-3f);
    p = p * f + 9.01703071e-3f;
    p = p * f + 5.57999127e-2f;
    p = p * f + 2.40164444e-1f;
    p = p * f + 6.93151295e-1f;
  } else {
    p = splat(7.70670399e-2f);
    p = p * f + 2.27644995e-1f;
    p = p * f + 6.95116758e-1f;
  }
  p = p * f + 1.0f;
#if defined(__AVX512DQ__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);      // p * 2^floor(x)
#else
  return (vec)((ivec)p + ((ivec)shifted << 23));
#endif
}

}  // namespace
