#include "residual_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "multiversion.h"
#include "parallel.h"
#include "row_pieces.h"

namespace beit_fast {
namespace {

// For a row at hand, asks for the row of this width about three thousand bytes further on, as the processor's own
// prefetching starts anew at every page. It may be past the end, which costs nothing.
inline void prefetch_ahead(const float* row, std::int64_t width) {
  constexpr std::int64_t kLine = 16;  // floats of a cache line
  const float* ahead = row + std::max<std::int64_t>(width, 768);
  for (std::int64_t j = 0; j < width; j += kLine) __builtin_prefetch(ahead + j);
}

// total = x + scale * branch + shift; returns the sum of the row.
BEIT_FAST_VERSIONS("arch=x86-64-v3")
float add_branch(const float* __restrict x, const float* __restrict branch, const float* __restrict scale,
                 const float* __restrict shift, std::int64_t width, float* __restrict total) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = 0; j < width; ++j) {
    total[j] = x[j] + scale[j] * branch[j] + shift[j];
    sum += total[j];
  }
  return sum;
}

BEIT_FAST_VERSIONS("arch=x86-64-v3")
float add_shift(const float* __restrict x, const float* __restrict shift, std::int64_t width, float* __restrict total) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = 0; j < width; ++j) {
    total[j] = x[j] + shift[j];
    sum += total[j];
  }
  return sum;
}

// LayerNorm of a row with this mean; returns 1 / std.
BEIT_FAST_VERSIONS("arch=x86-64-v3")
float normalise(const float* __restrict total, float mean, const float* __restrict weight, const float* __restrict bias,
                float eps, std::int64_t width, float* __restrict normed) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (std::int64_t j = 0; j < width; ++j) squares += (total[j] - mean) * (total[j] - mean);
  const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  for (std::int64_t j = 0; j < width; ++j) normed[j] = (total[j] - mean) * rstd * weight[j] + bias[j];
  return rstd;
}

// grad_x = grad_total + the gradient through the LayerNorm of a row, whose weight's and bias's gradients are added up.
BEIT_FAST_VERSIONS("arch=x86-64-v3")
void norm_gradient(const float* __restrict grad_normed, const float* __restrict total, float mean, float rstd,
                   const float* __restrict weight, const float* __restrict grad_total, std::int64_t width,
                   float* __restrict grad_x, float* __restrict weight_sum, float* __restrict bias_sum) {
  float plain = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : plain, product)
  for (std::int64_t j = 0; j < width; ++j) {
    const float weighted = grad_normed[j] * weight[j];
    plain += weighted;
    product += weighted * ((total[j] - mean) * rstd);
  }
  plain /= static_cast<float>(width);
  product /= static_cast<float>(width);
  for (std::int64_t j = 0; j < width; ++j) {
    const float normalised = (total[j] - mean) * rstd;
    grad_x[j] = (grad_normed[j] * weight[j] - plain - normalised * product) * rstd + grad_total[j];
    weight_sum[j] += grad_normed[j] * normalised;
    bias_sum[j] += grad_normed[j];
  }
}

// grad_branch = scale * grad of a row; the sums of factor * grad * branch and factor * grad go on.
BEIT_FAST_VERSIONS("arch=x86-64-v3")
void branch_gradient(const float* __restrict grad, const float* __restrict branch, const float* __restrict scale,
                     float factor, std::int64_t width, float* __restrict grad_branch, float* __restrict gamma_sum,
                     float* __restrict column_sum) {
  for (std::int64_t j = 0; j < width; ++j) {
    grad_branch[j] = scale[j] * grad[j];
    const float column = factor * grad[j];
    gamma_sum[j] += column * branch[j];
    column_sum[j] += column;
  }
}

// What of the branch and its bias reaches the sum in one sample: scale * branch + shift.
class SampleScale {
 public:
  explicit SampleScale(const ResidualShape& shape)
      : shape_(shape), scale_(static_cast<std::size_t>(shape.width)), shift_(static_cast<std::size_t>(shape.width)) {}

  void set(std::int64_t sample) {
    if (sample == sample_) return;
    sample_ = sample;
    factor_ = shape_.drop_path ? shape_.drop_path[sample] : 1.0f;
    for (std::int64_t j = 0; j < shape_.width; ++j) {
      scale_[j] = shape_.gamma ? factor_ * shape_.gamma[j] : factor_;
      shift_[j] = shape_.branch_bias ? scale_[j] * shape_.branch_bias[j] : 0.0f;
    }
  }
  const float* scale() const { return scale_.data(); }
  const float* shift() const { return shift_.data(); }
  float factor() const { return factor_; }

 private:
  const ResidualShape& shape_;
  std::vector<float> scale_, shift_;
  float factor_ = 1.0f;
  std::int64_t sample_ = -1;
};

// The first row of each sample in branch, or -1 where branch lacks it.
std::vector<std::int64_t> first_rows(const ResidualShape& shape) {
  const bool all = shape.num_kept == shape.batch;
  std::vector<std::int64_t> rows(static_cast<std::size_t>(shape.batch), -1);
  for (std::int64_t k = 0; k < shape.num_kept; ++k) rows[all ? k : shape.kept[k]] = k * shape.tokens;
  return rows;
}

}  // namespace

void residual_norm(const ResidualShape& shape, const float* x, const float* branch, const float* weight,
                   const float* bias, float eps, float* total, float* normed, float* mean, float* rstd,
                   std::int64_t threads) {
  const std::vector<std::int64_t> branch_rows = first_rows(shape);
  const std::int64_t width = shape.width;
  in_parallel(shape.batch * shape.tokens, threads, [&](std::int64_t first, std::int64_t last) {
    SampleScale sample(shape);
    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t index = row / shape.tokens, branch_row = branch_rows[index] + row % shape.tokens;
      sample.set(index);
      float* out = total + row * width;
      prefetch_ahead(x + row * width, width);
      if (branch_rows[index] >= 0) prefetch_ahead(branch + branch_row * width, width);
      const float sum =
          branch_rows[index] >= 0
              ? add_branch(x + row * width, branch + branch_row * width, sample.scale(), sample.shift(), width, out)
              : add_shift(x + row * width, sample.shift(), width, out);
      if (weight) {
        mean[row] = sum / static_cast<float>(width);
        rstd[row] = normalise(out, mean[row], weight, bias, eps, width, normed + row * width);
      }
    }
  });
}

void residual_norm_backward(const ResidualShape& shape, const float* grad_total, const float* grad_normed,
                            const float* total, const float* mean, const float* rstd, const float* weight,
                            const float* branch, float* grad_x, float* grad_branch, float* sums, std::int64_t threads) {
  const std::vector<std::int64_t> branch_rows = first_rows(shape);
  const std::int64_t width = shape.width, rows = shape.batch * shape.tokens;
  const std::vector<float> zeros(static_cast<std::size_t>(width), 0.0f);
  in_parallel(pieces_of(rows), threads, [&](std::int64_t first, std::int64_t last) {
    SampleScale sample(shape);
    std::vector<float> unread(static_cast<std::size_t>(width));
    for (std::int64_t piece = first; piece < last; ++piece) {
      float* of_piece[4];
      for (std::int64_t kind = 0; kind < 4; ++kind) {
        of_piece[kind] = sums + (kind * pieces_of(rows) + piece) * width;
        std::fill(of_piece[kind], of_piece[kind] + width, 0.0f);
      }
      for (std::int64_t row = piece * kRowsPerSum; row < std::min(rows, (piece + 1) * kRowsPerSum); ++row) {
        const std::int64_t at = row * width, index = row / shape.tokens;
        const float* grad = grad_total ? grad_total + at : zeros.data();
        if (grad_total) prefetch_ahead(grad, width);
        if (grad_normed) {
          prefetch_ahead(grad_normed + at, width);
          prefetch_ahead(total + at, width);
          norm_gradient(grad_normed + at, total + at, mean[row], rstd[row], weight, grad, width, grad_x + at,
                        of_piece[0], of_piece[1]);
          grad = grad_x + at;
        }
        if (branch_rows[index] < 0) continue;  // its factor is 0
        sample.set(index);
        const std::int64_t branch_at = (branch_rows[index] + row % shape.tokens) * width;
        if (branch) prefetch_ahead(branch + branch_at, width);
        branch_gradient(grad, branch ? branch + branch_at : zeros.data(), sample.scale(), sample.factor(), width,
                        grad_branch ? grad_branch + branch_at : unread.data(), of_piece[2], of_piece[3]);
      }
    }
  });
}

}  // namespace beit_fast
