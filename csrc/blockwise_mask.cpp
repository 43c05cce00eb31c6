#include "blockwise_mask.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "philox.h"
#include "portable_math.h"

namespace beit_fast {
namespace {

constexpr int kAttemptsPerBlock = 10;

std::uint64_t low_bits(std::int64_t n) { return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1; }

class Mask {
 public:
  Mask(const MaskParameters& parameters, double log_min_aspect, double log_max_aspect, SampleStream stream)
      : p_(parameters), log_min_aspect_(log_min_aspect), log_max_aspect_(log_max_aspect), stream_(stream) {}

  // Blocks until the count is reached, or until one finds no place in ten attempts.
  void place_blocks() {
    while (count_ < p_.num_masked) {
      const std::int64_t gained = place_block(std::min(p_.num_masked - count_, p_.max_num_patches));
      if (gained == 0) break;
      count_ += gained;
    }
  }

  // Masks cells that touch the mask, each free neighbour equally likely, until the count is reached.
  void grow() {
    std::array<std::uint64_t, kMaxGrid> border;
    const std::uint64_t full = low_bits(p_.width);
    for (; count_ < p_.num_masked; ++count_) {
      std::uint32_t candidates = 0;
      for (std::int64_t i = 0; i < p_.height; ++i) {
        const std::uint64_t above = i > 0 ? rows_[i - 1] : 0;
        const std::uint64_t under = i + 1 < p_.height ? rows_[i + 1] : 0;
        const std::uint64_t near = above | under | (rows_[i] << 1) | (rows_[i] >> 1);
        border[i] = (count_ == 0 ? full : near & full) & ~rows_[i];  // an empty mask may start anywhere
        candidates += static_cast<std::uint32_t>(std::popcount(border[i]));
      }
      std::uint32_t chosen = below(candidates, stream_.next()[0]);
      std::int64_t row = 0;
      for (; chosen >= static_cast<std::uint32_t>(std::popcount(border[row])); ++row) {
        chosen -= static_cast<std::uint32_t>(std::popcount(border[row]));
      }
      for (; chosen > 0; --chosen) border[row] &= border[row] - 1;
      rows_[row] |= border[row] & (~border[row] + 1);
    }
  }

  // A uniform subset of num_masked cells: Floyd's algorithm, which needs no list of the cells.
  void scatter() {
    const std::int64_t cells = p_.height * p_.width;
    PhiloxBlock words{};
    for (std::int64_t last = cells - p_.num_masked; last < cells; ++last) {
      const std::int64_t word = count_ % 4;
      if (word == 0) words = stream_.next();
      const std::int64_t cell = below(static_cast<std::uint32_t>(last + 1), words[word]);
      const std::int64_t taken = (rows_[cell / p_.width] >> (cell % p_.width)) & 1 ? last : cell;
      rows_[taken / p_.width] |= std::uint64_t{1} << (taken % p_.width);
      ++count_;
    }
  }

  std::int32_t write(std::uint8_t* out) const {
    for (std::int64_t i = 0; i < p_.height; ++i) {
      for (std::int64_t j = 0; j < p_.width; ++j) *out++ = (rows_[i] >> j) & 1;
    }
    return static_cast<std::int32_t>(count_);
  }

 private:
  // Returns the number of cells newly masked, 0 when ten attempts failed. One Philox block per attempt.
  std::int64_t place_block(std::int64_t most) {
    for (int attempt = 0; attempt < kAttemptsPerBlock; ++attempt) {
      const PhiloxBlock words = stream_.next();
      // With fewer than min_num_patches left the bounds change places, as in the official code.
      const double area = uniform(static_cast<double>(p_.min_num_patches), static_cast<double>(most), words[0]);
      const double aspect = portable_exp(uniform(log_min_aspect_, log_max_aspect_, words[1]));
      const std::int64_t a = round_half_even(std::sqrt(area * aspect));
      const std::int64_t b = round_half_even(std::sqrt(area / aspect));
      if (a >= p_.height || b >= p_.width) continue;  // a block never spans the grid
      const std::int64_t top = below(static_cast<std::uint32_t>(p_.height - a + 1), words[2]);
      const std::int64_t left = below(static_cast<std::uint32_t>(p_.width - b + 1), words[3]);
      const std::uint64_t span = low_bits(b) << left;
      std::int64_t gained = a * b;
      for (std::int64_t i = top; i < top + a; ++i) gained -= std::popcount(rows_[i] & span);
      if (gained <= 0 || gained > most) continue;
      for (std::int64_t i = top; i < top + a; ++i) rows_[i] |= span;
      return gained;
    }
    return 0;
  }

  const MaskParameters& p_;
  double log_min_aspect_, log_max_aspect_;
  SampleStream stream_;
  std::array<std::uint64_t, kMaxGrid> rows_{};
  std::int64_t count_ = 0;
};

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

void check(const MaskParameters& p) {
  const auto text = [](auto value) { return std::to_string(value); };
  const std::string grid = text(p.height) + " x " + text(p.width);
  require(p.height >= 1 && p.width >= 1 && p.height <= kMaxGrid && p.width <= kMaxGrid,
          "out: the grid must be between 1 x 1 and 64 x 64 patches, got " + grid);
  if (p.mode == MaskMode::none) return;
  const std::int64_t cells = p.height * p.width;
  require(p.num_masked >= 0 && p.num_masked <= cells, "num_masked must be between 0 and the " + text(cells) +
                                                          " patches of the " + grid + " grid, got " +
                                                          text(p.num_masked));
  if (p.mode == MaskMode::random) return;
  require(p.min_num_patches >= 1 && p.min_num_patches <= cells, "min_num_patches must be between 1 and the " +
                                                                    text(cells) + " patches of the " + grid +
                                                                    " grid, got " + text(p.min_num_patches));
  require(p.max_num_patches >= p.min_num_patches || p.max_num_patches == p.num_masked,
          "max_num_patches must be at least min_num_patches = " + text(p.min_num_patches) + ", got " +
              text(p.max_num_patches));
  // 1e-4 is a block 4096 patches long and one wide, 100 times over.
  require(std::isfinite(p.min_aspect) && p.min_aspect >= 1e-4 && p.min_aspect <= 1e4,
          "min_aspect must be a finite ratio between 1e-4 and 1e4, got " + text(p.min_aspect));
  require(std::isfinite(p.max_aspect) && p.max_aspect >= p.min_aspect && p.max_aspect <= 1e4,
          "max_aspect must be a finite ratio between min_aspect = " + text(p.min_aspect) + " and 1e4, got " +
              text(p.max_aspect) + " (it is 1 / min_aspect unless given)");
}

void sample_masks(const MaskParameters& parameters, std::uint64_t seed, std::uint32_t epoch,
                  const std::int64_t* indices, std::int64_t batch, std::uint8_t* out, std::int32_t* counts) {
  const bool blocks = parameters.mode == MaskMode::exact || parameters.mode == MaskMode::official;
  const double log_min_aspect = blocks ? portable_log(parameters.min_aspect) : 0;
  const double log_max_aspect = blocks ? portable_log(parameters.max_aspect) : 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    const SampleStream stream(seed, epoch, static_cast<std::uint64_t>(indices[b]), Purpose::mask);
    Mask mask(parameters, log_min_aspect, log_max_aspect, stream);
    if (blocks) mask.place_blocks();
    if (parameters.mode == MaskMode::exact) mask.grow();
    if (parameters.mode == MaskMode::random) mask.scatter();
    counts[b] = mask.write(out + b * parameters.height * parameters.width);
  }
}

}  // namespace beit_fast
