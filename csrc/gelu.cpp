#include "gelu.h"

#include <algorithm>
#include <vector>

#include "multiversion.h"
#include "parallel.h"
#include "row_pieces.h"
#include "vector_math.h"

namespace beit_fast {
namespace {

// x is read before value and derivative are written, at each place: they may be the same memory, which `ivdep` allows.
BEIT_FAST_VERSIONS("arch=x86-64-v3")
void gelu_row(const float* x, const float* bias, std::int64_t width, float* value, float* derivative) {
#pragma GCC ivdep
  for (std::int64_t j = 0; j < width; ++j) {
    const Gelu result = gelu(x[j] + bias[j]);
    value[j] = result.value;
    derivative[j] = result.derivative;
  }
}

BEIT_FAST_VERSIONS("arch=x86-64-v3")
void gradient_row(const float* grad, const float* derivative, std::int64_t width, float* grad_x) {
#pragma GCC ivdep
  for (std::int64_t j = 0; j < width; ++j) grad_x[j] = grad[j] * derivative[j];
}

BEIT_FAST_VERSIONS("arch=x86-64-v3")
void add_row(const float* __restrict row, std::int64_t width, float* __restrict sum) {
  for (std::int64_t j = 0; j < width; ++j) sum[j] += row[j];
}

}  // namespace

void bias_gelu(const float* x, const float* bias, std::int64_t rows, std::int64_t width, float* value,
               float* derivative, std::int64_t threads) {
  const std::vector<float> zeros(bias ? 0 : static_cast<std::size_t>(width), 0.0f);
  const float* added = bias ? bias : zeros.data();
  in_parallel(rows, threads, [=](std::int64_t first, std::int64_t last) {
    for (std::int64_t at = first * width; at < last * width; at += width) {
      gelu_row(x + at, added, width, value + at, derivative + at);
    }
  });
}

void bias_gelu_backward(const float* grad, const float* derivative, std::int64_t rows, std::int64_t width,
                        float* grad_x, float* sums, std::int64_t threads) {
  in_parallel(pieces_of(rows), threads, [=](std::int64_t first, std::int64_t last) {
    for (std::int64_t piece = first; piece < last; ++piece) {
      float* sum = sums + piece * width;
      std::fill(sum, sum + width, 0.0f);
      for (std::int64_t row = piece * kRowsPerSum; row < std::min(rows, (piece + 1) * kRowsPerSum); ++row) {
        gradient_row(grad + row * width, derivative + row * width, width, grad_x + row * width);
        add_row(grad_x + row * width, width, sum);
      }
    }
  });
}

}  // namespace beit_fast
