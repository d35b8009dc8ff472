// What the operators share: the kernels in use, and memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace ldm2 {

const Kernels& kernels();  // of the instruction set in use

// A bias as dense float32, whatever its dtype.
inline std::optional<at::Tensor> float_bias(const std::optional<at::Tensor>& bias) {
  if (!bias.has_value()) return std::nullopt;
  return bias->to(at::kFloat).contiguous();
}

// What the output channels of weights of integers of 8 bits are multiplied with; none for other weights.
inline std::optional<at::Tensor> factors_of(const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                                            at::ScalarType type) {
  bool integers = weight.scalar_type() == at::kChar;
  TORCH_CHECK(integers || weight.scalar_type() == type, "x and weight must both be ", type,
              ", or the weight int8 with a scale, got ", weight.scalar_type());
  TORCH_CHECK(integers == scale.has_value(), "int8 weights need a scale, and no others have one");
  if (!integers) return std::nullopt;
  TORCH_CHECK(scale->scalar_type() == at::kFloat && scale->numel() == weight.size(0), "the scale must be ",
              weight.size(0), " numbers in float32, got ", scale->sizes(), " in ", scale->scalar_type());
  return scale->contiguous();
}

inline const float* float_data(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

}  // namespace ldm2
