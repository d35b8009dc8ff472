// What the operators share: the kernels in use, and scratch memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"

namespace ldm2 {

const Kernels& kernels();  // of the instruction set in use

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps from call to call: fresh pages cost as much as the work on them. Its contents are lost.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, ceil_div(floats * sizeof(float), 64) * 64)));
      size_ = memory_ == nullptr ? 0 : floats;
      TORCH_CHECK(memory_ != nullptr, "out of memory for ", floats, " floats of scratch space");
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace ldm2
