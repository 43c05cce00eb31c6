#include "blockwise_mask.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "multiversion.h"
#include "philox.h"
#include "portable_math.h"

namespace beit_fast {
namespace {

constexpr int kAttemptsPerBlock = 10;

std::uint64_t low_bits(std::int64_t n) { return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1; }

// The low eight bits as eight bytes of 0 or 1, the lowest first in a little-endian memory.
std::uint64_t spread(std::uint64_t bits) {
  const std::uint64_t apart = ((bits & 0xff) * 0x0101010101010101u) & 0x8040201008040201u;
  return ((apart + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
}

// What one try at a block takes from the generator.
struct Attempt {
  std::uint32_t area, top, left;  // uniform words
  double rows, columns;           // of a block of area 1: the root of its aspect, and the inverse
};

class Mask {
 public:
  Mask(const MaskParameters& parameters, double log_min_aspect, double log_max_aspect, const SampleStream& stream)
      : p_(parameters), log_min_aspect_(log_min_aspect), log_max_aspect_(log_max_aspect), stream_(stream) {
    std::fill_n(rows_.begin(), p_.height, 0);
  }

  // Blocks until the count is reached, or until one finds no place in ten attempts.
  void place_blocks() {
    while (count_ < p_.num_masked) {
      const std::int64_t gained = place_block(std::min(p_.num_masked - count_, p_.max_num_patches));
      if (gained == 0) break;
      count_ += gained;
    }
  }

  // Masks cells that touch the mask, each free neighbour equally likely, until the count is reached.
  void grow(SampleStream stream) {
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
      std::uint32_t chosen = below(candidates, stream.next()[0]);
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
    const auto width = static_cast<std::uint32_t>(p_.width), cells = static_cast<std::uint32_t>(p_.height * p_.width);
    PhiloxBlock words{};
    for (auto last = static_cast<std::uint32_t>(cells - p_.num_masked); last < cells; ++last, ++count_) {
      if (count_ % 4 == 0) words = stream_.next();
      const std::uint32_t cell = below(last + 1, words[static_cast<std::size_t>(count_ % 4)]);
      const std::uint32_t taken = (rows_[cell / width] >> (cell % width)) & 1 ? last : cell;
      rows_[taken / width] |= std::uint64_t{1} << (taken % width);
    }
  }

  std::int32_t write(std::uint8_t* out) const {
    for (std::int64_t i = 0; i < p_.height; ++i) {
      std::uint64_t bits = rows_[i];
      std::int64_t left = p_.width;
      if constexpr (std::endian::native == std::endian::little) {
        for (; left >= 8; left -= 8, bits >>= 8, out += 8) {
          const std::uint64_t cells = spread(bits);
          std::memcpy(out, &cells, 8);
        }
      }
      for (; left > 0; --left, bits >>= 1) *out++ = bits & 1;
    }
    return static_cast<std::int32_t>(count_);
  }

 private:
  // Returns the number of cells newly masked, 0 when ten attempts failed.
  std::int64_t place_block(std::int64_t most) {
    for (int tried = 0; tried < kAttemptsPerBlock; ++tried) {
      const Attempt& attempt = next_attempt();
      // With fewer than min_num_patches left the bounds change places, as in the official code.
      const double area = uniform(static_cast<double>(p_.min_num_patches), static_cast<double>(most), attempt.area);
      const double side = std::sqrt(area);
      const std::int64_t a = round_half_even(side * attempt.rows);
      const std::int64_t b = round_half_even(side * attempt.columns);
      if (a >= p_.height || b >= p_.width) continue;  // a block never spans the grid
      const std::int64_t top = below(static_cast<std::uint32_t>(p_.height - a + 1), attempt.top);
      const std::int64_t left = below(static_cast<std::uint32_t>(p_.width - b + 1), attempt.left);
      const std::uint64_t span = low_bits(b) << left;
      std::int64_t gained = a * b;
      for (std::int64_t i = top; i < top + a; ++i) gained -= std::popcount(rows_[i] & span);
      if (gained <= 0 || gained > most) continue;
      for (std::int64_t i = top; i < top + a; ++i) rows_[i] |= span;
      return gained;
    }
    return 0;
  }

  // One Philox block per attempt. Two are drawn at a time, since neither waits for the other: a tenth of the whole
  // cost.
  const Attempt& next_attempt() {
    if (next_ == attempts_.size()) {
      for (Attempt& attempt : attempts_) {
        const PhiloxBlock words = stream_.next();
        const double rows = portable_exp(0.5 * uniform(log_min_aspect_, log_max_aspect_, words[1]));
        attempt = {words[0], words[2], words[3], rows, 1 / rows};
      }
      next_ = 0;
    }
    return attempts_[next_++];
  }

  const MaskParameters& p_;
  double log_min_aspect_, log_max_aspect_;
  SampleStream stream_;
  std::array<Attempt, 2> attempts_;
  std::size_t next_ = attempts_.size();
  std::array<std::uint64_t, kMaxGrid> rows_;
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

BEIT_FAST_VERSIONS("popcnt")
void sample_masks(const MaskParameters& parameters, std::uint64_t seed, std::uint32_t epoch,
                  const std::int64_t* indices, std::int64_t batch, std::uint8_t* out, std::int32_t* counts) {
  const bool blocks = parameters.mode == MaskMode::exact || parameters.mode == MaskMode::official;
  const double log_min_aspect = blocks ? portable_log(parameters.min_aspect) : 0;
  const double log_max_aspect = blocks ? portable_log(parameters.max_aspect) : 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    const auto sample = static_cast<std::uint64_t>(indices[b]);
    Mask mask(parameters, log_min_aspect, log_max_aspect, {seed, epoch, sample, Purpose::mask});
    if (blocks) mask.place_blocks();
    if (parameters.mode == MaskMode::exact) mask.grow({seed, epoch, sample, Purpose::growth});
    if (parameters.mode == MaskMode::random) mask.scatter();
    counts[b] = mask.write(out + b * parameters.height * parameters.width);
  }
}

}  // namespace beit_fast
