// Winograd convolutions of stride 1, arXiv:1509.09308. Tiles of the map are transformed into V (points, tiles, C) and
// multiplied by U (points, C, O) into M (points, tiles, O), which is transformed back: a block of tiles and two panels
// of output channels at a time, so that V and M stay in cache.

#include "operators.h"

namespace ldm2 {
namespace {

// Which transform: 3x3 kernels on maps of any width or of width 2, one-dimensional kernels of 3, 4, 7 and 11 taps. A
// kernel of n taps sees n / 2 positions before its own.
enum Variant : int64_t { WIDE = 0, NARROW = 1, TAPS3 = 3, TAPS4 = 4, TAPS7 = 7, TAPS11 = 11 };

const WinogradTransform& transform_of(const WinogradKernels& dtype, int64_t variant) {
  switch (variant) {
    case WIDE: return dtype.conv3x3;
    case NARROW: return dtype.conv3x3_narrow;
    case TAPS3: return dtype.conv3;
    case TAPS4: return dtype.conv4;
    case TAPS7: return dtype.conv7;
    case TAPS11: return dtype.conv11;
    default: TORCH_CHECK(false, "unknown variant of convolution ", variant);
  }
}

// The map (T, F) that is cut into tiles; a sequence with dilation d is a map of d columns, each cut by itself.
struct TileGrid {
  int64_t batch, rows, columns;          // column f of row t is position t * columns + f
  int64_t in_length, out_length;         // positions in one item
  int64_t tile_rows, tile_columns;       // tiles in one item
  bool sequence;

  // x: (B, C, T, F) or (B, C, N). longer: positions that the result has beyond those of x.
  TileGrid(const WinogradTransform& t, int64_t variant, const at::Tensor& x, int64_t dilation, int64_t longer)
      : batch(x.size(0)), sequence(variant >= TAPS3) {
    columns = sequence ? dilation : x.size(3);
    in_length = sequence ? x.size(2) : x.size(2) * columns;
    out_length = in_length + longer;
    rows = ceil_div(out_length, columns);
    int64_t tall = sequence ? t.outer_outputs * t.inner_outputs : t.outer_outputs;
    tile_rows = ceil_div(rows, tall);
    tile_columns = sequence ? columns : ceil_div(columns, t.inner_outputs);
  }
  int64_t tiles() const { return batch * tile_rows * tile_columns; }
};

// Where tile `index` takes its inputs and leaves its outputs: positions counted over the batch, -1 outside the map.
class TilePositions {
 public:
  TilePositions(const WinogradTransform& t, const TileGrid& grid, int64_t variant, int64_t index) : grid_(grid) {
    int64_t column = index % grid.tile_columns;
    int64_t row = index / grid.tile_columns % grid.tile_rows;
    item_ = index / (grid.tile_columns * grid.tile_rows);
    if (grid.sequence) {
      step_ = t.inner_outputs;
      row_ = row * t.outer_outputs * step_;
      column_ = column;
      halo_row_ = variant / 2;
    } else {
      row_ = row * t.outer_outputs;
      column_ = column * t.inner_outputs;
      halo_row_ = 1;
      halo_column_ = variant == WIDE;
    }
  }
  int64_t input(int outer, int inner) const {
    return grid_.sequence ? at(row_ - halo_row_ + step_ * outer + inner, column_, grid_.in_length)
                          : at(row_ - halo_row_ + outer, column_ - halo_column_ + inner, grid_.in_length);
  }
  int64_t output(int outer, int inner) const {
    return grid_.sequence ? at(row_ + step_ * outer + inner, column_, grid_.out_length)
                          : at(row_ + outer, column_ + inner, grid_.out_length);
  }

 private:
  int64_t at(int64_t row, int64_t column, int64_t length) const {
    if (row < 0 || column < 0 || column >= grid_.columns) return -1;
    int64_t position = row * grid_.columns + column;
    return position < length ? item_ * length + position : -1;
  }
  const TileGrid& grid_;
  int64_t item_, row_, column_, step_ = 1, halo_row_, halo_column_ = 0;
};

constexpr int64_t GROUP = 2;           // panels of output channels that are finished together
constexpr int64_t MOST_TILES = 128;    // of a block
constexpr int64_t LEAST_TILES = 48;    // of a block: each reads all weights
constexpr int64_t LEAST_ALONE = 36;    // of a block that one thread computes
constexpr int64_t CACHE = 3 << 18;     // bytes that V and M of a block may take
constexpr int64_t WHOLE = 8 << 20;     // that V of all tiles of a thread may take where packed weights would take more

// Transformed weights from one output channel on: point p of them at u + p * stride, their scales at
// scales + p * scale_stride.
struct PackedWeights {
  float* u;
  int64_t stride;
  float* scales;
  int64_t scale_stride;
};

// The weights of a convolution. They are packed at each call: that costs little, and they may change.
struct Weights {
  const WinogradTransform& transform;
  const char* w;
  const float* factors;                                    // of int8 weights
  int64_t in_channels, taps, element_size, per_word, scratch_size;       // element_size: of w
  bool taps_first;                                         // w lies as (out, taps, in), not as (out, in, taps)

  Weights(const WinogradKernels& dtype, const WinogradTransform& transform, const at::Tensor& weight,
          const float* factors, int64_t x_element_size)
      : transform(transform), w(static_cast<const char*>(weight.const_data_ptr())), factors(factors),
        in_channels(weight.size(1)), taps(weight.numel() / (weight.size(0) * weight.size(1))),
        element_size(weight.element_size()), per_word(dtype.per_word),
        scratch_size(PANEL * in_channels * taps * x_element_size / 4), taps_first(!weight.is_contiguous()) {}

  // Panels [first, first + count) to the channels from which `to` counts. scratch: scratch_size floats.
  void pack(int64_t first, int64_t count, const PackedWeights& to, float* scratch) const {
    for (int64_t n = 0; n < count; n++) {
      const char* from = w + (first + n) * PANEL * in_channels * taps * element_size;
      transform.weight(from, factors == nullptr ? nullptr : factors + (first + n) * PANEL, in_channels, taps, taps_first,
                       to.u + n * PANEL * in_channels / per_word, to.stride, to.scales + n * PANEL, to.scale_stride,
                       scratch);
    }
  }
};

struct WinogradConvolution {
  const WinogradKernels& dtype;
  const WinogradTransform& transform;
  const TileGrid& grid;
  int64_t variant, in_channels, out_channels, element_size;
  const char *x, *residual, *zeros;
  const Weights& weights;
  const float* bias;
  float slope;
  char* y;

  int64_t in_words() const { return in_channels / dtype.per_word; }
  int64_t v_stride(int64_t tiles) const { return padded_stride(tiles * in_words()); }
  int64_t m_stride(int64_t tiles) const { return padded_stride(tiles * GROUP * PANEL); }

  // V, and the scales of its tiles.
  int64_t v_floats(int64_t tiles) const { return transform.points * (v_stride(tiles) + tiles); }

  void input(int64_t index, const TransformedTile& tile) const {
    const void* rows[MAX_INPUTS];
    TilePositions positions(transform, grid, variant, index);
    for (int o = 0, n = 0; o < transform.outer_inputs; o++) {
      for (int i = 0; i < transform.inner_inputs; i++, n++) {
        int64_t position = positions.input(o, i);
        rows[n] = position < 0 ? zeros : x + position * in_channels * element_size;
      }
    }
    transform.input(rows, in_channels, slope, tile);
  }

  // Output channels [first, first + count).
  void output(int64_t index, const TileSums& tile, int64_t first, int64_t count) const {
    const void* added[MAX_OUTPUTS];
    void* rows[MAX_OUTPUTS];
    TilePositions positions(transform, grid, variant, index);
    for (int o = 0, n = 0; o < transform.outer_outputs; o++) {
      for (int i = 0; i < transform.inner_outputs; i++, n++) {
        int64_t position = positions.output(o, i);
        int64_t offset = (std::max<int64_t>(position, 0) * out_channels + first) * element_size;
        rows[n] = position < 0 ? nullptr : y + offset;
        added[n] = residual + offset;
      }
    }
    transform.output(tile, count, bias == nullptr ? nullptr : bias + first, residual == nullptr ? nullptr : added,
                     rows);
  }

  // Tiles [begin, begin + tiles). Threads share the inputs, then the output channels, unless inside a parallel region.
  // packed: all weights; null: those of a group of panels are packed before they are used, and stay in cache.
  void block(int64_t begin, int64_t tiles, float* v, const PackedWeights* packed) const {
    int64_t stride = v_stride(tiles), groups = ceil_div(out_channels, GROUP * PANEL);
    float* scales = v + transform.points * stride;
    share(tiles, 4, [&](int64_t from, int64_t to) {
      static thread_local Scratch scratch;
      float* memory = scratch.get(transform.points * padded_stride(in_channels));
      for (int64_t n = from; n < to; n++) input(begin + n, {v + n * in_words(), scales + n, memory, stride, tiles});
    });
    share(groups, 1, [&](int64_t from, int64_t to) {
      static thread_local Scratch scratch, own_scratch;
      float* m = scratch.get(transform.points * m_stride(tiles));
      PackedWeights own{};
      if (packed == nullptr) own = space_for(GROUP * PANEL, own_scratch, weights.scratch_size);
      for (int64_t group = from; group < to; group++) {
        int64_t first = group * GROUP * PANEL, count = std::min(GROUP * PANEL, out_channels - first);
        if (packed == nullptr) {
          weights.pack(first / PANEL, count / PANEL, own, own.scales + transform.points * own.scale_stride);
          group_of_panels(begin, tiles, first, count, own, v, m);
        } else {
          PackedWeights part{packed->u + first * in_words(), packed->stride, packed->scales + first,
                             packed->scale_stride};
          group_of_panels(begin, tiles, first, count, part, v, m);
        }
      }
    });
  }

  // For the weights of `channels` output channels, and `more` floats after their scales.
  PackedWeights space_for(int64_t channels, Scratch& scratch, int64_t more) const {
    int64_t stride = padded_stride(in_words() * channels);
    float* u = scratch.get(transform.points * (stride + channels) + more);
    return {u, stride, u + transform.points * stride, channels};
  }

  void group_of_panels(int64_t begin, int64_t tiles, int64_t first, int64_t count, const PackedWeights& packed,
                       const float* v, float* m) const {
    int64_t vs = v_stride(tiles), ms = m_stride(tiles);
    const float* scales = v + transform.points * vs;
    for (int64_t point = 0; point < transform.points; point++) {
      const float* b = packed.u + point * packed.stride;
      dtype.gemm(tiles, in_words(), count / PANEL, v + point * vs, in_words(), b, m + point * ms, GROUP * PANEL,
                 point + 1 < transform.points ? b + packed.stride : nullptr);
    }
    for (int64_t n = 0; n < tiles; n++) {
      output(begin + n, {m + n * GROUP * PANEL, scales + n, packed.scales, ms, tiles, packed.scale_stride}, first,
             count);
    }
  }

  PackedWeights pack_all() const {
    static thread_local Scratch scratch;
    PackedWeights all = space_for(out_channels, scratch, 0);
    share(out_channels / PANEL, 1, [&](int64_t from, int64_t to) {
      static thread_local Scratch panel;
      weights.pack(from, to - from, {all.u + from * PANEL * in_words(), all.stride, all.scales + from * PANEL,
                                     all.scale_stride}, panel.get(weights.scratch_size));
    });
    return all;
  }

  void run() const {
    int64_t tiles = grid.tiles(), threads = at::get_num_threads();
    int64_t bytes = transform.points * 4 * (in_words() + GROUP * PANEL);     // of a tile
    int64_t most = std::clamp(CACHE / bytes, LEAST_TILES, MOST_TILES);
    int64_t blocks = ceil_div(tiles, most), even = std::max<int64_t>(1, (blocks + threads / 2) / threads) * threads;
    int64_t parts = tiles >= threads * MOST_TILES / 2 ? threads : 1;
    bool whole = tiles < out_channels && v_floats(ceil_div(tiles, parts)) * 4 <= WHOLE;
    if (whole) blocks = even = parts;
    bool alone = blocks > 1 && tiles >= even * LEAST_ALONE;                  // else all threads share each block
    if (alone) blocks = even;
    std::optional<PackedWeights> all;                      // where blocks are many, else each packs what it uses
    if (blocks > 1 && !whole) all = pack_all();
    auto work = [&](int64_t from, int64_t to) {
      static thread_local Scratch scratch;
      float* v = scratch.get(v_floats(ceil_div(tiles, blocks)));
      for (int64_t n = from; n < to; n++) {
        int64_t begin = tiles * n / blocks, end = tiles * (n + 1) / blocks;
        block(begin, end - begin, v, all.has_value() ? &*all : nullptr);
      }
    };
    if (alone) {
      share(blocks, 1, work);
    } else {
      work(0, blocks);
    }
  }
};

at::Tensor channels_last(const at::Tensor& x) {  // (B, C, T, F) or (B, C, N) with its channels last in memory
  int64_t last = x.dim() - 1;
  at::Tensor moved = x.movedim(1, last);
  return moved.is_contiguous() ? x : moved.contiguous().movedim(last, 1);
}

// Of a result whose channels are last in memory, in the order of memory.
c10::SymDimVector output_sizes(const at::Tensor& x, c10::SymInt channels, int64_t longer) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.erase(sizes.begin() + 1);
  sizes[1] += longer;
  sizes.push_back(channels);
  return sizes;
}

void check(const at::Tensor& x, const at::Tensor& weight, int64_t variant) {
  auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "x must be float32 or bfloat16, got ", type);
  TORCH_CHECK(x.dim() == (variant >= TAPS3 ? 3 : 4), "variant ", variant, " does not take ", x.sizes());
  TORCH_CHECK(weight.dim() == x.dim() && weight.size(1) == x.size(1), "weights ", weight.sizes(), " do not fit ",
              x.sizes());
  int64_t taps = weight.numel() / (weight.size(0) * weight.size(1));
  TORCH_CHECK(taps == (variant >= TAPS3 ? variant : 9), "variant ", variant, " does not take ", weight.sizes());
  TORCH_CHECK(x.size(1) % PANEL == 0 && weight.size(0) % PANEL == 0, "channels must be multiples of ", PANEL);
}

// scale: of each output channel of int8 weights. longer: positions that the result has beyond those of x, a sequence
// without dilation.
at::Tensor convolution(const at::Tensor& given, const at::Tensor& given_weight, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& given_residual, int64_t variant, int64_t dilation,
                       double slope, const std::optional<at::Tensor>& scale, int64_t longer) {
  bool wide = given.scalar_type() == at::kFloat;
  const WinogradKernels& dtype = wide ? kernels().winograd_float : kernels().winograd_bfloat16;
  const WinogradTransform& transform = transform_of(dtype, variant);
  check(given, given_weight, variant);
  std::optional<at::Tensor> factors = factors_of(given_weight, scale, given.scalar_type());
  TORCH_CHECK(longer == 0 || (longer > 0 && variant >= TAPS3 && dilation == 1), "a result cannot be ", longer,
              " longer");
  bool taps_first = given_weight.dim() == 3 && given_weight.mT().is_contiguous();
  at::Tensor x = channels_last(given), weight = taps_first ? given_weight : given_weight.contiguous();
  int64_t in_channels = given.size(1), out_channels = weight.size(0);
  Weights weights(dtype, transform, weight, float_data(factors), given.element_size());
  at::Tensor y = empty_result(C10_AS_INTARRAYREF_SLOW(output_sizes(x, out_channels, longer)), x.scalar_type())
                     .movedim(x.dim() - 1, 1);
  std::optional<at::Tensor> wide_bias = float_bias(bias), residual;
  if (given_residual.has_value()) {
    TORCH_CHECK(given_residual->sizes() == y.sizes() && given_residual->scalar_type() == x.scalar_type(),
                "residual must be ", y.sizes(), " in ", x.scalar_type());
    residual = channels_last(*given_residual);
  }
  TileGrid grid(transform, variant, x, dilation, longer);
  std::vector<float> zeros(in_channels);
  auto data = [](const at::Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); };
  WinogradConvolution{dtype, transform, grid, variant, in_channels, out_channels, x.element_size(),
                      data(x), residual.has_value() ? data(*residual) : nullptr,
                      reinterpret_cast<const char*>(zeros.data()), weights, float_data(wide_bias),
                      static_cast<float>(slope), static_cast<char*>(y.data_ptr())}.run();
  return y;
}

at::Tensor convolution_meta(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&, int64_t, int64_t, double,
                            const std::optional<at::Tensor>&, int64_t longer) {
  return at::empty_symint(output_sizes(x, weight.sym_size(0), longer), x.options()).movedim(x.dim() - 1, 1);
}

TORCH_LIBRARY_FRAGMENT(ldm2_cpu, library) {
  library.def(
      "convolution(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int variant, int dilation, float slope, "
      "Tensor? scale=None, int longer=0) -> Tensor");
}

TORCH_LIBRARY_IMPL(ldm2_cpu, CPU, library) {
  library.impl("convolution", convolution);
}

TORCH_LIBRARY_IMPL(ldm2_cpu, Meta, library) {
  library.impl("convolution", convolution_meta);
}

}  // namespace
}  // namespace ldm2
