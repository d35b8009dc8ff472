// The kernels of one instruction set: tile transforms of the convolutions, linear layers,
// attention.
// Compiled once per set with -DLDM2_SET=<its name> and that set's flags.

#include "kernels.h"

#include "attention.h"
#include "linear.h"
#include "schemes.h"

namespace {

template <class Outer, class Inner, bool LEAKY>
void input_channels(const float* const* rows, int64_t channels, float slope, float* v, int64_t stride) {
  for (int64_t c = 0; c < channels; c += LANES) {
    vec half[Outer::INPUTS][Inner::POINTS];
#pragma GCC unroll 8
    for (int o = 0; o < Outer::INPUTS; o++) {
      vec d[Inner::INPUTS];
#pragma GCC unroll 8
      for (int i = 0; i < Inner::INPUTS; i++) {
        d[i] = load(rows[o * Inner::INPUTS + i] + c);
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

template <class Outer, class Inner>
void input_tile(const float* const* rows, int64_t channels, float slope, float* v, int64_t stride) {
  if (slope == 1.0f) {
    input_channels<Outer, Inner, false>(rows, channels, slope, v, stride);
  } else {
    input_channels<Outer, Inner, true>(rows, channels, slope, v, stride);
  }
}

template <class Outer, class Inner>
void output_tile(const float* m, int64_t stride, int64_t channels, const float* bias, const float* const* residual,
                 float* const* rows) {
  for (int64_t c = 0; c < channels; c += LANES) {
    vec half[Outer::OUTPUTS][Inner::POINTS];
#pragma GCC unroll 8
    for (int i = 0; i < Inner::POINTS; i++) {
      vec points[Outer::POINTS], column[Outer::OUTPUTS];
#pragma GCC unroll 8
      for (int o = 0; o < Outer::POINTS; o++) points[o] = load(m + (o * Inner::POINTS + i) * stride + c);
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
        if (residual != nullptr) sum += load(residual[place] + c);
        store(rows[place] + c, sum);
      }
    }
  }
}

template <class Outer, class Inner>
void weight_panel(const float* const* rows, const int* taps, float* u, int64_t stride) {
  constexpr int TAPS = Outer::TAPS * Inner::TAPS;
  float gathered[TAPS][PANEL] = {};
  for (int lane = 0; lane < PANEL; lane++) {
    for (int t = 0; t < TAPS; t++) {
      if (taps[t] >= 0) gathered[t][lane] = rows[lane][taps[t]];
    }
  }
  for (int lane = 0; lane < PANEL; lane += LANES) {
    vec half[Outer::TAPS][Inner::POINTS];
    for (int o = 0; o < Outer::TAPS; o++) {
      vec g[Inner::TAPS];
      for (int i = 0; i < Inner::TAPS; i++) g[i] = load(gathered[o * Inner::TAPS + i] + lane);
      Inner::weight(g, half[o]);
    }
    for (int i = 0; i < Inner::POINTS; i++) {
      vec column[Outer::TAPS], points[Outer::POINTS];
      for (int o = 0; o < Outer::TAPS; o++) column[o] = half[o][i];
      Outer::weight(column, points);
      for (int o = 0; o < Outer::POINTS; o++) store(u + (o * Inner::POINTS + i) * stride + lane, points[o]);
    }
  }
}

template <class Outer, class Inner>
ldm2::Scheme scheme() {
  static_assert(Outer::INPUTS * Inner::INPUTS <= ldm2::MAX_INPUTS);
  static_assert(Outer::OUTPUTS * Inner::OUTPUTS <= ldm2::MAX_OUTPUTS);
  return {Outer::INPUTS, Inner::INPUTS, Outer::OUTPUTS, Inner::OUTPUTS, Outer::TAPS, Inner::TAPS,
          Outer::POINTS * Inner::POINTS,
          input_tile<Outer, Inner>, output_tile<Outer, Inner>, weight_panel<Outer, Inner>};
}

void gemm(int64_t rows, int64_t depth, int64_t panels, const float* a, int64_t lda, const float* b, float* c,
          int64_t ldc) {
  product<Float32, false>(rows, depth, panels, a, lda, b, depth * PANEL, c, ldc);
}

}  // namespace

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOINED_OF(a, b) a##b
#define JOINED(a, b) JOINED_OF(a, b)

ldm2::Kernels ldm2::JOINED(kernels_, LDM2_SET)() {
  return {TEXT(LDM2_SET), scheme<F43, F43>(), scheme<F23, Pair>(), scheme<Plain, F43>(), scheme<F22, F44>(),
          scheme<F23, F44>(), gemm, linear, attention<Float32>, attention<BFloat16>, attention_scratch};
}
