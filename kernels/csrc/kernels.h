// What one instruction set provides. Each field is compiled once per set, without any header of PyTorch, so that no
// inline function of PyTorch ever holds instructions which the machine may lack.
#pragma once

#include <cstdint>

namespace ldm2 {

constexpr int PANEL = 16;         // output channels that lie side by side in packed weights
constexpr int MAX_INPUTS = 36;    // of a tile, over all schemes
constexpr int MAX_OUTPUTS = 16;

// A minimal-filtering algorithm over tiles: `inputs` positions give `points` products, these give `outputs` positions.
// Tiles are products of an outer and an inner algorithm; inputs are counted outer * inner_inputs + inner.
struct Scheme {
  int outer_inputs, inner_inputs, outer_outputs, inner_outputs, outer_taps, inner_taps, points;

  // One tile. rows[i] points to the C channels of input i (zeros outside the map); point p goes to v + p * stride.
  void (*input)(const float* const* rows, int64_t channels, float slope, float* v, int64_t stride);
  // One tile, back. rows[o] points to the channels of output o, null outside the map; bias and residual[o] are added.
  void (*output)(const float* m, int64_t stride, int64_t channels, const float* bias, const float* const* residual,
                 float* const* rows);
  // Weights of PANEL output channels for one input channel: taps[t] is the place of tap t in a row, negative if there
  // is none. Point p goes to u + p * stride.
  void (*weight)(const float* const* rows, const int* taps, float* u, int64_t stride);
};

struct Kernels {
  const char* name;
  Scheme conv3x3, conv3x3_narrow, conv3, conv7, conv11;
  // c (rows, 16 * panels; ldc apart) = a (rows, depth; lda apart) x packed b (panels, depth, 16).
  void (*gemm)(int64_t rows, int64_t depth, int64_t panels, const float* a, int64_t lda, const float* b, float* c,
               int64_t ldc);
  // y = x * gelu(gate), all of `width` floats.
  void (*geglu_row)(int64_t width, const float* x, const float* gate, float* y);
};

Kernels kernels_baseline();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
#endif

}  // namespace ldm2
