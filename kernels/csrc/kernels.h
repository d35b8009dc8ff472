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

// y (rows, width) = x (rows, depth; x_stride apart) w^T + bias, w (width, depth), width a multiple of PANEL.
// gated: w and bias have a second half of as many rows, whose GELU multiplies what the first half gives.
struct Linear {
  int64_t rows, depth, width, x_stride;
  const float *x, *w, *bias;
  float* y;
  bool gated;
};

// One head of attention: rows of `width` numbers, float32 or bfloat16, `..._stride` apart. width: a multiple of PANEL.
struct Head {
  int64_t queries, keys, width, q_stride, k_stride, v_stride, bias_stride, out_stride;
  const void *q, *k, *v, *bias;
  void* out;
};

constexpr int64_t LINEAR_ROWS = 240;
constexpr int64_t LINEAR_SCRATCH = 2 * PANEL * (384 + LINEAR_ROWS);          // floats

struct Kernels {
  const char* name;
  Scheme conv3x3, conv3x3_narrow, conv3, conv7, conv11;
  // c (rows, 16 * panels; ldc apart) = a (rows, depth; lda apart) x packed b (panels, depth, 16).
  void (*gemm)(int64_t rows, int64_t depth, int64_t panels, const float* a, int64_t lda, const float* b, float* c,
               int64_t ldc);
  // Columns [16 * first, 16 * end) of y.
  void (*linear)(const Linear& job, int64_t first, int64_t end, float* scratch);
  void (*attention_float)(const Head& head, float* scratch);
  void (*attention_bfloat16)(const Head& head, float* scratch);
  int64_t (*attention_scratch)(int64_t keys, int64_t width);                 // floats
};

Kernels kernels_baseline();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
Kernels kernels_avx512_bf16();
#endif

}  // namespace ldm2
