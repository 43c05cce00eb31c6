#include "views.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace beit_fast {
namespace {

constexpr float kRed = 0.299f, kGreen = 0.587f, kBlue = 0.114f;

float clip(float x) {
  x = x > 0.0f ? x : 0.0f;
  return x < 255.0f ? x : 255.0f;
}

struct Planes {
  float *red, *green, *blue;
};

// Saturation and normalisation of one row; the planes hold brightened, contrasted values.
void finish_row(Planes in, Planes out, std::int64_t width, float saturation, const float* scale, const float* shift) {
  const float* __restrict red = in.red;
  const float* __restrict green = in.green;
  const float* __restrict blue = in.blue;
  float* __restrict out_red = out.red;
  float* __restrict out_green = out.green;
  float* __restrict out_blue = out.blue;
  const float rest = 1.0f - saturation;
  for (std::int64_t x = 0; x < width; ++x) {
    const float gray = rest * (kRed * red[x] + kGreen * green[x] + kBlue * blue[x]);
    out_red[x] = clip(saturation * red[x] + gray) * scale[0] + shift[0];
    out_green[x] = clip(saturation * green[x] + gray) * scale[1] + shift[1];
    out_blue[x] = clip(saturation * blue[x] + gray) * scale[2] + shift[2];
  }
}

float gray_mean(const std::uint8_t* crop, std::int64_t pixels) {
  std::uint64_t sums[3] = {0, 0, 0};
  for (std::int64_t i = 0; i < pixels; ++i) {
    for (int channel = 0; channel < 3; ++channel) sums[channel] += crop[3 * i + channel];
  }
  const double total = 0.299 * static_cast<double>(sums[0]) + 0.587 * static_cast<double>(sums[1]) + 0.114 * static_cast<double>(sums[2]);
  return static_cast<float>(total / static_cast<double>(pixels));
}

void transform_view(const ViewTransform& t, std::int64_t b, std::vector<float>& row) {
  const std::int64_t pixels = t.height * t.width;
  const std::uint8_t* crop = t.crops + 3 * pixels * b;
  const float brightness = t.factors[3 * b], contrast = t.factors[3 * b + 1], saturation = t.factors[3 * b + 2];
  const float center = t.centers ? t.centers[b] : gray_mean(crop, pixels);
  const float offset = (1.0f - contrast) * clip(brightness * center);
  float table[256];  // brightness and contrast act on one byte at a time
  for (int v = 0; v < 256; ++v) table[v] = clip(contrast * clip(brightness * static_cast<float>(v)) + offset);
  float scale[3], shift[3];
  for (int channel = 0; channel < 3; ++channel) {
    scale[channel] = static_cast<float>(1.0 / (255.0 * t.std[channel]));
    shift[channel] = static_cast<float>(-t.mean[channel] / t.std[channel]);
  }
  float* out = t.out + 3 * pixels * b;
  const Planes planes{row.data(), row.data() + t.width, row.data() + 2 * t.width};
  for (std::int64_t y = 0; y < t.height; ++y) {
    const std::uint8_t* bytes = crop + 3 * t.width * y;
    const std::int64_t first = t.flips[b] ? t.width - 1 : 0, step = t.flips[b] ? -1 : 1;
    for (std::int64_t x = 0, to = first; x < t.width; ++x, to += step) {
      planes.red[to] = table[bytes[3 * x]];
      planes.green[to] = table[bytes[3 * x + 1]];
      planes.blue[to] = table[bytes[3 * x + 2]];
    }
    float* line = out + t.width * y;
    finish_row(planes, {line, line + pixels, line + 2 * pixels}, t.width, saturation, scale, shift);
  }
}

}  // namespace

void transform_views(const ViewTransform& transform, int threads) {
  const auto work = [&transform](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(3 * transform.width));
    for (std::int64_t b = begin; b < end; ++b) transform_view(transform, b, row);
  };
  const std::int64_t parts = std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(transform.batch, 1));
  std::vector<std::jthread> helpers;
  for (std::int64_t part = 1; part < parts; ++part) {
    helpers.emplace_back(work, transform.batch * part / parts, transform.batch * (part + 1) / parts);
  }
  work(0, transform.batch / parts);
}

void gray_means(const std::uint8_t* crops, std::int64_t batch, std::int64_t pixels, float* means) {
  for (std::int64_t b = 0; b < batch; ++b) means[b] = gray_mean(crops + 3 * pixels * b, pixels);
}

}  // namespace beit_fast
