#include "view_sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "philox.h"
#include "portable_math.h"

namespace beit_fast {
namespace {

constexpr int kAttemptsPerWindow = 10;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

struct LogRange {
  double low, high;
};

// RandomResizedCrop: ten attempts, then the largest centred window whose ratio is in range.
void sample_window(const ViewParameters& p, LogRange log_ratio, std::int64_t height, std::int64_t width,
                   SampleStream stream, std::int32_t* window) {
  const double area = static_cast<double>(height) * static_cast<double>(width);
  for (int attempt = 0; attempt < kAttemptsPerWindow; ++attempt) {
    const PhiloxBlock words = stream.next();
    const double target = uniform(p.min_scale, p.max_scale, words[0]) * area;
    const double ratio = portable_exp(uniform(log_ratio.low, log_ratio.high, words[1]));
    const std::int64_t w = round_half_even(std::sqrt(target * ratio));
    const std::int64_t h = round_half_even(std::sqrt(target / ratio));
    if (w < 1 || h < 1 || w > width || h > height) continue;
    window[0] = static_cast<std::int32_t>(below(static_cast<std::uint32_t>(height - h + 1), words[2]));
    window[1] = static_cast<std::int32_t>(below(static_cast<std::uint32_t>(width - w + 1), words[3]));
    window[2] = static_cast<std::int32_t>(h);
    window[3] = static_cast<std::int32_t>(w);
    return;
  }
  std::int64_t h = height, w = width;
  const double ratio = static_cast<double>(width) / static_cast<double>(height);
  if (ratio < p.min_ratio) h = round_half_even(static_cast<double>(width) / p.min_ratio);
  if (ratio > p.max_ratio) w = round_half_even(static_cast<double>(height) * p.max_ratio);
  h = std::clamp<std::int64_t>(h, 1, height);
  w = std::clamp<std::int64_t>(w, 1, width);
  window[0] = static_cast<std::int32_t>((height - h) / 2);
  window[1] = static_cast<std::int32_t>((width - w) / 2);
  window[2] = static_cast<std::int32_t>(h);
  window[3] = static_cast<std::int32_t>(w);
}

float factor(double strength, std::uint32_t word) {
  return static_cast<float>(uniform(std::max(0.0, 1 - strength), 1 + strength, word));
}

struct ShuffleRound {
  std::uint64_t pivot, key;
};

// One bit of a mixing of x and key (the finaliser of splitmix64).
bool hash_bit(std::uint64_t x, std::uint64_t key) {
  x = (x ^ key) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return (x >> 63) != 0;
}

}  // namespace

void check(const ViewParameters& p) {
  const auto text = [](double value) { return std::to_string(value); };
  require(p.min_scale > 0 && p.min_scale <= p.max_scale && p.max_scale <= 1,
          "scale must be (low, high) with 0 < low <= high <= 1, got (" + text(p.min_scale) + ", " + text(p.max_scale) +
              ")");
  require(p.min_ratio >= 1e-4 && p.min_ratio <= p.max_ratio && p.max_ratio <= 1e4,
          "ratio must be (low, high) with 1e-4 <= low <= high <= 1e4, got (" + text(p.min_ratio) + ", " +
              text(p.max_ratio) + ")");
  require(p.flip_probability >= 0 && p.flip_probability <= 1,
          "flip_probability must be between 0 and 1, got " + text(p.flip_probability));
  const auto strength = [&](double value, const std::string& name) {
    require(std::isfinite(value) && value >= 0, name + " must be finite and not negative, got " + text(value));
  };
  strength(p.brightness, "brightness");
  strength(p.contrast, "contrast");
  strength(p.saturation, "saturation");
}

void sample_views(const ViewParameters& p, std::uint64_t seed, std::uint32_t epoch, const std::int64_t* heights,
                  const std::int64_t* widths, const std::int64_t* indices, std::int64_t batch, std::int32_t* windows,
                  std::uint8_t* flips, float* factors) {
  const LogRange log_ratio{portable_log(p.min_ratio), portable_log(p.max_ratio)};
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::uint64_t sample = static_cast<std::uint64_t>(indices[b]);
    sample_window(p, log_ratio, heights[b], widths[b], SampleStream(seed, epoch, sample, Purpose::window),
                  windows + 4 * b);
    const PhiloxBlock words = SampleStream(seed, epoch, sample, Purpose::colour).next();
    flips[b] = unit(words[0]) < p.flip_probability;
    factors[3 * b] = factor(p.brightness, words[1]);
    factors[3 * b + 1] = factor(p.contrast, words[2]);
    factors[3 * b + 2] = factor(p.saturation, words[3]);
  }
}

void permute(std::uint64_t seed, std::uint32_t epoch, std::int64_t length, const std::int64_t* positions,
             std::int64_t count, std::int64_t* order) {
  const std::uint64_t n = static_cast<std::uint64_t>(length);
  SampleStream stream(seed, epoch, 0, Purpose::order);
  std::vector<ShuffleRound> rounds(
      32 + 6 * static_cast<std::size_t>(std::bit_width(n)));  // 6 log2(n), and some for short ones
  for (ShuffleRound& round : rounds) {
    const PhiloxBlock words = stream.next();
    round.pivot = ((std::uint64_t{words[1]} << 32) | words[0]) % n;
    round.key = (std::uint64_t{words[3]} << 32) | words[2];
  }
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint64_t x = static_cast<std::uint64_t>(positions[i]);
    for (const ShuffleRound& round : rounds) {
      // The partner of the partner is x itself, and both see the same bit: each round is a set of swaps.
      const std::uint64_t partner = round.pivot >= x ? round.pivot - x : round.pivot + (n - x);
      if (hash_bit(std::max(x, partner), round.key)) x = partner;
    }
    order[i] = static_cast<std::int64_t>(x);
  }
}

void sample_keys(std::uint64_t seed, std::uint32_t epoch, const std::int64_t* indices, std::int64_t batch,
                 std::int64_t* keys) {
  for (std::int64_t b = 0; b < batch; ++b) {
    const PhiloxBlock words = SampleStream(seed, epoch, static_cast<std::uint64_t>(indices[b]), Purpose::key).next();
    keys[b] = std::bit_cast<std::int64_t>((std::uint64_t{words[1]} << 32) | words[0]);
  }
}

}  // namespace beit_fast
