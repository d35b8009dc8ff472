// What the operators share: the kernels in use, and scratch memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"

namespace ldm2 {

const Kernels& kernels();  // of the instruction set in use

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Memory that a thread keeps from call to call: fresh pages cost as much as the work on them. Its contents are lost.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      int64_t unit = floats * 4 < HUGE_PAGE ? 64 : HUGE_PAGE, bytes = ceil_div(floats * 4, unit) * unit;
      memory_.reset(static_cast<float*>(std::aligned_alloc(unit, bytes)));
      TORCH_CHECK(memory_ != nullptr, "out of memory for ", floats, " floats of scratch space");
      size_ = bytes / 4;
#if defined(__linux__)
      // Products walk through more pages than the processor has addresses of: a tenth faster with 512 times fewer.
      if (unit == HUGE_PAGE) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t HUGE_PAGE = 2 << 20;
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace ldm2
