// What a block of a transformer shares with the operators that it is made of.
#pragma once

#include <utility>

#include "operators.h"

namespace ldm2 {

std::pair<at::Tensor, at::Tensor> add_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& added,
                                                 const at::Tensor& weight, const at::Tensor& bias, double eps);

at::Tensor add_absorbed_attention(const at::Tensor& x, const at::Tensor& keys, const at::Tensor& values,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& offset,
                                  const std::optional<at::Tensor>& residual);

}  // namespace ldm2
