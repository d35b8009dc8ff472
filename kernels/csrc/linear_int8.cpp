// Linear layers in integers of 8 bits: int8 weights, and rows of x that are rounded at run time.

#include "transformer.h"

namespace ldm2 {

RoundedRows round_rows(const at::Tensor& x) {
  static thread_local Scratch scratch;
  auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "x must be float32 or bfloat16, got ", type);
  RowView rows(x);
  TORCH_CHECK(rows.count > 0 && rows.width > 0 && rows.width <= INT8_DEPTH, "rows of 1 to ", INT8_DEPTH,
              " numbers are rounded, not ", x.sizes());
  int64_t padded = int8_stride(rows.width), size = x.element_size();
  float* memory = scratch.get(rows.count * (padded / 4 + 1));                // values, then scales
  Rounding job{rows.width, rows.stride, rows.tensor.const_data_ptr(), reinterpret_cast<uint8_t*>(memory),
               memory + rows.count * padded / 4};
  auto compute = type == at::kFloat ? kernels().round_float : kernels().round_bfloat16;
  share(rows.count, ceil_div(1 << 14, rows.width), [&](int64_t from, int64_t to) {
    compute(job, from, to);
  });
  return {x, rows.count, rows.width, job.rows, job.scales};
}

at::Tensor add_linear_int8(const RoundedRows& x, const at::Tensor& given, const std::optional<at::Tensor>& bias,
                           bool gated, const std::optional<at::Tensor>& scale,
                           const std::optional<at::Tensor>& residual) {
  auto type = x.of.scalar_type();
  TORCH_CHECK(given.scalar_type() == at::kChar, "the weight must be int8, got ", given.scalar_type());
  at::Tensor factors = *factors_of(given, scale, type), weight = given.contiguous();
  TORCH_CHECK(given.dim() == 2 && given.size(0) % (gated ? 2 * PANEL : PANEL) == 0 && x.depth == given.size(1),
              "weight ", given.sizes(), " does not take ", x.of.sizes());
  int64_t width = given.size(0) / (gated ? 2 : 1);
  std::optional<at::Tensor> wide_bias = float_bias(bias);
  at::Tensor y = empty_linear(x.of, width, gated, residual);
  Linear job{x.count, x.depth, width, int8_stride(x.depth), x.values, weight.const_data_ptr(),
             factors.const_data_ptr<float>(), x.scales, float_data(wide_bias),
             residual.has_value() ? residual->const_data_ptr() : nullptr, y.data_ptr(), gated};
  auto compute = type == at::kFloat ? kernels().linear_int8_float : kernels().linear_int8_bfloat16;
  multiply(job, 1, y.element_size(), compute);
  return y;
}

namespace {

at::Tensor linear_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& bias, bool gated) {
  return add_linear_int8(round_rows(x), weight, bias, gated, scale, std::nullopt);
}

at::Tensor linear_int8_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor&,
                            const std::optional<at::Tensor>&, bool gated) {
  return shape_of_linear(x, weight, gated);
}

TORCH_LIBRARY_FRAGMENT(ldm2_cpu, library) {
  library.def("linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool gated) -> Tensor");
}

TORCH_LIBRARY_IMPL(ldm2_cpu, CPU, library) { library.impl("linear_int8", linear_int8); }

TORCH_LIBRARY_IMPL(ldm2_cpu, Meta, library) { library.impl("linear_int8", linear_int8_meta); }

}  // namespace
}  // namespace ldm2
