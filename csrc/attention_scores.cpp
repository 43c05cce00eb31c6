#include "attention_scores.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "multiversion.h"
#include "parallel.h"
#include "vector_math.h"

namespace beit_fast {
namespace {

constexpr std::int64_t kLanes = 16;

// `padded` has room for the row rounded up to kLanes.
BEIT_FAST_VERSIONS("arch=x86-64-v3")
void softmax_row(float* __restrict row, const float* __restrict bias, std::int64_t width, float* __restrict padded) {
  float greatest = -std::numeric_limits<float>::infinity();
  if (bias) {
#pragma omp simd reduction(max : greatest)
    for (std::int64_t j = 0; j < width; ++j) {
      padded[j] = row[j] + bias[j];
      greatest = greatest < padded[j] ? padded[j] : greatest;
    }
  } else {
#pragma omp simd reduction(max : greatest)
    for (std::int64_t j = 0; j < width; ++j) {
      padded[j] = row[j];
      greatest = greatest < padded[j] ? padded[j] : greatest;
    }
  }
  const std::int64_t whole = (width + kLanes - 1) / kLanes * kLanes;
  for (std::int64_t j = width; j < whole; ++j) padded[j] = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = 0; j < whole; ++j) {
    padded[j] = exp_nonpositive(padded[j] - greatest);
    sum += padded[j];
  }
  const float factor = 1.0f / sum;
  for (std::int64_t j = 0; j < width; ++j) row[j] = padded[j] * factor;
}

BEIT_FAST_VERSIONS("arch=x86-64-v3")
void gradient_row(float* __restrict grad, const float* __restrict weights, std::int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = 0; j < width; ++j) sum += weights[j] * grad[j];
  for (std::int64_t j = 0; j < width; ++j) grad[j] = weights[j] * (grad[j] - sum);
}

BEIT_FAST_VERSIONS("arch=x86-64-v3")
void add_row(const float* __restrict row, std::int64_t width, float* __restrict sum) {
  for (std::int64_t j = 0; j < width; ++j) sum[j] += row[j];
}

// The first row is the sum so far.
void sum_up(const float* row, std::int64_t width, float* sum, bool first) {
  if (first) {
    std::copy(row, row + width, sum);
  } else {
    add_row(row, width, sum);
  }
}

}  // namespace

void biased_softmax(float* scores, const float* bias, std::int64_t samples, std::int64_t heads, std::int64_t tokens,
                    std::int64_t threads) {
  in_parallel(samples * heads * tokens, threads, [=](std::int64_t first, std::int64_t last) {
    std::vector<float> padded(static_cast<std::size_t>(tokens + kLanes));
    for (std::int64_t row = first; row < last; ++row) {
      const float* added = bias ? bias + row % (heads * tokens) * tokens : nullptr;
      softmax_row(scores + row * tokens, added, tokens, padded.data());
    }
  });
}

void softmax_backward(float* grad, const float* weights, float* bias_sum, float* group_sum, std::int64_t samples,
                      std::int64_t heads, std::int64_t tokens, std::int64_t first_sample, std::int64_t batch,
                      std::int64_t group, std::int64_t threads) {
  in_parallel(heads * tokens, threads, [=](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      for (std::int64_t sample = 0; sample < samples; ++sample) {
        const std::int64_t at = (sample * heads * tokens + row) * tokens;
        gradient_row(grad + at, weights + at, tokens);
        if (!bias_sum) continue;
        float* of_group = group_sum + row * tokens;
        const std::int64_t number = first_sample + sample;
        sum_up(grad + at, tokens, of_group, number % group == 0);
        if ((number + 1) % group == 0 || number + 1 == batch) {
          sum_up(of_group, tokens, bias_sum + row * tokens, number < group);
        }
      }
    }
  });
}

}  // namespace beit_fast
