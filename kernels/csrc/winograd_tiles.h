// The transforms of whole tiles, for all channels.
//
// float32: operands and sums are float32. bfloat16 without AVX512_VNNI: the same, only loads and stores differ. With
// it, operands are integers of 16 bits, which the processor multiplies as fast as bfloat16 and which have 7 bits more.
// A transform amplifies the rounding of its operands about fivefold, too much for bfloat16 itself, and not enough to
// show beside the rounding of a bfloat16 result for these. The vector of all channels at a point of a tile has a scale
// of its own, as has that of each output channel of the weights. They bound the Euclidean norms, so that no sum of
// products overflows 32 bits, by the inequality of Cauchy and Schwarz.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "product.h"
#include "winograd.h"

namespace {

// Bounds of norms, whose product is below 2^31 by more than rounding to integers adds, and of single integers.
constexpr float TILE_NORM = 32700.0f, WEIGHT_NORM = 65300.0f, LARGEST = 32700.0f;

struct WinogradFloat {
  using element = float;
  using operand = Float32;
};

struct WinogradBFloat16 {
  using element = uint16_t;
#if defined(__AVX512VNNI__)
  using operand = Int16;
#else
  using operand = Float32;
#endif
};

// What integers are multiplied with to give numbers the sum of whose squares is `squares`, the largest of which is at
// most `largest`. 0 for zeros, NaN for NaN. Squares leave the range of float32 before the numbers do: then
// sqrt(count) * largest bounds the norm.
inline float scale_of(float squares, float largest, int64_t count, float limit) {
  bool in_range = !(squares <= 1e-24f || squares >= 1e36f);
  float norm = in_range ? std::sqrt(squares) : largest * std::sqrt(static_cast<float>(count));
  float scale = norm / limit, least = largest / LARGEST;
  return scale < least ? least : scale;
}

// What numbers of that scale are multiplied with to give integers.
inline float factor_of(float scale) { return scale > 1e-37f ? 1 / scale : 0 * scale; }

inline vec absolute(vec x) { return x < 0 ? -x : x; }

inline float largest_of(const float* values, int64_t count) {
  vec largest{};
  for (int64_t c = 0; c < count; c += LANES) largest = vmax(absolute(load(values + c)), largest);
  return reduce_max(largest);
}

// v (POINTS, channels; rows `stride` apart) as integers of 16 bits, with a scale for each point.
template <int POINTS>
void quantize(const float* v, int64_t stride, int64_t channels, const ldm2::TransformedTile& tile) {
  constexpr int ROUNDED = (POINTS + LANES - 1) / LANES * LANES;
  float squares[ROUNDED] = {}, factors[ROUNDED];
  // Points at once, as one sum waits for the one before it.
  constexpr int CHAINS = POINTS % 4 == 0 ? 4 : POINTS % 3 == 0 ? 3 : 7;
  static_assert(POINTS % CHAINS == 0);
  for (int p = 0; p < POINTS; p += CHAINS) {
    vec sums[CHAINS] = {};
    for (int64_t c = 0; c < channels; c += LANES) {
#pragma GCC unroll 8
      for (int i = 0; i < CHAINS; i++) {
        vec x = load(v + (p + i) * stride + c);
        sums[i] += x * x;
      }
    }
    for (int i = 0; i < CHAINS; i++) squares[p + i] = reduce_add(sums[i]);
  }
  for (int p = 0; p < POINTS; p++) {
    bool in_range = squares[p] > 1e-24f && squares[p] < 1e36f;               // then the norm bounds the largest, too
    float largest = in_range ? 0.0f : largest_of(v + p * stride, channels);
    float scale = scale_of(squares[p], largest, channels, TILE_NORM);
    tile.scales[p * tile.scale_stride] = scale;
    factors[p] = factor_of(scale);
  }
  for (int p = 0; p < POINTS; p++) {
    auto to = reinterpret_cast<uint16_t*>(tile.words + p * tile.stride);
    for (int64_t c = 0; c < channels; c += LANES) {
      vec x = load(v + p * stride + c) * factors[p] + ROUND_TO_INTEGER;
      halves rounded = low_halves((ivec)x);
      std::memcpy(to + c, &rounded, sizeof(rounded));
    }
  }
}

template <class Element, class Outer, class Inner, bool LEAKY>
void input_channels(const void* const* rows, int64_t channels, float slope, float* v, int64_t stride) {
  for (int64_t c = 0; c < channels; c += LANES) {
    vec half[Outer::INPUTS][Inner::POINTS];
#pragma GCC unroll 8
    for (int o = 0; o < Outer::INPUTS; o++) {
      vec d[Inner::INPUTS];
#pragma GCC unroll 8
      for (int i = 0; i < Inner::INPUTS; i++) {
        d[i] = load(static_cast<const Element*>(rows[o * Inner::INPUTS + i]) + c);
        if (LEAKY) d[i] = d[i] > 0 ? d[i] : slope * d[i];
      }
      Inner::input(d, half[o]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Inner::POINTS; i++) {
      vec column[Outer::INPUTS], points[Outer::POINTS];
#pragma GCC unroll 8
      for (int o = 0; o < Outer::INPUTS; o++) column[o] = half[o][i];
      Outer::input(column, points);
#pragma GCC unroll 8
      for (int o = 0; o < Outer::POINTS; o++) store(v + (o * Inner::POINTS + i) * stride + c, points[o]);
    }
  }
}

template <class Type, class Outer, class Inner>
void input_tile(const void* const* rows, int64_t channels, float slope, const ldm2::TransformedTile& tile) {
  using element = typename Type::element;
  constexpr bool QUANTIZED = Type::operand::PER_WORD == 2;
  float* v = QUANTIZED ? tile.scratch : tile.words;
  int64_t stride = QUANTIZED ? ldm2::padded_stride(channels) : tile.stride;
  if (slope == 1.0f) {
    input_channels<element, Outer, Inner, false>(rows, channels, slope, v, stride);
  } else {
    input_channels<element, Outer, Inner, true>(rows, channels, slope, v, stride);
  }
  if constexpr (QUANTIZED) quantize<Outer::POINTS * Inner::POINTS>(v, stride, channels, tile);
}

// Sums of LANES channels of a point, from channel c.
template <class Type>
vec load_sums(const ldm2::TileSums& tile, int point, int64_t c) {
  vec sums = load(tile.sums + point * tile.stride + c);
  if constexpr (Type::operand::PER_WORD == 2) {
    vec channel_scales = load(tile.channel_scales + point * tile.channel_stride + c);
    vec scales = channel_scales * tile.tile_scales[point * tile.scale_stride];
    sums = __builtin_convertvector((ivec)sums, vec) * scales;
  }
  return sums;
}

template <class Type, class Outer, class Inner>
void output_tile(const ldm2::TileSums& tile, int64_t channels, const float* bias, const void* const* residual,
                 void* const* rows) {
  using element = typename Type::element;
  for (int64_t c = 0; c < channels; c += LANES) {
    vec half[Outer::OUTPUTS][Inner::POINTS];
#pragma GCC unroll 8
    for (int i = 0; i < Inner::POINTS; i++) {
      vec points[Outer::POINTS], column[Outer::OUTPUTS];
#pragma GCC unroll 8
      for (int o = 0; o < Outer::POINTS; o++) points[o] = load_sums<Type>(tile, o * Inner::POINTS + i, c);
      Outer::output(points, column);
#pragma GCC unroll 8
      for (int o = 0; o < Outer::OUTPUTS; o++) half[o][i] = column[o];
    }
    vec shift = bias == nullptr ? vec{} : load(bias + c);
#pragma GCC unroll 8
    for (int o = 0; o < Outer::OUTPUTS; o++) {
      vec y[Inner::OUTPUTS];
      Inner::output(half[o], y);
#pragma GCC unroll 8
      for (int i = 0; i < Inner::OUTPUTS; i++) {
        int place = o * Inner::OUTPUTS + i;
        if (rows[place] == nullptr) continue;
        vec sum = y[i] + shift;
        if (residual != nullptr) sum += load(static_cast<const element*>(residual[place]) + c);
        store(static_cast<element*>(rows[place]) + c, sum);
      }
    }
  }
}

// Element n of LANES output channels, from `lane`, of a transposed panel of words.
inline vec panel_element(const float* panel, int64_t n, int lane, float) { return load(panel + n * PANEL + lane); }
inline vec panel_element(const float* panel, int64_t n, int lane, uint16_t) {
  ivec word = (ivec)load(panel + n / 2 * PANEL + lane);
  return (vec)(n % 2 == 0 ? word << 16 : word & static_cast<int32_t>(0xffff0000u));
}

// A transposed panel of the weights of LANES output channels: `taps` of each input channel.
template <class Element>
struct TapPanel {
  const float* words;
  int64_t taps, channel_step, tap_step;
  int lane;

  vec operator()(int64_t channel, int64_t tap) const {
    return panel_element(words, channel * channel_step + tap * tap_step, lane, Element{});
  }
};

// The inner transform of all taps of one input channel, for LANES output channels. tap: from its place to a vector.
template <class Outer, class Inner, class Tap>
void inner_weights(int64_t taps, Tap tap, vec half[Outer::TAPS][Inner::POINTS]) {
#pragma GCC unroll 8
  for (int o = 0; o < Outer::TAPS; o++) {
    vec g[Inner::TAPS];
#pragma GCC unroll 8
    for (int i = 0; i < Inner::TAPS; i++) g[i] = o * Inner::TAPS + i < taps ? tap(o * Inner::TAPS + i) : vec{};
    Inner::weight(g, half[o]);
  }
}

// The outer one of one inner point.
template <class Outer, class Inner>
void outer_weights(const vec half[Outer::TAPS][Inner::POINTS], int point, vec* transformed) {
  vec column[Outer::TAPS];
#pragma GCC unroll 8
  for (int o = 0; o < Outer::TAPS; o++) column[o] = half[o][point];
  Outer::weight(column, transformed);
}

// use(p, even, odd) for the points of each pair of input channels, from channel c.
template <class Outer, class Inner, class Panel, class Use>
void weight_pair(const Panel& panel, int64_t c, Use use) {
  vec half[2][Outer::TAPS][Inner::POINTS];
  for (int64_t n = 0; n < 2; n++) {
    inner_weights<Outer, Inner>(panel.taps, [&](int64_t tap) { return panel(c + n, tap); }, half[n]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Inner::POINTS; i++) {
    vec even[Outer::POINTS], odd[Outer::POINTS];
    outer_weights<Outer, Inner>(half[0], i, even);
    outer_weights<Outer, Inner>(half[1], i, odd);
#pragma GCC unroll 8
    for (int o = 0; o < Outer::POINTS; o++) use(o * Inner::POINTS + i, even[o], odd[o]);
  }
}

// Bounds of the magnitude of LANES output channels at all points: what the largest magnitude of each tap can give.
template <class Outer, class Inner, class Panel>
void weight_bounds(const Panel& panel, int64_t in_channels, vec* bounds) {
  for (int p = 0; p < Outer::POINTS * Inner::POINTS; p++) bounds[p] = vec{};
  for (int64_t t = 0; t < panel.taps; t++) {
    vec largest{};
    for (int64_t c = 0; c < in_channels; c++) largest = vmax(absolute(panel(c, t)), largest);
    vec half[Outer::TAPS][Inner::POINTS];
    inner_weights<Outer, Inner>(panel.taps, [&](int64_t n) { return n == t ? largest : vec{}; }, half);
    for (int i = 0; i < Inner::POINTS; i++) {
      vec transformed[Outer::POINTS];
      outer_weights<Outer, Inner>(half, i, transformed);
      for (int o = 0; o < Outer::POINTS; o++) bounds[o * Inner::POINTS + i] += absolute(transformed[o]);
    }
  }
}

// Scales of the output channels of a panel at all points; what makes integers of them into `factors`.
template <class Outer, class Inner, class Panel>
void weight_scales(const Panel& panel, int64_t in_channels, float* scales, int64_t scale_stride, vec* factors) {
  constexpr int POINTS = Outer::POINTS * Inner::POINTS;
  vec squares[POINTS] = {}, bounds[POINTS];
  weight_bounds<Outer, Inner>(panel, in_channels, bounds);
  for (int64_t c = 0; c < in_channels; c += 2) {
    weight_pair<Outer, Inner>(panel, c, [&](int p, vec even, vec odd) {
      squares[p] = squares[p] + even * even + odd * odd;
    });
  }
  for (int p = 0; p < POINTS; p++) {
    for (int i = 0; i < LANES; i++) {
      float scale = scale_of(squares[p][i], bounds[p][i], in_channels, WEIGHT_NORM);
      scales[p * scale_stride + panel.lane + i] = scale;
      factors[p][i] = factor_of(scale);
    }
  }
}

template <class Type, class Outer, class Inner>
void weight_panel(const void* w, const float* channel_factors, int64_t in_channels, int64_t taps, bool taps_first,
                  float* u, int64_t stride, float* scales, int64_t scale_stride, float* scratch) {
  using element = typename Type::element;
  int64_t words = in_channels * taps * sizeof(element) / sizeof(float);
  if (channel_factors == nullptr) {
    transpose(static_cast<const float*>(w), words, PANEL, words, scratch);
  } else {
    transpose_integers<std::conditional_t<sizeof(element) == 4, Float32, BFloat16>>(static_cast<const int8_t*>(w),
                                                                                    words, scratch);
  }
  for (int lane = 0; lane < PANEL; lane += LANES) {
    TapPanel<element> panel{scratch, taps, taps_first ? 1 : taps, taps_first ? in_channels : 1, lane};
    vec channel = channel_factors == nullptr ? splat(1.0f) : load(channel_factors + lane);
    vec factors[Outer::POINTS * Inner::POINTS];
    if constexpr (Type::operand::PER_WORD == 2) {
      weight_scales<Outer, Inner>(panel, in_channels, scales, scale_stride, factors);
      for (int p = 0; channel_factors != nullptr && p < Outer::POINTS * Inner::POINTS; p++) {
        store(scales + p * scale_stride + lane, load(scales + p * scale_stride + lane) * channel);
      }
    }
    for (int64_t c = 0; c < in_channels; c += 2) {
      float* to = u + c / Type::operand::PER_WORD * PANEL + lane;
      weight_pair<Outer, Inner>(panel, c, [&](int p, vec even, vec odd) {
        if constexpr (Type::operand::PER_WORD == 1) {
          store(to + p * stride, even * channel);
          store(to + p * stride + PANEL, odd * channel);
        } else {
          ivec low = (ivec)(even * factors[p] + ROUND_TO_INTEGER) & 0xffff;
          ivec high = (ivec)(odd * factors[p] + ROUND_TO_INTEGER) << 16;
          store(to + p * stride, (vec)(low | high));
        }
      });
    }
  }
}

// Sums of float32 over more words than this are made of shorter ones, which round less. Those of integers are exact.
constexpr int64_t FLOAT_DEPTH = 256;

template <class Operand>
void gemm(int64_t rows, int64_t depth, int64_t panels, const float* a, int64_t lda, const float* b, float* c,
          int64_t ldc, const float* next) {
  int64_t piece = Operand::PER_WORD == 1 ? FLOAT_DEPTH : depth;
  Ahead ahead;
  if (next != nullptr) {
    ahead = {reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next + depth * panels * PANEL)};
  }
  product<Operand, false>(rows, std::min(depth, piece), panels, a, lda, b, depth * PANEL, c, ldc, ahead);
  for (int64_t k = piece; k < depth; k += piece) {
    product<Operand, true>(rows, std::min(depth - k, piece), panels, a + k, lda, b + k * PANEL, depth * PANEL, c, ldc,
                           ahead);
  }
}

template <class Type, class Outer, class Inner>
ldm2::WinogradTransform transform() {
  static_assert(Outer::INPUTS * Inner::INPUTS <= ldm2::MAX_INPUTS);
  static_assert(Outer::OUTPUTS * Inner::OUTPUTS <= ldm2::MAX_OUTPUTS);
  return {Outer::INPUTS, Inner::INPUTS, Outer::OUTPUTS, Inner::OUTPUTS, Outer::POINTS * Inner::POINTS,
          input_tile<Type, Outer, Inner>, output_tile<Type, Outer, Inner>, weight_panel<Type, Outer, Inner>};
}

template <class Type>
ldm2::WinogradKernels winograd() {
  return {Type::operand::PER_WORD, transform<Type, F43, F43>(), transform<Type, F23, Pair>(),
          transform<Type, Plain, F63>(), transform<Type, Plain, F44>(), transform<Type, F32, F44>(), transform<Type, F43, F44>(),
          gemm<typename Type::operand>};
}

}  // namespace
