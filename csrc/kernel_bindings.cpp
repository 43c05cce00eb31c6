// The CPU kernels behind `beit_fast.kernels`. They take torch tensors without knowing torch: contiguous float32 tensors
// on a CPU, by address. Whatever else they are handed is refused.
#include "kernel_bindings.h"

#include <stdexcept>
#include <string>

#include "attention_scores.h"
#include "gelu.h"
#include "multiversion.h"
#include "parallel.h"
#include "residual_norm.h"
#include "row_pieces.h"

namespace py = pybind11;

namespace beit_fast {
namespace {

using Size = std::int64_t;

#if defined(__x86_64__)
constexpr bool kHasVectors = BEIT_FAST_HAS_VERSIONS;  // the plain build has SSE2 only
#else
constexpr bool kHasVectors = true;
#endif

// The memory of a tensor of `count` elements, null for None.
template <typename Element>
Element* memory(const py::object& tensor, const char* name, Size count) {
  if (tensor.is_none()) return nullptr;
  const bool is_float = tensor.attr("is_floating_point")().cast<bool>();
  if (!tensor.attr("is_cpu").cast<bool>() || !tensor.attr("is_contiguous")().cast<bool>() ||
      tensor.attr("element_size")().cast<std::size_t>() != sizeof(Element) || is_float != std::is_same_v<Element, float> ||
      tensor.attr("numel")().cast<Size>() != count) {
    throw std::invalid_argument(std::string(name) + " must be a contiguous " + (sizeof(Element) == 4 ? "float32" : "int64") +
                                " tensor of " + std::to_string(count) + " elements on a CPU");
  }
  return reinterpret_cast<Element*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
}

float* floats(const py::object& tensor, const char* name, Size count) { return memory<float>(tensor, name, count); }

Size size(const py::object& tensor, Size dimension) { return tensor.attr("size")(dimension).cast<Size>(); }

void py_bias_gelu(const py::object& x, const py::object& bias, const py::object& value, const py::object& derivative,
                  Size threads) {
  const Size count = x.attr("numel")().cast<Size>(), width = size(x, -1);
  const float* const inputs[] = {floats(x, "x", count), floats(bias, "bias", width)};
  float* const outputs[] = {floats(value, "value", count), floats(derivative, "derivative", count)};
  py::gil_scoped_release release;
  bias_gelu(inputs[0], inputs[1], width ? count / width : 0, width, outputs[0], outputs[1], threads);
}

void py_bias_gelu_backward(const py::object& grad, const py::object& derivative, const py::object& grad_x,
                           const py::object& sums, Size threads) {
  const Size count = grad.attr("numel")().cast<Size>(), width = size(grad, -1), rows = width ? count / width : 0;
  const float* const inputs[] = {floats(grad, "grad", count), floats(derivative, "derivative", count)};
  float* const outputs[] = {floats(grad_x, "grad_x", count), floats(sums, "sums", pieces_of(rows) * width)};
  py::gil_scoped_release release;
  bias_gelu_backward(inputs[0], inputs[1], rows, width, outputs[0], outputs[1], threads);
}

ResidualShape residual_shape(const py::object& stream, const py::object& gamma, const py::object& drop_path,
                             const py::object& branch_bias, const py::object& kept) {
  ResidualShape shape{};
  shape.batch = size(stream, 0), shape.tokens = size(stream, 1), shape.width = size(stream, 2);
  shape.num_kept = kept.is_none() ? shape.batch : kept.attr("numel")().cast<Size>();
  shape.kept = memory<Size>(kept, "kept", shape.num_kept);
  shape.gamma = floats(gamma, "gamma", shape.width);
  shape.drop_path = floats(drop_path, "drop_path", shape.batch);
  shape.branch_bias = floats(branch_bias, "branch_bias", shape.width);
  for (Size k = 0; shape.kept && k < shape.num_kept; ++k) {
    if (shape.kept[k] < 0 || shape.kept[k] >= shape.batch) throw std::invalid_argument("kept must be indices of samples");
  }
  return shape;
}

void py_residual_norm(const py::object& x, const py::object& branch, const py::object& gamma, const py::object& drop_path,
                      const py::object& branch_bias, const py::object& kept, const py::object& weight,
                      const py::object& bias, float eps, const py::object& total, const py::object& normed,
                      const py::object& mean, const py::object& rstd, Size threads) {
  const ResidualShape shape = residual_shape(x, gamma, drop_path, branch_bias, kept);
  const Size rows = shape.batch * shape.tokens, count = rows * shape.width;
  const float* const inputs[] = {floats(x, "x", count),
                                 floats(branch, "branch", shape.num_kept * shape.tokens * shape.width),
                                 floats(weight, "weight", shape.width), floats(bias, "bias", shape.width)};
  const Size normed_rows = weight.is_none() ? 0 : rows;
  float* const outputs[] = {floats(total, "total", count), floats(normed, "normed", normed_rows * shape.width),
                            floats(mean, "mean", normed_rows), floats(rstd, "rstd", normed_rows)};
  py::gil_scoped_release release;
  residual_norm(shape, inputs[0], inputs[1], inputs[2], inputs[3], eps, outputs[0], outputs[1], outputs[2], outputs[3],
                threads);
}

void py_residual_norm_backward(const py::object& grad_total, const py::object& grad_normed, const py::object& total,
                               const py::object& mean, const py::object& rstd, const py::object& weight,
                               const py::object& branch, const py::object& gamma, const py::object& drop_path,
                               const py::object& kept, const py::object& grad_x, const py::object& grad_branch,
                               const py::object& sums, Size threads) {
  const py::object& stream = grad_normed.is_none() ? grad_total : grad_normed;
  const ResidualShape shape = residual_shape(stream, gamma, drop_path, py::none(), kept);
  const Size rows = shape.batch * shape.tokens, count = rows * shape.width;
  const Size branch_count = shape.num_kept * shape.tokens * shape.width;
  const float* const inputs[] = {floats(grad_total, "grad_total", count), floats(grad_normed, "grad_normed", count),
                                 floats(total, "total", count),           floats(mean, "mean", rows),
                                 floats(rstd, "rstd", rows),              floats(weight, "weight", shape.width),
                                 floats(branch, "branch", branch_count)};
  float* const outputs[] = {floats(grad_x, "grad_x", grad_normed.is_none() ? 0 : count),
                            floats(grad_branch, "grad_branch", branch_count),
                            floats(sums, "sums", 4 * pieces_of(rows) * shape.width)};
  py::gil_scoped_release release;
  residual_norm_backward(shape, inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], outputs[0],
                         outputs[1], outputs[2], threads);
}

void py_biased_softmax(const py::object& scores, const py::object& bias, Size threads) {
  const Size samples = size(scores, 0), heads = size(scores, 1), tokens = size(scores, 2), square = tokens * tokens;
  float* const of_scores = floats(scores, "scores", samples * heads * square);
  const float* const of_bias = floats(bias, "bias", heads * square);
  py::gil_scoped_release release;
  biased_softmax(of_scores, of_bias, samples, heads, tokens, threads);
}

void py_softmax_backward(const py::object& grad, const py::object& weights, const py::object& bias_sum,
                         const py::object& group_sum, Size first, Size batch, Size group, Size threads) {
  const Size samples = size(grad, 0), heads = size(grad, 1), tokens = size(grad, 2), square = tokens * tokens;
  if (group < 1) throw std::invalid_argument("group must be at least 1");
  float* const gradient = floats(grad, "grad", samples * heads * square);
  const float* const of_weights = floats(weights, "weights", samples * heads * square);
  float* const sums[] = {floats(bias_sum, "bias_sum", heads * square), floats(group_sum, "group_sum", heads * square)};
  py::gil_scoped_release release;
  softmax_backward(gradient, of_weights, sums[0], sums[1], samples, heads, tokens, first, batch, group, threads);
}

}  // namespace

void bind_kernels(py::module_& module) {
  module.attr("HAS_THREADS") = kHasThreads;
  module.attr("HAS_VECTORS") = kHasVectors;
  module.attr("ROWS_PER_SUM") = kRowsPerSum;
  module.def("bias_gelu", &py_bias_gelu);
  module.def("bias_gelu_backward", &py_bias_gelu_backward);
  module.def("residual_norm", &py_residual_norm);
  module.def("residual_norm_backward", &py_residual_norm_backward);
  module.def("biased_softmax", &py_biased_softmax);
  module.def("softmax_backward", &py_softmax_backward);
}

}  // namespace beit_fast
