// Convolutions of stride 1 by minimal filtering, arXiv:1509.09308. Tiles of the map are transformed into V (points,
// tiles, C) and multiplied by U (points, C, O) into M (points, tiles, O), which is transformed back, a block of tiles at
// a time: V and M stay in cache.

#include "operators.h"

namespace ldm2 {
namespace {

// Which algorithm: 3x3 kernels on maps of any width or of width 2, one-dimensional kernels of 3, 7 and 11 taps.
enum Form : int64_t { WIDE = 0, NARROW = 1, TAPS3 = 3, TAPS7 = 7, TAPS11 = 11 };

const Scheme& scheme(int64_t form) {
  switch (form) {
    case WIDE: return kernels().conv3x3;
    case NARROW: return kernels().conv3x3_narrow;
    case TAPS3: return kernels().conv3;
    case TAPS7: return kernels().conv7;
    case TAPS11: return kernels().conv11;
    default: TORCH_CHECK(false, "unknown form of convolution ", form);
  }
}

// Numbers from one point to the next of `size` numbers each. Strides of a power of two would send all points of a tile
// to the same set of the cache, hence one cache line more.
int64_t apart(int64_t size) { return size + PANEL; }

// The map (T, F) that a form walks over; a sequence with dilation d is a map of d columns, each walked by itself.
struct Map {
  int64_t batch, rows, columns, length;  // length: positions in one item; column f of row t is position t * columns + f
  int64_t tile_rows, tile_columns;       // tiles in one item
  bool sequence;

  Map(const Scheme& s, int64_t form, int64_t batch, int64_t first, int64_t second, int64_t dilation)
      : batch(batch), sequence(form >= TAPS3) {
    length = sequence ? first : first * second;
    columns = sequence ? dilation : second;
    rows = ceil_div(length, columns);
    int64_t tall = sequence ? s.outer_outputs * s.inner_outputs : s.outer_outputs;
    tile_rows = ceil_div(rows, tall);
    tile_columns = sequence ? columns : ceil_div(columns, s.inner_outputs);
  }
  int64_t tiles() const { return batch * tile_rows * tile_columns; }
};

// Where tile `index` takes its inputs and leaves its outputs: positions counted over the batch, -1 outside the map.
class Places {
 public:
  Places(const Scheme& s, const Map& map, int64_t form, int64_t index) : map_(map) {
    int64_t column = index % map.tile_columns;
    int64_t row = index / map.tile_columns % map.tile_rows;
    first_ = index / (map.tile_columns * map.tile_rows) * map.length;
    if (map.sequence) {
      step_ = s.inner_outputs;
      row_ = row * s.outer_outputs * step_;
      column_ = column;
      halo_row_ = form / 2;
    } else {
      row_ = row * s.outer_outputs;
      column_ = column * s.inner_outputs;
      halo_row_ = 1;
      halo_column_ = form == WIDE;
    }
  }
  int64_t input(int outer, int inner) const {
    return map_.sequence ? at(row_ - halo_row_ + step_ * outer + inner, column_)
                         : at(row_ - halo_row_ + outer, column_ - halo_column_ + inner);
  }
  int64_t output(int outer, int inner) const {
    return map_.sequence ? at(row_ + step_ * outer + inner, column_) : at(row_ + outer, column_ + inner);
  }

 private:
  int64_t at(int64_t row, int64_t column) const {
    if (row < 0 || column < 0 || column >= map_.columns) return -1;
    int64_t position = row * map_.columns + column;
    return position < map_.length ? first_ + position : -1;
  }
  const Map& map_;
  int64_t first_, row_, column_, step_ = 1, halo_row_, halo_column_ = 0;
};

struct Job {
  const Scheme& scheme;
  const Map& map;
  int64_t form, in_channels, out_channels, u_stride;  // of the weights, from one point to the next
  const float *x, *u, *bias, *residual, *zeros;
  float slope;
  float* y;

  int64_t v_stride(int64_t tiles) const { return apart(tiles * in_channels); }
  int64_t m_stride(int64_t tiles) const { return apart(tiles * out_channels); }
  int64_t scratch(int64_t tiles) const { return scheme.points * (v_stride(tiles) + m_stride(tiles)); }

  void input(int64_t index, float* v, int64_t stride) const {
    const float* rows[MAX_INPUTS];
    Places places(scheme, map, form, index);
    for (int o = 0, n = 0; o < scheme.outer_inputs; o++) {
      for (int i = 0; i < scheme.inner_inputs; i++, n++) {
        int64_t place = places.input(o, i);
        rows[n] = place < 0 ? zeros : x + place * in_channels;
      }
    }
    scheme.input(rows, in_channels, slope, v, stride);
  }

  // Output channels [first, first + count).
  void output(int64_t index, const float* m, int64_t stride, int64_t first, int64_t count) const {
    const float* added[MAX_OUTPUTS];
    float* rows[MAX_OUTPUTS];
    Places places(scheme, map, form, index);
    for (int o = 0, n = 0; o < scheme.outer_outputs; o++) {
      for (int i = 0; i < scheme.inner_outputs; i++, n++) {
        int64_t place = places.output(o, i);
        rows[n] = place < 0 ? nullptr : y + place * out_channels + first;
        added[n] = residual + std::max<int64_t>(place, 0) * out_channels + first;
      }
    }
    scheme.output(m + first, stride, count, bias == nullptr ? nullptr : bias + first,
                  residual == nullptr ? nullptr : added, rows);
  }

  // Tiles [begin, begin + tiles). Threads share the inputs, then the output channels, unless inside a parallel region.
  void block(int64_t begin, int64_t tiles, float* buffer) const {
    int64_t vs = v_stride(tiles), ms = m_stride(tiles), panels = out_channels / PANEL;
    float *v = buffer, *m = buffer + scheme.points * vs;
    at::parallel_for(0, tiles, 1, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; n++) input(begin + n, v + n * in_channels, vs);
    });
    at::parallel_for(0, panels, 1, [&](int64_t from, int64_t to) {
      for (int64_t point = 0; point < scheme.points; point++) {
        kernels().gemm(tiles, in_channels, to - from, v + point * vs, in_channels,
                       u + point * u_stride + from * in_channels * PANEL, m + point * ms + from * PANEL,
                       out_channels);
      }
      for (int64_t n = 0; n < tiles; n++) {
        output(begin + n, m + n * out_channels, ms, from * PANEL, (to - from) * PANEL);
      }
    });
  }
};

constexpr int64_t BLOCK = 128;       // tiles: V and M of 128 channels take 5 MB, and weights are read once a block
constexpr int64_t LEAST_BLOCK = 32;  // tiles worth a thread of their own

void run(const Job& job) {
  int64_t tiles = job.map.tiles(), threads = at::get_num_threads();
  int64_t blocks = ceil_div(tiles, BLOCK), shared = ceil_div(blocks, threads) * threads;
  bool alone = tiles >= shared * LEAST_BLOCK;              // a block for each thread, else all threads on each block
  if (alone) blocks = shared;
  auto work = [&](int64_t from, int64_t to) {
    static thread_local Scratch scratch;
    float* buffer = scratch.get(job.scratch(ceil_div(tiles, blocks)));
    for (int64_t n = from; n < to; n++) {
      int64_t begin = tiles * n / blocks, end = tiles * (n + 1) / blocks;
      job.block(begin, end - begin, buffer);
    }
  };
  if (alone) {
    at::parallel_for(0, blocks, 1, work);
  } else {
    work(0, blocks);
  }
}

// Output channels are multiples of PANEL. stride: from one point to the next.
void pack_into(const at::Tensor& given, int64_t form, float* u, int64_t stride) {
  const Scheme& s = scheme(form);
  at::Tensor weight = given.contiguous();
  int64_t outs = weight.size(0), ins = weight.size(1), panels = outs / PANEL;
  int kernel = static_cast<int>(weight.numel() / (outs * ins));
  std::vector<int> taps;
  for (int t = 0; t < s.outer_taps * s.inner_taps; t++) taps.push_back(t < kernel ? t : -1);
  const float* w = weight.const_data_ptr<float>();
  at::parallel_for(0, panels, 1, [&](int64_t from, int64_t to) {
    for (int64_t panel = from; panel < to; panel++) {
      for (int64_t c = 0; c < ins; c++) {
        const float* rows[PANEL];
        for (int64_t lane = 0; lane < PANEL; lane++) rows[lane] = w + ((panel * PANEL + lane) * ins + c) * kernel;
        s.weight(rows, taps.data(), u + (panel * ins + c) * PANEL, stride);
      }
    }
  });
}

void check_weight(const at::Tensor& weight, int64_t form) {
  TORCH_CHECK(weight.scalar_type() == at::kFloat, "weights must be float32, got ", weight.scalar_type());
  int64_t kernel = weight.numel() / (weight.size(0) * weight.size(1));
  TORCH_CHECK(kernel == (form >= TAPS3 ? form : 9), "form ", form, " does not take ", weight.sizes());
}

at::Tensor dense(const at::Tensor& x) {  // (B, C, T, F) or (B, C, N) with its channels last in memory
  int64_t last = x.dim() - 1;
  at::Tensor moved = x.movedim(1, last);
  return moved.is_contiguous() ? x : moved.contiguous().movedim(last, 1);
}

const float* data(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

at::Tensor empty_output(const at::Tensor& x, c10::SymInt channels) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.erase(sizes.begin() + 1);
  sizes.push_back(channels);
  return at::empty_symint(sizes, x.options()).movedim(x.dim() - 1, 1);
}

// The weight is packed at each call, into memory that the thread keeps: that costs next to nothing, and it may change.
at::Tensor convolution(const at::Tensor& given, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& given_residual, int64_t form, int64_t dilation, double slope) {
  const Scheme& s = scheme(form);
  TORCH_CHECK(given.dim() == (form >= TAPS3 ? 3 : 4), "form ", form, " does not take ", given.sizes());
  TORCH_CHECK(given.scalar_type() == at::kFloat, "x must be float32, got ", given.scalar_type());
  check_weight(weight, form);
  int64_t channels = given.size(1), outs = weight.size(0);
  TORCH_CHECK(weight.size(1) == channels, "weights ", weight.sizes(), " do not fit ", given.sizes());
  TORCH_CHECK(channels % PANEL == 0 && outs % PANEL == 0, "channels must be multiples of ", PANEL);
  static thread_local Scratch scratch;
  int64_t u_stride = apart(channels * outs);
  float* u = scratch.get(s.points * u_stride);
  pack_into(weight, form, u, u_stride);
  at::Tensor x = dense(given), y = empty_output(x, outs);
  std::optional<at::Tensor> residual, shift;
  if (bias.has_value()) shift = bias->contiguous();
  if (given_residual.has_value()) {
    TORCH_CHECK(given_residual->sizes() == y.sizes(), "residual must be ", y.sizes());
    residual = dense(*given_residual);
  }
  Map map(s, form, x.size(0), x.size(2), x.dim() == 4 ? x.size(3) : 1, dilation);
  std::vector<float> zeros(channels);
  run({s, map, form, channels, outs, u_stride, x.const_data_ptr<float>(), u, data(shift), data(residual),
       zeros.data(), static_cast<float>(slope), y.data_ptr<float>()});
  return y;
}

at::Tensor convolution_meta(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&, int64_t, int64_t, double) {
  return empty_output(x, weight.sym_size(0));
}

TORCH_LIBRARY_FRAGMENT(ldm2_cpu, library) {
  library.def(
      "convolution(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int form, int dilation, float slope) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(ldm2_cpu, CPU, library) {
  library.impl("convolution", convolution);
}

TORCH_LIBRARY_IMPL(ldm2_cpu, Meta, library) {
  library.impl("convolution", convolution_meta);
}

}  // namespace
}  // namespace ldm2
