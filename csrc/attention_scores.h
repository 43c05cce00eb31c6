#pragma once

#include <cstdint>

namespace beit_fast {

// softmax(scores + bias) over the last dimension, in place: scores (samples, heads, tokens, tokens), bias (heads,
// tokens, tokens) or null.
void biased_softmax(float* scores, const float* bias, std::int64_t samples, std::int64_t heads, std::int64_t tokens,
                    std::int64_t threads);

// grad = weights * (grad - sum(weights * grad)) over the last dimension, in place, both (samples, heads, tokens,
// tokens). Where `bias_sum` (heads, tokens, tokens) is not null, it takes the sum over the samples. Sample `first` of
// `batch` is the first one here; the samples up to a multiple of `group` are summed apart, in `group_sum`, so that
// rounding does not grow with the batch.
void softmax_backward(float* grad, const float* weights, float* bias_sum, float* group_sum, std::int64_t samples,
                      std::int64_t heads, std::int64_t tokens, std::int64_t first, std::int64_t batch,
                      std::int64_t group, std::int64_t threads);

}  // namespace beit_fast
