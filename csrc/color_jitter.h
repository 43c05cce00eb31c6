// Colour jitter, flip and normalisation of resized views in one pass: what kernels/color_jitter does on a GPU.
#pragma once

#include <array>
#include <cstdint>

namespace beit_fast {

struct ViewTransform {
  std::int64_t batch, height, width;
  const std::uint8_t* crops;  // (batch, height, width, 3)
  const std::uint8_t* flips;  // (batch)
  const float* factors;       // (batch, 3): brightness b, contrast c, saturation s
  const float* centers;       // (batch): gray mean m of the unjittered view; computed here when null
  std::array<double, 3> mean, std;
  float* out;  // (batch, 3, height, width)
};

// x in [0, 255], clipped to that range after each line; gray(x) = 0.299 R + 0.587 G + 0.114 B (ITU-R 601):
//   x = b x;  x = c x + (1 - c) b m;  x = s x + (1 - s) gray(x);  flip;  out = (x / 255 - mean) / std.
// Images are shared out over `threads` threads; the result does not depend on their number.
void transform_views(const ViewTransform& transform, int threads);

// means: (batch) gray means, in [0, 255].
void gray_means(const std::uint8_t* crops, std::int64_t batch, std::int64_t pixels, float* means);

}  // namespace beit_fast
