// Layer and group normalization.

#include <ATen/ops/empty_like.h>

#include "transformer.h"

namespace ldm2 {

// x (..., D) and `added` lie densely. The sum is undefined without `added`.
std::pair<at::Tensor, at::Tensor> add_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& added,
                                                 const at::Tensor& weight, const at::Tensor& bias, double eps) {
  auto type = x.scalar_type();
  int64_t width = x.size(-1), rows = x.numel() / width;
  bool wide = type == at::kFloat;
  TORCH_CHECK(wide || type == at::kBFloat16, "x must be float32 or bfloat16, got ", type);
  TORCH_CHECK(width % PANEL == 0 && x.is_contiguous(), "rows must be multiples of ", PANEL, " and dense, got ",
              x.sizes());
  for (const at::Tensor* tensor : {&weight, &bias}) {
    TORCH_CHECK(tensor->scalar_type() == type && tensor->numel() == width && tensor->is_contiguous(),
                "weight and bias must be ", width, " numbers in ", type);
  }
  TORCH_CHECK(!added.has_value() || (added->scalar_type() == type && added->sizes() == x.sizes() &&
              added->is_contiguous()), "what is added must be as x");
  at::Tensor sum = added.has_value() ? empty_result(x.sizes(), type) : at::Tensor();
  at::Tensor y = empty_result(x.sizes(), type);
  LayerNorm job{width, x.const_data_ptr(), added.has_value() ? added->const_data_ptr() : nullptr,
                weight.const_data_ptr(), bias.const_data_ptr(), static_cast<float>(eps),
                added.has_value() ? sum.data_ptr() : nullptr, y.data_ptr()};
  const NormKernels& norms = wide ? kernels().norm_float : kernels().norm_bfloat16;
  share(rows, 16, [&](int64_t from, int64_t to) {
    static thread_local Scratch scratch;
    norms.layer_norm(job, from, to, scratch.get(width));
  });
  return {sum, y};
}

namespace {

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  return add_layer_norm(x, std::nullopt, weight, bias, eps).second;
}

std::tuple<at::Tensor, at::Tensor> layer_norm_of_sum(const at::Tensor& x, const at::Tensor& added,
                                                     const at::Tensor& weight, const at::Tensor& bias, double eps) {
  auto [sum, y] = add_layer_norm(x, added, weight, bias, eps);
  return {sum, y};
}

at::Tensor layer_norm_meta(const at::Tensor& x, const at::Tensor&, const at::Tensor&, double) {
  return at::empty_symint(x.sym_sizes(), x.options());
}

std::tuple<at::Tensor, at::Tensor> layer_norm_of_sum_meta(const at::Tensor& x, const at::Tensor&, const at::Tensor&,
                                                          const at::Tensor&, double) {
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint(x.sym_sizes(), x.options())};
}

// A channel's part of the statistics of its group: those of x - pivot, over `positions`.
struct ChannelSums {
  int64_t positions;
  const float *pivots, *sums, *squares, *shifts;           // shifts: null, or what is added to x

  double mean(int64_t c) const {
    return pivots[c] + sums[c] / static_cast<double>(positions) + (shifts == nullptr ? 0.0f : shifts[c]);
  }
  // The sum of the squares of deviations from that mean.
  double spread(int64_t c) const {
    return std::max(0.0, squares[c] - static_cast<double>(sums[c]) * sums[c] / positions);
  }
};

// y = x * factor + shift is the normalization of channels [first, end), which are a group: arXiv:1803.08494 section 3.
void group_factors(const ChannelSums& sums, int64_t first, int64_t end, const float* weight, const float* bias,
                   double eps, float* factors, float* shifts) {
  double mean = 0, spread = 0, positions = sums.positions;
  for (int64_t c = first; c < end; c++) mean += sums.mean(c) / (end - first);
  for (int64_t c = first; c < end; c++) {
    double offset = sums.mean(c) - mean;
    spread += sums.spread(c) + positions * offset * offset;
  }
  double factor = 1 / std::sqrt(spread / (positions * (end - first)) + eps);
  for (int64_t c = first; c < end; c++) {
    factors[c] = static_cast<float>(factor * weight[c]);
    double added = sums.shifts == nullptr ? 0.0f : sums.shifts[c];
    shifts[c] = static_cast<float>(bias[c] + (added - mean) * factor * weight[c]);
  }
}

constexpr int64_t PART = 512;          // positions that a thread takes: whatever their number, the sums are the same

// x (B, C, T, F) with its channels last in memory; shift (B or 1, C), added to x first; activate: SiLU of the result.
at::Tensor group_norm(const at::Tensor& x, int64_t groups, const at::Tensor& given_weight,
                      const at::Tensor& given_bias, double eps, const std::optional<at::Tensor>& shift,
                      bool activate) {
  auto type = x.scalar_type();
  bool wide = type == at::kFloat;
  TORCH_CHECK(wide || type == at::kBFloat16, "x must be float32 or bfloat16, got ", type);
  TORCH_CHECK(x.dim() == 4 && x.movedim(1, 3).is_contiguous(), "x must be (B, C, T, F), channels last in memory");
  int64_t batch = x.size(0), channels = x.size(1), positions = x.size(2) * x.size(3);
  TORCH_CHECK(channels % PANEL == 0 && groups > 0 && channels % groups == 0 && given_weight.numel() == channels &&
              given_bias.numel() == channels, "group_norm does not take ", x.sizes(), " in ", groups, " groups");
  TORCH_CHECK(!shift.has_value() || (shift->dim() == 2 && shift->size(1) == channels &&
              (shift->size(0) == 1 || shift->size(0) == batch)), "the shift must be (B or 1, C)");
  const NormKernels& norms = wide ? kernels().norm_float : kernels().norm_bfloat16;
  at::Tensor weight = *float_bias(given_weight), bias = *float_bias(given_bias);
  at::Tensor y = empty_result({batch, x.size(2), x.size(3), channels}, type).movedim(3, 1);
  at::Tensor pivots = x.select(2, 0).select(2, 0).to(at::kFloat).contiguous();            // (B, C)
  std::optional<at::Tensor> shifts = float_bias(shift);
  int64_t parts = ceil_div(positions, PART), size = channels * x.element_size();
  auto at_position = [&](const void* data, int64_t b, int64_t position) {
    return static_cast<const char*>(data) + (b * positions + position) * size;
  };
  std::vector<float> sums(batch * parts * 2 * channels), scales(batch * 2 * channels);
  share(batch * parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++) {
      int64_t b = n / parts, begin = positions * (n % parts) / parts, end = positions * (n % parts + 1) / parts;
      norms.channel_sums(at_position(x.const_data_ptr(), b, begin), end - begin, channels,
                         pivots.const_data_ptr<float>() + b * channels, &sums[n * 2 * channels]);
    }
  });
  for (int64_t b = 0; b < batch; b++) {
    float* total = &sums[b * parts * 2 * channels];
    for (int64_t i = 2 * channels; i < parts * 2 * channels; i++) total[i % (2 * channels)] += total[i];
    const float* added = float_data(shifts);
    if (added != nullptr && shifts->size(0) > 1) added += b * channels;
    ChannelSums of_item{positions, pivots.const_data_ptr<float>() + b * channels, total, total + channels, added};
    for (int64_t first = 0; first < channels; first += channels / groups) {
      group_factors(of_item, first, first + channels / groups, weight.const_data_ptr<float>(),
                    bias.const_data_ptr<float>(), eps, &scales[b * 2 * channels], &scales[b * 2 * channels + channels]);
    }
  }
  share(batch * parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++) {
      int64_t b = n / parts, begin = positions * (n % parts) / parts, end = positions * (n % parts + 1) / parts;
      const float* factors = &scales[b * 2 * channels];
      norms.scale_channels(at_position(x.const_data_ptr(), b, begin), end - begin, channels, factors,
                           factors + channels, activate, const_cast<char*>(at_position(y.data_ptr(), b, begin)));
    }
  });
  return y;
}

at::Tensor group_norm_meta(const at::Tensor& x, int64_t, const at::Tensor&, const at::Tensor&, double,
                           const std::optional<at::Tensor>&, bool) {
  return at::empty_like(x);
}

TORCH_LIBRARY_FRAGMENT(ldm2_cpu, library) {
  library.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  library.def("add_layer_norm(Tensor x, Tensor added, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)");
  library.def("group_norm(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? shift, bool activate) "
              "-> Tensor");
}

TORCH_LIBRARY_IMPL(ldm2_cpu, CPU, library) {
  library.impl("layer_norm", layer_norm);
  library.impl("add_layer_norm", layer_norm_of_sum);
  library.impl("group_norm", group_norm);
}

TORCH_LIBRARY_IMPL(ldm2_cpu, Meta, library) {
  library.impl("layer_norm", layer_norm_meta);
  library.impl("add_layer_norm", layer_norm_of_sum_meta);
  library.impl("group_norm", group_norm_meta);
}

}  // namespace
}  // namespace ldm2
