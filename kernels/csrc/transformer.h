// What a block of a transformer shares with the operators that it is made of.
#pragma once

#include <utility>

#include "operators.h"

namespace ldm2 {

// The rows of a tensor (..., width): their first elements lie `stride` apart. A copy where that cannot be.
struct RowView {
  at::Tensor tensor;
  int64_t width, count, stride;

  explicit RowView(const at::Tensor& given) : tensor(given), width(given.size(-1)), count(given.numel() / width) {
    bool even = tensor.dim() > 1 && tensor.stride(-1) == 1;
    for (int64_t d = tensor.dim() - 3; even && d >= 0; d--) {
      even = tensor.stride(d) == tensor.size(d + 1) * tensor.stride(d + 1);
    }
    even = even && (tensor.element_size() == 4 || tensor.stride(-2) % 2 == 0);         // rows of whole words
    if (!even) tensor = tensor.contiguous();
    stride = even ? tensor.stride(-2) : width;
  }
};

// The rows [first, end) of a linear layer. x_size, y_size: bytes of a number.
inline Linear rows_of(const Linear& job, int64_t first, int64_t end, int64_t x_size, int64_t y_size) {
  Linear part = job;
  part.rows = end - first;
  part.x = static_cast<const char*>(job.x) + first * job.x_stride * x_size;
  part.y = static_cast<char*>(job.y) + first * job.width * y_size;
  if (job.residual != nullptr) part.residual = static_cast<const char*>(job.residual) + first * job.width * y_size;
  if (job.row_factors != nullptr) part.row_factors = job.row_factors + first;
  return part;
}

// compute(first row, its end, first unit of columns, its end) for all of them. Where there are many rows, each thread has
// its own: most that follows goes by rows as well. Else threads share the units, and rows are cut where some would have
// nothing to do, in parts of at least `fewest`: each part lays out its weights anew.
template <class Compute>
void share_out(int64_t rows, int64_t fewest, int64_t units, const Compute& compute) {
  int64_t threads = at::get_num_threads(), parts = 1;
  if (rows >= 5 * fewest * threads) {
    parts = threads;
  } else if (units % threads != 0) {
    parts = std::min(ceil_div(2 * threads, units), ceil_div(rows, fewest));
  }
  share(units * parts, 1, [&](int64_t from, int64_t to) {
    while (from < to) {
      int64_t part = from / units, unit = from % units, end = std::min(units, unit + to - from);
      compute(rows * part / parts, rows * (part + 1) / parts, unit, end);
      from += end - unit;
    }
  });
}

// A linear layer by all threads, two panels of columns at a time.
inline void multiply(const Linear& job, int64_t x_size, int64_t y_size,
                     void (*compute)(const Linear& job, int64_t first, int64_t end, float* scratch)) {
  int64_t panels = job.width / PANEL;
  share_out(job.rows, 48, ceil_div(panels, 2), [&](int64_t row, int64_t end_row, int64_t pair, int64_t end) {
    static thread_local Scratch scratch;
    compute(rows_of(job, row, end_row, x_size, y_size), 2 * pair, std::min(2 * end, panels),
            scratch.get(linear_scratch(job.depth)));
  });
}

// The rows of x as integers of 8 bits, with a scale each. They last until the next call in this thread.
struct RoundedRows {
  at::Tensor of;                                           // x
  int64_t count, depth;
  const uint8_t* values;                                   // int8_stride(depth) apart
  const float* scales;
};
RoundedRows round_rows(const at::Tensor& x);

// As `add_linear` in transformer.cpp, with int8 weights, of rounded rows.
at::Tensor add_linear_int8(const RoundedRows& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           bool gated, const std::optional<at::Tensor>& scale,
                           const std::optional<at::Tensor>& residual);

// The result of a linear layer of x, not initialized. A residual must be one that can be added to it.
inline at::Tensor empty_linear(const at::Tensor& x, int64_t width, bool gated,
                               const std::optional<at::Tensor>& residual) {
  auto type = x.scalar_type();
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = width;
  at::Tensor y = empty_result(sizes, type);
  TORCH_CHECK(!residual.has_value() || (residual->sizes() == y.sizes() && residual->scalar_type() == type &&
              residual->is_contiguous() && !gated), "residual must be ", y.sizes(), " in ", type);
  return y;
}

// The result of a linear layer of the meta device.
inline at::Tensor shape_of_linear(const at::Tensor& x, const at::Tensor& weight, bool gated) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = gated ? weight.sym_size(0) / 2 : weight.sym_size(0);
  return at::empty_symint(sizes, x.options());
}

std::pair<at::Tensor, at::Tensor> add_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& added,
                                                 const at::Tensor& weight, const at::Tensor& bias, double eps);

at::Tensor add_absorbed_attention(const at::Tensor& x, const at::Tensor& keys, const at::Tensor& values,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& offset,
                                  const std::optional<at::Tensor>& residual);

}  // namespace ldm2
