// What transformers are made of: linear layers, attention, and blocks of them.

#include "transformer.h"

namespace ldm2 {
namespace {

constexpr int64_t LEAST_DEPTH = 256;                       // below, sums cost more than they save

// Whether Strassen's algorithm takes a layer, and is faster. Rows are paired within an item of the batch, which has
// `rows` of them. How many items there are does not matter: what becomes of one does not depend on others.
bool suits(const StrassenKernels& strassen, const Linear& job, int64_t rows) {
  return strassen.multiply != nullptr && rows % 2 == 0 && rows >= strassen.rows_least && job.depth >= LEAST_DEPTH &&
         job.depth % (2 * PANEL) == 0 && job.width % strassen_unit(job.gated) == 0;
}

// A linear layer by Strassen's algorithm. Operands of x are made in pieces that the cache of all cores holds, shared by
// the threads. size: bytes of a number of x and y.
void multiply(const StrassenKernels& strassen, const Linear& given, int64_t size) {
  static thread_local Scratch shared;
  int64_t stride = strassen_stride(given.depth), pairs = given.rows / 2;
  int64_t blocks = ceil_div(4 * pairs * stride, STRASSEN_CACHE), most = ceil_div(pairs, blocks);
  float *operands = shared.get(most * (stride + 2)), *factors = operands + most * stride;
  for (int64_t block = 0; block < blocks; block++) {
    Linear job = rows_of(given, 2 * (pairs * block / blocks), 2 * (pairs * (block + 1) / blocks), size, size);
    share(job.rows / 2, 16, [&](int64_t first, int64_t end) {
      strassen.rows(job, first, end, operands, factors);
    });
    job.row_factors = factors;
    int64_t units = job.width / strassen_unit(job.gated), w_rows = job.gated ? 2 * job.width : job.width;
    share_out(job.rows / 2, 24, units, [&](int64_t pair, int64_t end_pair, int64_t unit, int64_t end) {
      static thread_local Scratch scratch;
      strassen.multiply(rows_of(job, 2 * pair, 2 * end_pair, size, size), unit, end, operands + pair * stride,
                        scratch.get(strassen_scratch(job.depth, w_rows)));
    });
  }
}

// gated: the first half of the weight's rows gives values, the GELU of the second half multiplies them.
// scale: of each output channel of int8 weights. residual: dense and as the result, to which it is added.
at::Tensor add_linear(const at::Tensor& x, const at::Tensor& given, const std::optional<at::Tensor>& bias, bool gated,
                      const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& residual) {
  auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "x must be float32 or bfloat16, got ", type);
  std::optional<at::Tensor> factors = factors_of(given, scale, type);
  TORCH_CHECK(type == at::kFloat || given.size(1) % 2 == 0, "bfloat16 takes an even number of inputs");
  TORCH_CHECK(given.dim() == 2 && given.size(0) % (gated ? 2 * PANEL : PANEL) == 0 && x.size(-1) == given.size(1) &&
              x.numel() > 0, "weight ", given.sizes(), " does not take ", x.sizes());
  int64_t width = given.size(0) / (gated ? 2 : 1);
  at::Tensor weight = given.contiguous();
  std::optional<at::Tensor> wide_bias = float_bias(bias);
  at::Tensor y = empty_linear(x, width, gated, residual);
  RowView rows(x);
  Linear job{rows.count, rows.width, width, rows.stride, rows.tensor.const_data_ptr(), weight.const_data_ptr(),
             float_data(factors), nullptr, float_data(wide_bias),
             residual.has_value() ? residual->const_data_ptr() : nullptr, y.data_ptr(), gated};
  bool wide = type == at::kFloat;
  const StrassenKernels& strassen = wide ? kernels().strassen_float : kernels().strassen_bfloat16;
  if (suits(strassen, job, rows.count / x.size(0))) {
    multiply(strassen, job, x.element_size());
  } else {
    multiply(job, x.element_size(), x.element_size(), wide ? kernels().linear_float : kernels().linear_bfloat16);
  }
  return y;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool gated,
                  const std::optional<at::Tensor>& scale) {
  return add_linear(x, weight, bias, gated, scale, std::nullopt);
}

at::Tensor linear_meta(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>&, bool gated,
                       const std::optional<at::Tensor>&) {
  return shape_of_linear(x, weight, gated);
}

// q (B, H, Q, D), k and v (B, H, L, D), D last in memory; bias (B or 1, 1, 1, L). The result lies in memory as
// (B, Q, H, D).
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const std::optional<at::Tensor>& bias) {
  auto type = q.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "attention takes float32 and bfloat16, not ", type);
  int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3), keys = k.size(2);
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(0) == batch && k.size(1) == heads && k.size(3) == width &&
              width % PANEL == 0, "attention does not take ", q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  for (const at::Tensor* tensor : {&q, &k, &v}) {
    TORCH_CHECK(tensor->scalar_type() == type && tensor->stride(3) == 1 && tensor->stride(2) % 2 == 0,
                "q, k and v must be of one dtype, with their last axis dense and rows of an even stride");
  }
  TORCH_CHECK(!bias.has_value() || (bias->scalar_type() == type && bias->dim() == 4 && bias->size(1) == 1 &&
              bias->size(2) == 1 && bias->size(3) == keys && (bias->size(0) == 1 || bias->size(0) == batch)),
              "the bias must be (B, 1, 1, L) in q's dtype");
  at::Tensor y = empty_result({batch, queries, heads, width}, type);
  // Each item of work lays out all keys and values of its head, so heads are cut only where threads would be idle.
  int64_t threads = at::get_num_threads();
  int64_t pieces = std::min(ceil_div(2 * threads, batch * heads), ceil_div(queries, 64));
  if (batch * heads % threads == 0) pieces = 1;
  auto at_row = [](const at::Tensor& tensor, int64_t b, int64_t h, int64_t row) {
    int64_t place = b * tensor.stride(0) + h * tensor.stride(1) + row * tensor.stride(2);
    return static_cast<const char*>(tensor.const_data_ptr()) + place * tensor.element_size();
  };
  share(batch * heads * pieces, 1, [&](int64_t from, int64_t to) {
    static thread_local Scratch scratch;
    float* memory = scratch.get(kernels().attention_scratch(keys, width));
    for (int64_t n = from; n < to; n++) {
      int64_t b = n / pieces / heads, h = n / pieces % heads;
      int64_t first = queries * (n % pieces) / pieces, end = queries * (n % pieces + 1) / pieces;
      Head head{end - first, keys, width, q.stride(2), k.stride(2), v.stride(2), 0, heads * width,
                at_row(q, b, h, first), at_row(k, b, h, 0), at_row(v, b, h, 0), nullptr,
                static_cast<char*>(y.data_ptr()) + ((b * queries + first) * heads + h) * width * y.element_size()};
      if (bias.has_value()) {
        head.bias = at_row(*bias, bias->size(0) == 1 ? 0 : b, 0, 0);
        head.bias_stride = bias->stride(3);
      }
      (type == at::kFloat ? kernels().attention_float : kernels().attention_bfloat16)(head, memory);
    }
  });
  return y.transpose(1, 2);
}

at::Tensor attention_meta(const at::Tensor& q, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&) {
  auto sizes = q.sym_sizes();
  return at::empty_symint({sizes[0], sizes[2], sizes[1], sizes[3]}, q.options()).transpose(1, 2);
}

// The layers of a block: parameters in the order that ldm2_kernels.cpu gives them, `next` at a time, and the scales of
// those that are int8 weights. rounded: which of them are multiplied with integers of 8 bits, none if it is empty.
class Parameters {
 public:
  Parameters(at::TensorList tensors, const c10::List<std::optional<at::Tensor>>& scales, c10::List<bool> rounded)
      : tensors_(tensors), scales_(scales), rounded_(std::move(rounded)) {}

  at::Tensor linear(const at::Tensor& x, bool bias, bool gated = false,
                    const std::optional<at::Tensor>& residual = std::nullopt) {
    std::optional<at::Tensor> scale = scales_.get(next_);
    bool rounded = !rounded_.empty() && rounded_.get(next_);
    const at::Tensor& weight = tensors_[next_++];
    std::optional<at::Tensor> added = bias ? std::optional(tensors_[next_++]) : std::nullopt;
    if (!rounded) return add_linear(x, weight, added, gated, scale, residual);
    if (!rows_.has_value() || !rows_->of.is_same(x)) rows_ = round_rows(x);
    return add_linear_int8(*rows_, weight, added, gated, scale, residual);
  }

  at::Tensor layer_norm(const at::Tensor& x, double eps) {
    next_ += 2;
    return add_layer_norm(x, std::nullopt, tensors_[next_ - 2], tensors_[next_ - 1], eps).second;
  }

  void skip(int64_t count) { next_ += count; }

  const at::Tensor& take() { return tensors_[next_++]; }

 private:
  at::TensorList tensors_;
  const c10::List<std::optional<at::Tensor>>& scales_;
  c10::List<bool> rounded_;
  std::optional<RoundedRows> rows_;                        // of the last input: queries, keys and values share theirs
  size_t next_ = 0;
};

constexpr size_t BLOCK_PARAMETERS = 20;

// x (B, L, C) as k * B rows, one after the other.
at::Tensor tile_batch(const at::Tensor& x, int64_t rows) {
  return x.size(0) == rows ? x : x.repeat({rows / x.size(0), 1, 1});
}

// x + self-attention, then + attention to keys and values (B', H, L, D), or such as add_absorbed_attention takes, or to
// itself again, then + the gated linear layers, each of the layer norm of what stands before it. B' is a multiple of
// x's B, and becomes that of the result.
at::Tensor transformer_block(const at::Tensor& given, at::TensorList tensors,
                             const c10::List<std::optional<at::Tensor>>& scales,
                             const std::optional<at::Tensor>& keys, const std::optional<at::Tensor>& values,
                             const std::optional<at::Tensor>& bias, bool absorbed, int64_t heads, double eps,
                             const c10::List<bool>& rounded) {
  TORCH_CHECK(tensors.size() == BLOCK_PARAMETERS && scales.size() == BLOCK_PARAMETERS, "a block has ",
              BLOCK_PARAMETERS, " parameters, got ", tensors.size());
  TORCH_CHECK(rounded.empty() || rounded.size() == BLOCK_PARAMETERS, "rounded must say so of each of ",
              BLOCK_PARAMETERS, " parameters or of none, got ", rounded.size());
  TORCH_CHECK(given.dim() == 3 && given.size(2) % heads == 0 && keys.has_value() == values.has_value(),
              "a block does not take ", given.sizes(), " in ", heads, " heads");
  TORCH_CHECK(keys.has_value() || !absorbed, "what is absorbed needs keys and values");
  Parameters parameters(tensors, scales, rounded);
  auto split = [&](const at::Tensor& x) { return x.view({x.size(0), x.size(1), heads, -1}).transpose(1, 2); };
  auto join = [](const at::Tensor& x) { return x.transpose(1, 2).flatten(2); };
  at::Tensor x = given.contiguous();
  for (bool crossing : {false, true}) {
    at::Tensor h = parameters.layer_norm(x, eps);
    if (crossing && absorbed) {
      parameters.skip(4);                                  // which made the keys and values, or are within them
      x = add_absorbed_attention(h, *keys, *values, bias, parameters.take(), x);
      continue;
    }
    at::Tensor q = parameters.linear(h, false), attended;
    if (crossing && keys.has_value()) {
      parameters.skip(2);                                  // which made the keys and values
      x = tile_batch(x, keys->size(0));
      attended = attention(split(tile_batch(q, keys->size(0))), *keys, *values, bias);
    } else {
      at::Tensor k = parameters.linear(h, false), v = parameters.linear(h, false);
      attended = attention(split(q), split(k), split(v), std::nullopt);
    }
    x = parameters.linear(join(attended), true, false, x);
  }
  at::Tensor h = parameters.linear(parameters.layer_norm(x, eps), true, true);
  return parameters.linear(h, true, false, x);
}

TORCH_LIBRARY_FRAGMENT(ldm2_cpu, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? bias, bool gated, Tensor? scale=None) -> Tensor");
  library.def("attention(Tensor q, Tensor k, Tensor v, Tensor? bias) -> Tensor");
  library.def(
      "transformer_block(Tensor x, Tensor[] parameters, Tensor?[] scales, Tensor? keys, Tensor? values, Tensor? bias, "
      "bool absorbed, int heads, float eps, bool[] rounded=[]) -> Tensor");
}

TORCH_LIBRARY_IMPL(ldm2_cpu, CPU, library) {
  library.impl("linear", linear);
  library.impl("attention", attention);
  library.impl("transformer_block", transformer_block);
}

TORCH_LIBRARY_IMPL(ldm2_cpu, Meta, library) {
  library.impl("linear", linear_meta);
  library.impl("attention", attention_meta);
}

}  // namespace
}  // namespace ldm2
