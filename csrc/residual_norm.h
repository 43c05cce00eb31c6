#pragma once

#include <cstdint>

namespace beit_fast {

// x, branch (batch, tokens, width), gamma, weight, ... (width,), drop_path (batch,): as in kernels/residual_norm. Null
// where the call has none. `kept` (num_kept,): the samples that branch has, ascending; null where it has all.
struct ResidualShape {
  std::int64_t batch, tokens, width, num_kept;
  const std::int64_t* kept;
  const float* gamma;
  const float* drop_path;
  const float* branch_bias;
};

// total = x + drop_path * gamma * (branch + branch_bias) and, where `weight` is not null, its LayerNorm with the mean
// and 1 / std of each row (batch, tokens).
void residual_norm(const ResidualShape& shape, const float* x, const float* branch, const float* weight,
                   const float* bias, float eps, float* total, float* normed, float* mean, float* rstd,
                   std::int64_t threads);

// grad_x = grad_total + the gradient through the LayerNorm; without `grad_normed` it is grad_total, and not written.
// grad_branch = drop_path * gamma * grad_x of the kept samples, unless null. sums (4, pieces of kRowsPerSum rows, width):
// of grad_normed * normalised total, of grad_normed, of drop_path * grad_x * branch and of drop_path * grad_x; the first
// two without `grad_normed`, the third without `branch`, are 0.
void residual_norm_backward(const ResidualShape& shape, const float* grad_total, const float* grad_normed,
                            const float* total, const float* mean, const float* rstd, const float* weight,
                            const float* branch, float* grad_x, float* grad_branch, float* sums, std::int64_t threads);

}  // namespace beit_fast
