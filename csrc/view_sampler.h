// Everything random about a sample but its mask: crop window, flip, colour factors, place in the epoch, drop-path key.
#pragma once

#include <cstdint>

namespace beit_fast {

struct ViewParameters {
  double min_scale, max_scale;  // area of the window over area of the image
  double min_ratio, max_ratio;  // width over height of the window
  double flip_probability;
  double brightness, contrast, saturation;  // factors are uniform in [max(0, 1 - x), 1 + x]
};

// Throws std::invalid_argument naming the argument at fault.
void check(const ViewParameters& parameters);

// windows: (batch, 4) top, left, height, width; flips: (batch) 0 or 1; factors: (batch, 3) brightness, contrast,
// saturation. `parameters` has passed check(); heights and widths are positive.
void sample_views(const ViewParameters& parameters, std::uint64_t seed, std::uint32_t epoch,
                  const std::int64_t* heights, const std::int64_t* widths, const std::int64_t* indices,
                  std::int64_t batch, std::int32_t* windows, std::uint8_t* flips, float* factors);

// order[i] is the place to which the permutation of {0, ..., length - 1} of this epoch sends positions[i].
// Swap-or-not (Hoang, Morris, Rogaway, CRYPTO 2012): stateless, and good for short lengths as for long ones.
void permute(std::uint64_t seed, std::uint32_t epoch, std::int64_t length, const std::int64_t* positions,
             std::int64_t count, std::int64_t* order);

// 64 random bits per sample.
void sample_keys(std::uint64_t seed, std::uint32_t epoch, const std::int64_t* indices, std::int64_t batch,
                 std::int64_t* keys);

}  // namespace beit_fast
