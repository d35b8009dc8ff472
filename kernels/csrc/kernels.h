// What one instruction set provides. Each field is compiled once per set, without any header of PyTorch, so that no
// inline function of PyTorch ever holds instructions which the machine may lack.
#pragma once

#include <cstdint>

namespace ldm2 {

constexpr int PANEL = 16;         // output channels that lie side by side in packed weights
constexpr int MAX_INPUTS = 42;    // of a tile, over all transforms
constexpr int MAX_OUTPUTS = 16;

// Words from one point to the next of `size` words each. Strides of a power of two would send all points of a tile to
// the same set of the cache, hence one cache line more.
constexpr int64_t padded_stride(int64_t size) { return (size + PANEL - 1) / PANEL * PANEL + PANEL; }

// Where an input tile goes. Operands of products are words of 32 bits, see product.h: word w of point p lies at
// words[p * stride + w]. scales[p * scale_stride] is what the point's integers are multiplied with; unused in float32.
struct TransformedTile {
  float *words, *scales, *scratch;                         // scratch: points * padded_stride(C) floats
  int64_t stride, scale_stride;
};

// The sums of products of one tile: channel o of point p at sums[p * stride + o], times tile_scales[p * scale_stride]
// and channel_scales[p * channel_stride + o].
struct TileSums {
  const float *sums, *tile_scales, *channel_scales;
  int64_t stride, scale_stride, channel_stride;
};

// A Winograd convolution over tiles: `inputs` positions give `points` products, these give `outputs` positions. The
// transform of a tile nests an outer and an inner one; inputs are counted outer * inner_inputs + inner.
struct WinogradTransform {
  int outer_inputs, inner_inputs, outer_outputs, inner_outputs, points;

  // rows[i] points to the C channels of input i (zeros outside the map).
  void (*input)(const void* const* rows, int64_t channels, float slope, const TransformedTile& tile);
  // rows[o] points to the channels of output o, null outside the map; bias and residual[o] are added.
  void (*output)(const TileSums& tile, int64_t channels, const float* bias, const void* const* residual,
                 void* const* rows);
  // The weights of PANEL output channels, w (PANEL, in_channels, taps), or (PANEL, taps, in_channels): words of point p at u + p * stride, scales of
  // its PANEL channels at scales + p * scale_stride. factors: null, or what the channels of w, which then are integers
  // of 8 bits, are multiplied with.
  void (*weight)(const void* w, const float* factors, int64_t in_channels, int64_t taps, bool taps_first, float* u,
                 int64_t stride, float* scales, int64_t scale_stride, float* scratch);
};

// The convolutions of one dtype.
struct WinogradKernels {
  int per_word;                                            // channels in a word of an operand
  WinogradTransform conv3x3, conv3x3_narrow, conv3, conv4, conv7, conv11;
  // c (rows, 16 * panels; ldc apart) = a (rows, depth words; lda apart) x packed b (panels, depth, 16). next: null, or
  // the b of the next product, which is fetched meanwhile.
  void (*gemm)(int64_t rows, int64_t depth, int64_t panels, const float* a, int64_t lda, const float* b, float* c,
               int64_t ldc, const float* next);
};

// Rows of `width` numbers, next to each other: y = layer_norm(x + added) * weight + bias, and sum = x + added. Without
// `added` there is no sum. All float32 or all bfloat16. width: a multiple of PANEL.
struct LayerNorm {
  int64_t width;
  const void *x, *added, *weight, *bias;
  float eps;
  void *sum, *y;
};

// Normalization of one dtype.
struct NormKernels {
  void (*layer_norm)(const LayerNorm& job, int64_t first_row, int64_t end_row, float* scratch);   // scratch: a row
  // Of x (positions, channels), per channel: the sums of x - pivot, then those of the squares.
  void (*channel_sums)(const void* x, int64_t positions, int64_t channels, const float* pivots, float* sums);
  // y = x * factor + shift, per channel; activate: SiLU of that.
  void (*scale_channels)(const void* x, int64_t positions, int64_t channels, const float* factors,
                         const float* shifts, bool activate, void* y);
};

// y (rows, width) = x (rows, depth; x_stride apart) w^T + bias + residual, w (width, depth), width a multiple of PANEL.
// gated: w and bias have a second half of as many rows, whose GELU multiplies what the first half gives. x, w and y are
// float32 or bfloat16 (depth and x_stride even), the bias is float32. factors: null, or what the rows of w, which then
// are integers of 8 bits, are multiplied with. row_factors: null, or what the products of the rows of x are. residual:
// null, or as y, and not for gated ones.
struct Linear {
  int64_t rows, depth, width, x_stride;
  const void *x, *w;
  const float *factors, *row_factors, *bias;
  const void* residual;
  void* y;
  bool gated;
};

// Rows of x, x_stride apart, as integers of 8 bits: x / scale to the nearest, ties to even, plus 128. A row's scale
// makes its largest number 127; where a row holds NaN or infinite numbers it is NaN. x: float32 or bfloat16.
struct Rounding {
  int64_t depth, x_stride;
  const void* x;
  uint8_t* rows;                                           // int8_stride(depth) apart, zeros (128) behind `depth`
  float* scales;
};

// One head of attention: rows of `width` numbers, float32 or bfloat16, `..._stride` apart. width: a multiple of PANEL.
struct Head {
  int64_t queries, keys, width, q_stride, k_stride, v_stride, bias_stride, out_stride;
  const void *q, *k, *v, *bias;
  void* out;
};

// Attention whose keys (positions, heads, channels) and values (channels; value_stride apart; positions, heads) have the
// projections in them: y = sum over the heads of softmax(x keys^T + bias) values^T, plus offset and residual. x, y and
// residual are dense rows (queries, channels), all float32 or all bfloat16 (channels and value_stride even). channels: a
// multiple of PANEL. bias: null, or a number for each position. residual: null, or as y.
struct Absorbed {
  int64_t queries, channels, heads, positions, value_stride;
  const void *x, *keys, *values;
  const float *bias, *offset;
  const void* residual;
  void* y;
};

constexpr int64_t LINEAR_CACHE = 1 << 19;            // bytes of x that are multiplied with all weights in turn
constexpr int64_t LINEAR_LEAST_ROWS = 240;           // for which it pays to lay out a panel
constexpr int64_t LINEAR_TILE_ROWS = 12;

constexpr int64_t INT8_DEPTH = 1 << 16;              // products of 8 bits whose sums have 32, with the offset of 128

// Floats that a linear layer needs: two panels, a number for each of their columns, the sums of a tile, and its rows.
constexpr int64_t linear_scratch(int64_t depth) {
  return 2 * PANEL * (depth + 1 + LINEAR_TILE_ROWS) + LINEAR_TILE_ROWS * depth;
}

// Linear layers by Strassen's algorithm, see strassen.h.
constexpr int64_t STRASSEN_PRODUCTS = 7;
constexpr int64_t STRASSEN_CACHE = 1 << 23;          // bytes of operands of x that are multiplied with all weights

// The columns of y that are made together.
constexpr int64_t strassen_unit(bool gated) { return gated ? 2 * PANEL : 4 * PANEL; }

// Floats from the operands of one pair of rows to those of the next.
constexpr int64_t strassen_stride(int64_t depth) { return padded_stride(STRASSEN_PRODUCTS * depth / 2); }

// Floats that it needs: the operands of four panels, what their products start from, six tiles of sums, and a factor
// for each row of w.
constexpr int64_t strassen_scratch(int64_t depth, int64_t w_rows) {
  return STRASSEN_PRODUCTS * PANEL * (depth + 2) + 12 * LINEAR_TILE_ROWS * PANEL + w_rows;
}

// Bytes from row to row of integers of 8 bits: whole words of four.
constexpr int64_t int8_stride(int64_t depth) { return (depth + 3) / 4 * 4; }

// The layers of one dtype by Strassen's algorithm in float32. rows are even, depth is a multiple of 2 * PANEL, width one
// of the unit.
struct StrassenKernels {
  int64_t rows_least;                                      // of an item of a batch, for which that pays
  // Operands and factors of pairs [first, end) of rows of x.
  void (*rows)(const Linear& job, int64_t first, int64_t end, float* operands, float* factors);
  // With these as row_factors, columns [unit * first, unit * end) of y.
  void (*multiply)(const Linear& job, int64_t first, int64_t end, const float* operands, float* scratch);
};

struct Kernels {
  const char* name;
  WinogradKernels winograd_float, winograd_bfloat16;
  NormKernels norm_float, norm_bfloat16;
  // Columns [16 * first, 16 * end) of y.
  void (*linear_float)(const Linear& job, int64_t first, int64_t end, float* scratch);
  void (*linear_bfloat16)(const Linear& job, int64_t first, int64_t end, float* scratch);
  StrassenKernels strassen_float, strassen_bfloat16;       // the latter none where there are products of bfloat16
  void (*round_float)(const Rounding& job, int64_t first_row, int64_t end_row);
  void (*round_bfloat16)(const Rounding& job, int64_t first_row, int64_t end_row);
  // A layer of such rows (x, int8_stride(depth) apart) with int8 weights, to float32 or bfloat16. depth: at most
  // INT8_DEPTH.
  void (*linear_int8_float)(const Linear& job, int64_t first, int64_t end, float* scratch);
  void (*linear_int8_bfloat16)(const Linear& job, int64_t first, int64_t end, float* scratch);
  void (*attention_float)(const Head& head, float* scratch);
  void (*attention_bfloat16)(const Head& head, float* scratch);
  int64_t (*attention_scratch)(int64_t keys, int64_t width);                 // floats
  void (*absorbed_float)(const Absorbed& job, float* scratch);
  void (*absorbed_bfloat16)(const Absorbed& job, float* scratch);
  int64_t (*absorbed_scratch)(int64_t channels, int64_t heads, int64_t positions);
};

Kernels kernels_baseline();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
Kernels kernels_avx512_bf16();
Kernels kernels_zen4();
#endif

}  // namespace ldm2
