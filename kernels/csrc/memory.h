// Memory for the operators: scratch and results. Fresh pages from the system cost as much as the work on them, so that
// of both is kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace ldm2 {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

constexpr int64_t HUGE_PAGE = 2 << 20;

// At least so many bytes, as huge pages if they are a multiple of them: products walk through more small pages than the
// processor has addresses of. Throws if there are none.
Memory allocate(int64_t bytes);

// Memory that a thread keeps from call to call. Its contents are lost.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      int64_t unit = floats * 4 < HUGE_PAGE ? 64 : HUGE_PAGE, bytes = ceil_div(floats * 4, unit) * unit;
      memory_ = allocate(bytes);
      size_ = bytes / 4;
    }
    return static_cast<float*>(memory_.get());
  }

 private:
  Memory memory_;
  int64_t size_ = 0;
};

// A dense tensor on the CPU, not initialized. The memory of large results which are gone serves new ones, and goes back
// to the system if nobody needs it for a while.
at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType type);

}  // namespace ldm2
