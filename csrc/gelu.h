#pragma once

#include <cstdint>

namespace beit_fast {

// The exact GELU of x (rows, width) + bias (width,) or null, and its derivative there. `value` or `derivative` may be x
// itself.
void bias_gelu(const float* x, const float* bias, std::int64_t rows, std::int64_t width, float* value,
               float* derivative, std::int64_t threads);

// grad_x = grad * derivative (rows, width), and its sums over kRowsPerSum rows at a time: (number of such pieces, width).
// grad_x may be grad itself.
void bias_gelu_backward(const float* grad, const float* derivative, std::int64_t rows, std::int64_t width,
                        float* grad_x, float* sums, std::int64_t threads);

}  // namespace beit_fast
