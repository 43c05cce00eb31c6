#include "color_jitter.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "multiversion.h"

namespace beit_fast {
namespace {

// Written so that it becomes two instructions; NaN does not occur (see CMakeLists.txt).
inline float clip(float x) {
  x = x > 0.0f ? x : 0.0f;
  return x < 255.0f ? x : 255.0f;
}

// The pixels of a row to three planes of its channels.
BEIT_FAST_VERSIONS("arch=x86-64-v4", "avx2")
void split(const std::uint8_t* __restrict pixels, std::int64_t width, std::uint8_t* __restrict red,
           std::uint8_t* __restrict green, std::uint8_t* __restrict blue) {
  for (std::int64_t x = 0; x < width; ++x) {
    red[x] = pixels[3 * x];
    green[x] = pixels[3 * x + 1];
    blue[x] = pixels[3 * x + 2];
  }
}

BEIT_FAST_VERSIONS("arch=x86-64-v4", "avx2")
void reverse(const std::uint8_t* __restrict from, std::int64_t count, std::uint8_t* __restrict to) {
  for (std::int64_t x = 0; x < count; ++x) to[x] = from[count - 1 - x];
}

struct Colours {
  float brightness, contrast, offset, saturation;
  float scale[3], shift[3];
};

BEIT_FAST_VERSIONS("arch=x86-64-v4", "avx2")
void transform_row(const std::uint8_t* __restrict red, const std::uint8_t* __restrict green,
                   const std::uint8_t* __restrict blue, std::int64_t width, const Colours& colours,
                   float* __restrict out_red, float* __restrict out_green, float* __restrict out_blue) {
  const auto [brightness, contrast, offset, saturation, scale, shift] = colours;
  for (std::int64_t x = 0; x < width; ++x) {
    const float r = clip(contrast * clip(brightness * static_cast<float>(red[x])) + offset);
    const float g = clip(contrast * clip(brightness * static_cast<float>(green[x])) + offset);
    const float b = clip(contrast * clip(brightness * static_cast<float>(blue[x])) + offset);
    const float gray = (1.0f - saturation) * (0.299f * r + 0.587f * g + 0.114f * b);
    out_red[x] = clip(saturation * r + gray) * scale[0] + shift[0];
    out_green[x] = clip(saturation * g + gray) * scale[1] + shift[1];
    out_blue[x] = clip(saturation * b + gray) * scale[2] + shift[2];
  }
}

// Sums of the three channels: 48 lanes of 16 bits, lane j holding channel j % 3, emptied before they can overflow.
BEIT_FAST_VERSIONS("arch=x86-64-v4", "avx2")
void channel_sums(const std::uint8_t* crop, std::int64_t pixels, std::uint64_t* sums) {
  constexpr std::int64_t kLanes = 48, kMostRounds = 65535 / 255;
  const std::int64_t bytes = 3 * pixels;
  std::int64_t at = 0;
  while (bytes - at >= kLanes) {
    std::uint16_t lanes[kLanes] = {};
    const std::int64_t end = at + kLanes * std::min((bytes - at) / kLanes, kMostRounds);
    for (; at < end; at += kLanes) {
      for (std::int64_t j = 0; j < kLanes; ++j) lanes[j] = static_cast<std::uint16_t>(lanes[j] + crop[at + j]);
    }
    for (std::int64_t j = 0; j < kLanes; ++j) sums[j % 3] += lanes[j];
  }
  for (; at < bytes; ++at) sums[at % 3] += crop[at];
}

float gray_mean(const std::uint8_t* crop, std::int64_t pixels) {
  std::uint64_t sums[3] = {0, 0, 0};
  channel_sums(crop, pixels, sums);
  const double total = 0.299 * static_cast<double>(sums[0]) + 0.587 * static_cast<double>(sums[1]) +
                       0.114 * static_cast<double>(sums[2]);
  return static_cast<float>(total / static_cast<double>(pixels));
}

void transform_view(const ViewTransform& t, std::int64_t b, std::vector<std::uint8_t>& scratch) {
  const std::int64_t pixels = t.height * t.width;
  const std::uint8_t* crop = t.crops + 3 * pixels * b;
  Colours colours{t.factors[3 * b], t.factors[3 * b + 1], 0, t.factors[3 * b + 2], {}, {}};
  const float center = t.centers ? t.centers[b] : gray_mean(crop, pixels);
  colours.offset = (1.0f - colours.contrast) * clip(colours.brightness * center);
  for (std::size_t channel = 0; channel < 3; ++channel) {
    colours.scale[channel] = static_cast<float>(1.0 / (255.0 * t.std[channel]));
    colours.shift[channel] = static_cast<float>(-t.mean[channel] / t.std[channel]);
  }
  const std::int64_t width = t.width;
  std::uint8_t* planes = scratch.data();
  std::uint8_t* mirrored = planes + 3 * width;
  for (std::int64_t y = 0; y < t.height; ++y) {
    split(crop + 3 * width * y, width, planes, planes + width, planes + 2 * width);
    const std::uint8_t *red = planes, *green = planes + width, *blue = planes + 2 * width;
    if (t.flips[b]) {
      reverse(planes, 3 * width, mirrored);  // blue comes first now
      red = mirrored + 2 * width;
      green = mirrored + width;
      blue = mirrored;
    }
    float* out = t.out + 3 * pixels * b + width * y;
    transform_row(red, green, blue, width, colours, out, out + pixels, out + 2 * pixels);
  }
}

}  // namespace

void transform_views(const ViewTransform& transform, int threads) {
  const auto work = [&transform](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint8_t> scratch(static_cast<std::size_t>(6 * transform.width));
    for (std::int64_t b = begin; b < end; ++b) transform_view(transform, b, scratch);
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
