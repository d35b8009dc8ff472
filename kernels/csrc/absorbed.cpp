// Attention to few positions, with the projections of queries and outputs within keys and values.

#include "transformer.h"

namespace ldm2 {
namespace {

constexpr int64_t BLOCK = 2 * PANEL;                       // queries that a kernel takes together

// Positions that have any weight. Those after the last whose bias is not far below the largest, as a mask's is, have
// none.
int64_t positions_of(const float* bias, int64_t count) {
  constexpr float FAR = 5000.0f;
  float largest = *std::max_element(bias, bias + count);
  while (count > 1 && bias[count - 1] < largest - FAR) count--;
  return count;
}

void check_absorbed(const at::Tensor& x, const at::Tensor& k, const at::Tensor& v,
                    const std::optional<at::Tensor>& bias, const at::Tensor& offset) {
  auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "x must be float32 or bfloat16, got ", type);
  TORCH_CHECK(x.dim() == 3 && k.dim() == 4 && x.numel() > 0 && k.numel() > 0, "absorbed attention does not take ",
              x.sizes(), " and keys ", k.sizes());
  int64_t images = k.size(0), heads = k.size(1), length = k.size(2), channels = x.size(2);
  TORCH_CHECK(k.size(3) == channels && v.sizes() == at::IntArrayRef({images, channels, heads, length}) &&
              k.scalar_type() == type && v.scalar_type() == type && images % x.size(0) == 0 &&
              channels % PANEL == 0 && offset.numel() == channels, "absorbed attention does not take ", x.sizes(),
              ", ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK(type == at::kFloat || length * heads % 2 == 0, "bfloat16 takes an even number of keys");
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 4 && bias->size(1) == 1 && bias->size(2) == 1 &&
              bias->size(3) == length && (bias->size(0) == 1 || bias->size(0) == images)),
              "the bias must be (B, 1, 1, L)");
}

}  // namespace

// x (B, N, C) and residual of as many or fewer images, which then are taken in turn; keys (B', H, L, C), values
// (B', C, H, L), bias (B' or 1, 1, 1, L), offset (C). B' is a multiple of both B, and becomes that of the result. Keys
// and values with positions before heads in memory are not copied.
at::Tensor add_absorbed_attention(const at::Tensor& given, const at::Tensor& keys, const at::Tensor& values,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& offset,
                                  const std::optional<at::Tensor>& residual) {
  check_absorbed(given, keys, values, bias, offset);
  at::Tensor x = given.contiguous(), k = keys.transpose(1, 2).contiguous(), v = values.transpose(2, 3).contiguous();
  int64_t images = k.size(0), length = k.size(1), heads = k.size(2), queries = x.size(1), channels = x.size(2);
  std::optional<at::Tensor> wide_bias = float_bias(bias), wide_offset = float_bias(offset);
  at::Tensor y = empty_result({images, queries, channels}, x.scalar_type());
  bool wide = x.scalar_type() == at::kFloat;
  auto at_row = [&](const at::Tensor& tensor, int64_t image, int64_t row) {           // of `channels` numbers
    int64_t place = image % tensor.size(0) * (tensor.stride(0) / channels) + row;
    return static_cast<const char*>(tensor.const_data_ptr()) + place * channels * x.element_size();
  };
  // What a piece costs depends on how many positions of its image count.
  int64_t blocks = ceil_div(queries, BLOCK), pieces = std::min<int64_t>(4 * at::get_num_threads(), blocks);
  share(images * pieces, 1, [&](int64_t from, int64_t to) {
    static thread_local Scratch scratch;
    float* memory = scratch.get(kernels().absorbed_scratch(channels, heads, length));
    for (int64_t n = from; n < to; n++) {
      int64_t image = n / pieces, first = blocks * (n % pieces) / pieces * BLOCK;
      int64_t end = std::min(queries, blocks * (n % pieces + 1) / pieces * BLOCK);
      const float* row = bias.has_value() ? float_data(wide_bias) + image % bias->size(0) * length : nullptr;
      Absorbed job{end - first, channels, heads, row == nullptr ? length : positions_of(row, length), length * heads,
                   at_row(x, image, first), at_row(k, image, 0), at_row(v, image, 0), row, float_data(wide_offset),
                   residual.has_value() ? at_row(*residual, image, first) : nullptr,
                   static_cast<char*>(y.data_ptr()) + (image * queries + first) * channels * x.element_size()};
      (wide ? kernels().absorbed_float : kernels().absorbed_bfloat16)(job, memory);
    }
  });
  return y;
}

namespace {

at::Tensor absorbed_attention(const at::Tensor& x, const at::Tensor& keys, const at::Tensor& values,
                              const std::optional<at::Tensor>& bias, const at::Tensor& offset) {
  return add_absorbed_attention(x, keys, values, bias, offset, std::nullopt);
}

at::Tensor absorbed_attention_meta(const at::Tensor& x, const at::Tensor& keys, const at::Tensor&,
                                   const std::optional<at::Tensor>&, const at::Tensor&) {
  return at::empty_symint({keys.sym_size(0), x.sym_size(1), x.sym_size(2)}, x.options());
}

TORCH_LIBRARY_FRAGMENT(ldm2_cpu, library) {
  library.def("absorbed_attention(Tensor x, Tensor keys, Tensor values, Tensor? bias, Tensor offset) -> Tensor");
}

TORCH_LIBRARY_IMPL(ldm2_cpu, CPU, library) { library.impl("absorbed_attention", absorbed_attention); }

TORCH_LIBRARY_IMPL(ldm2_cpu, Meta, library) { library.impl("absorbed_attention", absorbed_attention_meta); }

}  // namespace
}  // namespace ldm2
